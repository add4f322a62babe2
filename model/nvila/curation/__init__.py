"""Which samples are worth training on."""
