"""Scorers: pure functions from an answer and its reference to numbers; no torch, no files."""
