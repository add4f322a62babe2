"""Efficient fine-tuning: methods for every part, adapters, a memory planner, the sweep of learning-rate ratios."""
