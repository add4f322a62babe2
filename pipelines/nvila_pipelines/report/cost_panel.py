"""What each step and each training stage used: hours, energy and money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nvila_pipelines.report.formats import amount
from nvila_pipelines.report.outputs import Outputs
from nvila_pipelines.report.sections import Bar
from nvila_platform.cost import summed, usage_of

_HEADS = {
    "gpu_hours": "GPU-hours",
    "core_hours": "Core-hours",
    "energy_kwh_measured": "kWh measured",
    "energy_kwh_estimated": "kWh estimated",
}
_CAPTION = (
    "What it took to make each step's artifact, whether in this run or, for a reused one, in an earlier one. GPU-hours "
    "are wall time times GPUs, core-hours the time that processor cores worked. "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """A table with a column for everything that is known."""

    caption: str
    heads: tuple[str, ...]
    numeric: tuple[int, ...]
    rows: tuple[Bar, ...]


def costs(outputs: Outputs) -> Costs | None:
    """Return hours, energy and money of every step, training stages below their step, and the sum; None without any."""
    metrics = outputs.metrics()
    steps = {step: used for step, found in metrics.items() if (used := usage_of(found))}
    if not steps:
        return None
    rows: list[tuple[str, Mapping[str, float], str]] = []
    for step, used in steps.items():
        rows.append((step, used, "plain"))
        if step == "train":
            rows += [(f"- {stage}", part, "blind") for stage, part in _stages(metrics[step]).items()]
    total = summed(steps.values())
    rows.append(("all", total, "wide"))
    names = [name for name in (*_HEADS, *sorted(name for name in total if name.startswith("cost_"))) if name in total]
    leading = "gpu_hours" if "gpu_hours" in total else "core_hours"
    return Costs(
        caption=_CAPTION + _money_note(names),
        heads=("Step", *(_HEADS.get(name) or name.removeprefix("cost_").upper() for name in names)),
        numeric=tuple(range(1, len(names) + 1)),
        rows=tuple(
            Bar(
                label=label,
                cells=tuple(amount(used.get(name)) for name in names),
                share=used.get(leading, 0.0) / total[leading] if total[leading] else 0.0,
                kind=kind,
            )
            for label, used, kind in rows
        ),
    )


def _money_note(names: list[str]) -> str:
    if any(name.startswith("cost_") for name in names):
        return "Money is by the prices in the settings."
    return "Set NVILA_PRICE_PER_GPU_HOUR, NVILA_PRICE_PER_CORE_HOUR or NVILA_PRICE_PER_KWH to see money."


def _stages(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the usage of the training stages, in order."""
    names = [name.removeprefix("core_hours_") for name in metrics if name.startswith("core_hours_")]
    return {name: usage_of(metrics, name) for name in names}
