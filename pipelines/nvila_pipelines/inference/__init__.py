"""The engine on a model and data of one's own: what `nvila bench serve` compares."""
