"""Whether what a served model sees and says still looks like what it was evaluated on."""
