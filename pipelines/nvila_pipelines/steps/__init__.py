"""The steps of the lifecycle: one function each, from input directories to an output directory."""

from nvila_pipelines.steps.runner import RunContext, run_step
from nvila_pipelines.steps.table import STEPS, StepSpec

__all__ = ["STEPS", "RunContext", "StepSpec", "run_step"]
