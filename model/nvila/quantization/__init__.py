"""Smaller weights and activations, saved and loaded without executable code."""
