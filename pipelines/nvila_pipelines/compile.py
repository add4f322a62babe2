"""Compiling pipeline graphs into the YAML that the Kubeflow UI takes and the local runner executes."""

from __future__ import annotations

import warnings
from pathlib import Path

GRAPHS = ("lifecycle",)


def compile_graph(name: str, target: Path) -> Path:
    """Compile a graph to IR YAML.

    Args:
        name: Graph in `nvila_pipelines.graphs`.
        target: File to write.
    """
    from importlib import import_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        from kfp import compiler

    graph = getattr(import_module(f"nvila_pipelines.graphs.{name}"), name)
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph, str(target))
    return target
