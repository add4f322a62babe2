"""How training went over time: speed, learning rate, gradients, and the steps that were skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nvila.errors import NvilaError
from nvila_pipelines.report import plots, sections
from nvila_pipelines.report.curation_panels import Panel
from nvila_pipelines.report.formats import number, percent, size
from nvila_pipelines.report.outputs import Outputs
from nvila_platform.training.history import HISTORY_FILE, StageHistory, read_history


def speed(outputs: Outputs) -> tuple[Panel, ...]:
    """Return tokens a second over time, one panel a stage."""
    panels = []
    for index, (stage, history) in enumerate(_histories(outputs).items()):
        curve = [(p.seconds, p.values["tokens_per_second"]) for p in history.points if "tokens_per_second" in p.values]
        if curve:
            text = _speed_text(history)
            svg = plots.training_curve(
                curve,
                [point.seconds for point in history.points if "skipped" in point.values],
                labels=("seconds", "tokens/s"),
                name=f"speed{index}",
                alt=f"Tokens a second of stage {stage}: {text}",
            )
            panels.append(Panel(title=stage, svg=svg, text=text))
    return tuple(panels)


def rates(outputs: Outputs) -> tuple[Panel, ...]:
    """Return learning rate and gradient norm over steps, two panels a stage, or one where no norm is known."""
    histories = _histories(outputs)
    kinds = (("lr_scale", "learning rate", "share of peak"), ("grad_norm", "gradient norm", "norm"))
    return tuple(
        panel
        for index, (stage, history) in enumerate(histories.items())
        for name, what, label in kinds
        for panel in _step_panel(index, stage, history, name, what, label)
    )


def write_plots(artifacts: Mapping[str, Path], directory: Path, workspace: Path) -> Path | None:
    """Write the training plots as SVG files and return their folder, or None when there is nothing to draw.

    Args:
        artifacts: Step name to the step's directory.
        directory: Where the files go.
        workspace: Holds the cache of the plotting library.
    """
    outputs = Outputs(artifacts, refused=False)
    with plots.cached_in(workspace / "cache" / "matplotlib"):
        panels = [(kind, panel) for kind, build in _PLOTS.items() for panel in _attempt(build, outputs)]
    for kind, panel in panels:
        directory.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{kind}-{panel.title}")
        (directory / f"{name}.svg").write_text(plots.standalone(panel.svg), encoding="utf-8")
    return directory if panels else None


def _attempt(build: Callable[[Outputs], tuple[Panel, ...]], outputs: Outputs) -> tuple[Panel, ...]:
    try:
        return build(outputs)
    except NvilaError:
        return ()


_PLOTS = {"loss": sections.losses, "speed": speed, "rates": rates}


def _histories(outputs: Outputs) -> dict[str, StageHistory]:
    return read_history(outputs.file("train", HISTORY_FILE))


def _speed_text(history: StageHistory) -> str:
    last = history.points[-1].values
    parts = [f"{number(last['samples_per_second'])} samples/s at the end"] if "samples_per_second" in last else []
    if "mfu" in last:
        parts.append(f"MFU {percent(last['mfu'])}")
    if "memory_gib" in last:
        parts.append(f"memory {size(last['memory_gib'] * 2**30)}")
    if skipped := int(last.get("skipped_steps", 0)):
        parts.append(f"{skipped} steps skipped")
    return ", ".join(parts)


def _step_panel(index: int, stage: str, history: StageHistory, name: str, what: str, label: str) -> Iterator[Panel]:
    curve = [(float(point.step), point.values[name]) for point in history.points if name in point.values]
    if not curve:
        return
    text = f"from {number(curve[0][1])} to {number(curve[-1][1])}"
    svg = plots.training_curve(
        curve,
        [float(point.step) for point in history.points if "skipped" in point.values],
        labels=("step", label),
        name=f"{name.partition('_')[0]}{index}",
        alt=f"{what.capitalize()} of stage {stage}: {text}",
    )
    yield Panel(title=f"{stage}: {what}", svg=svg, text=text)
