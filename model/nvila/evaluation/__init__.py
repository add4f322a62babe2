"""Tasks, scorers, comparison and the gate."""
