"""What `nvila train` does beside the step: checks before it, stages one at a time, and the plan."""
