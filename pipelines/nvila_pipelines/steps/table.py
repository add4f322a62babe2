"""The table of steps. To add one: a module with `run(context)`, a row here, a component and a line in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from nvila.errors import ConfigError, nearest

if TYPE_CHECKING:
    from nvila_pipelines.recipe import Recipe
    from nvila_pipelines.steps.context import StepContext


class StepFunction(Protocol):
    """Does the work of a step in `context.out_dir` and returns its metrics."""

    def __call__(self, context: StepContext) -> dict[str, float]:
        """Run the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One row: where the function is and what its result depends on.

    Args:
        name: Name in graphs, logs and the workspace.
        module: Module below `nvila_pipelines.steps`; loaded when the step really runs.
        sections: Sections or dotted fields of the recipe that the function may read; they are in the content key.
        placement: Dotted fields of those sections that say how the work is done and not what comes out of it: on how
            many processes, say. They are not in the key, so that unfinished work goes on when they change.
        inputs: Input names and the steps that make them.
        outside: `module:function` below `nvila_pipelines` that takes a recipe and returns digests, by name, of files
            that the function reads and no step has made; they are in the key. Empty when there are none.
        options: Fixed extra configuration that tells two uses of one function apart.
        reusable: False for a step with effects outside its directory, which every run does again.
        live_field: Field of the recipe that, where it is set, makes the step read what changes outside; every run then
            does it again, too.
    """

    name: str
    module: str
    sections: tuple[str, ...]
    placement: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    outside: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    reusable: bool = True
    live_field: str = ""

    def load(self) -> StepFunction:
        """Import the step's function."""
        return cast("StepFunction", import_module(f"nvila_pipelines.steps.{self.module}").run)

    def outside_digests(self, recipe: Recipe) -> dict[str, str]:
        """Return digests of what the step reads besides its inputs.

        Raises:
            NvilaError: It is not there.
        """
        if not self.outside:
            return {}
        module, _, name = self.outside.partition(":")
        return dict(getattr(import_module(f"nvila_pipelines.{module}"), name)(recipe))


_ROWS = (
    StepSpec(name="data", module="data", sections=("data",)),
    StepSpec(
        name="curate",
        module="curate",
        sections=("seed", "curate", "train.betas", "train.weight_decay", "train.max_grad_norm", "train.attention"),
        inputs={"data": "data"},
    ),
    StepSpec(
        name="train",
        module="train",
        sections=("seed", "model", "train"),
        placement=(
            "train.num_processes",
            "train.num_threads",
            "train.zero_stage",
            "train.offload",
            "train.gradient_checkpointing",
            "train.checkpoints",
        ),
        inputs={"data": "data", "selection": "curate"},
        outside="training.outside:data_digests",
    ),
    StepSpec(name="quantize", module="quantize", sections=("quantize",), inputs={"data": "data", "model": "train"}),
    StepSpec(
        name="evaluate-wide",
        module="evaluate",
        sections=("evaluate",),
        inputs={"data": "data", "model": "train"},
        options={"form": "wide"},
    ),
    StepSpec(
        name="evaluate-quantized",
        module="evaluate",
        sections=("evaluate",),
        inputs={"data": "data", "model": "quantize"},
        options={"form": "quantized"},
    ),
    StepSpec(
        name="gate",
        module="gate",
        sections=("gate", "register.name"),
        inputs={"wide": "evaluate-wide", "quantized": "evaluate-quantized"},
        # What is live may change between two runs.
        live_field="gate.max_live_drop",
    ),
    StepSpec(
        name="register",
        module="register",
        sections=("register",),
        inputs={"model": "quantize", "verdict": "gate"},
        reusable=False,
    ),
    StepSpec(
        name="serve",
        module="serve",
        sections=("serve",),
        inputs={"data": "data", "model": "quantize", "registration": "register"},
    ),
)
STEPS: dict[str, StepSpec] = {row.name: row for row in _ROWS}


def step_spec(name: str) -> StepSpec:
    """Look up a step.

    Raises:
        ConfigError: There is no such step.
    """
    try:
        return STEPS[name]
    except KeyError:
        raise ConfigError(f"unknown step '{name}'", nearest(name, STEPS)) from None
