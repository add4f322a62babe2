"""What the verbs of single steps do: run up to a step, then say where its artifact is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvila_pipelines.cli.options import prepare_workspace, recipe_of
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.recipe import Recipe


def run_to(step: str, args: argparse.Namespace, settings: Settings) -> int:
    """Run the lifecycle up to a step; finished work is reused."""
    return run_recipe(step, recipe_of(args), args, settings)


def run_recipe(step: str, recipe: Recipe, args: argparse.Namespace, settings: Settings) -> int:
    """Do so for a recipe that is loaded already."""
    prepare_workspace(settings)
    from nvila_pipelines.lifecycle import run_until
    from nvila_platform.store import open_store
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        ref = run_until(recipe, settings, step, view=view)
    store = open_store(settings)
    path, metrics = store.fetch(ref), dict(store.manifest(ref).metrics)
    if args.json:
        emit_json({"step": step, "key": ref.key, "digest": ref.digest, "path": str(path), "metrics": metrics})
    else:
        emit(f"{step}: {path}")
        emit(metric_lines(metrics))
    return 0


def metric_lines(metrics: Mapping[str, float]) -> str:
    """Return metrics as aligned lines.

    Example:
        >>> print(metric_lines({"kept": 100.0, "loss": 0.5}))
          kept  100
          loss  0.5
    """
    width = max((len(name) for name in metrics), default=0)
    return "\n".join(f"  {name:<{width}}  {value:.10g}" for name, value in metrics.items())
