"""Quantizing a model of one's own, outside a recipe: the way of `nvila quantize MODEL`."""
