"""Evaluating a model on tasks, as a user asks for it: on this machine, in one or several processes."""
