"""Tuning a model on one's own data, as a user asks for it: from a folder to a registered model."""
