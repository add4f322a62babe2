"""Recipes, stages, the loop, precision, checkpoints."""
