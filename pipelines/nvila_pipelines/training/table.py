"""The plan of a training run as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nvila.training.planning.devices import GIB
from nvila.training.planning.memory import MemoryPlan, fitting
from nvila_pipelines.training.planned import TrainingPlan

if TYPE_CHECKING:
    from nvila.training.planning.plan import StagePlan

_UNKNOWN = "?"
_MEMORY: tuple[tuple[str, Callable[[MemoryPlan], int]], ...] = (
    ("weights", lambda plan: plan.parameters),
    ("gradients", lambda plan: plan.gradients),
    ("optimizer", lambda plan: plan.optimizer),
    ("activations", lambda plan: plan.activations),
    ("loss", lambda plan: plan.logits),
    ("buffers", lambda plan: plan.buffers),
    ("sum", lambda plan: plan.total),
)


def render_plan(plan: TrainingPlan, console: Console) -> None:
    """Print the stages, then the memory of every way of running them."""
    hardware = plan.hardware
    console.print(
        f"{plan.recipe}: {hardware.gpus} x {hardware.gpu.name} of {_gib(hardware.bytes)} GiB, "
        f"precision {plan.precision}, {plan.optimizer}, {hardware.mfu:.0%} of the peak",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_stages(plan))
    for stage in plan.stages:
        console.print(_memory(stage))
        console.print(_advice(stage), highlight=False, soft_wrap=True)
    console.print(
        "Samples are what plan.data assumes, and time follows from plan.mfu: both are settings, not measurements. "
        "Memory includes 3 GiB for CUDA and what its allocator cannot use.",
        highlight=False,
        soft_wrap=True,
    )


def _stages(plan: TrainingPlan) -> Table:
    table = Table(title="stages")
    for name in ("stage", "vision", "projector", "language", "samples", "positions", "steps", "time", "GPU-hours"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    table.add_column(plan.currency, justify="right")
    for stage in plan.stages:
        parts = [_part(stage, part) for part in ("vision", "projector", "language")]
        table.add_row(
            stage.name,
            *parts,
            f"{stage.samples_per_step:,}",
            f"{stage.positions_per_step:,}",
            _UNKNOWN if stage.steps is None else f"{stage.steps:,}",
            _UNKNOWN if stage.seconds is None else _time(stage.seconds),
            _UNKNOWN if stage.gpu_hours is None else _hours(stage.gpu_hours),
            _UNKNOWN if stage.cost is None else f"{stage.cost:,.0f}",
        )
    return table


def _memory(stage: StagePlan) -> Table:
    table = Table(title=f"{stage.name}: GiB on each GPU, {stage.samples_per_gpu} samples at once")
    for name in ("ZeRO", "offload", "checkpointing", *(name for name, _ in _MEMORY), "fits"):
        table.add_column(name, justify="left" if name in ("offload", "checkpointing") else "right")
    for one in stage.memory:
        amounts = [_gib(amount(one)) for _, amount in _MEMORY]
        table.add_row(
            str(one.zero_stage),
            one.offload,
            "yes" if one.checkpointing else "no",
            *amounts,
            "yes" if one.fits else "no",
        )
    return table


def _advice(stage: StagePlan) -> str:
    best = fitting(stage.memory)
    if best is None:
        return f"{stage.name}: nothing fits; use more GPUs, fewer images_per_step or a shorter max_length"
    return f"{stage.name}: {way(best)}"


def way(plan: MemoryPlan) -> str:
    """Name a way of running a stage by the settings that choose it."""
    words = [f"train.zero_stage={plan.zero_stage}"]
    words += ["train.gradient_checkpointing=true"] if plan.checkpointing else []
    words += [f"train.offload={plan.offload}"] if plan.offload != "none" else []
    return " ".join(words)


def _part(stage: StagePlan, part: str) -> str:
    trained = {str(name): count for name, count in stage.trained.items()}[part]
    return _count(trained) if trained else "frozen"


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)


def _gib(value: int) -> str:
    return f"{value / GIB:.1f}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"
