"""Plots of a tuning, as PNG in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.report.plots import cached_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED, _GREY = "#2563a8", "#b3261e", "#566270"


def loss_plot(losses: Sequence[Mapping[str, float]], best_step: int | None, cache: Path) -> str:
    """Draw the held-out loss over steps; the step whose weights were kept is marked."""

    def draw(axes: Axes) -> None:
        axes.plot([one["step"] for one in losses], [one["loss"] for one in losses], color=_BLUE, marker="o")
        if best_step is not None:
            best = next(one["loss"] for one in losses if one["step"] == best_step)
            axes.plot([best_step], [best], "o", color=_RED, markersize=9, label="kept")
            axes.legend(frameon=False)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out loss")

    return _png(draw, cache)


def ratio_plot(trials: Sequence[Mapping[str, Any]], cache: Path) -> str:
    """Draw the held-out loss of every tried ratio of learning rates."""

    def draw(axes: Axes) -> None:
        ratios = [float(one["ratio"]) for one in trials]
        losses = [float(one["loss"]) for one in trials]
        axes.plot(ratios, losses, color=_BLUE, marker="o")
        lowest = min(range(len(losses)), key=losses.__getitem__)
        axes.plot([ratios[lowest]], [losses[lowest]], "o", color=_RED, markersize=9, label="chosen")
        axes.set_xscale("log")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("learning rate of the language model over that of the vision tower")
        axes.set_ylabel("held-out loss")
        axes.legend(frameon=False)

    return _png(draw, cache)


def _png(draw: Callable[[Axes], None], cache: Path) -> str:
    with cached_in(cache):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.4), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#dde3e9", linewidth=0.6)
        axes.tick_params(colors=_GREY)
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode()
