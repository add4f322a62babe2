"""Compiling pipeline graphs into the YAML that the Kubeflow UI takes and the local runner executes."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError, nearest

if TYPE_CHECKING:
    from nvila_pipelines.graphs.profile import Profile

GRAPHS = ("lifecycle", "train", "tune", "quantize-and-release", "evaluate-endpoint")


def compile_graph(name: str, target: Path, profile: Profile | None = None) -> Path:
    """Compile a graph to IR YAML.

    Args:
        name: One of `GRAPHS`.
        target: File to write; one with placement on Kubernetes holds two documents.
        profile: Where its tasks run; None says nothing about it.

    Raises:
        ConfigError: There is no such graph.
    """
    _check(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        from kfp import compiler
    from nvila_pipelines.graphs.profile import NOWHERE

    graph = import_module(f"nvila_pipelines.graphs.{name.replace('-', '_')}").build(profile or NOWHERE)
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph, str(target))
    return target


def shipped(name: str) -> Path:
    """Return the compiled form of a graph that came with this package, without any placement.

    Raises:
        ConfigError: There is no such graph.
    """
    _check(name)
    return Path(str(files("nvila_pipelines") / "graphs" / "compiled" / f"{name}.yaml"))


def _check(name: str) -> None:
    if name not in GRAPHS:
        raise ConfigError(f"there is no graph '{name}'", nearest(name, GRAPHS))
