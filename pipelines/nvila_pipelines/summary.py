"""The summary of a run: what `nvila run --json` prints and the report shows."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import RunContext
from nvila_platform.artifacts import read_manifest
from nvila_platform.cost import summed, usage_of

_PACKAGES = ("nvila", "torch", "transformers", "deepspeed", "torchao", "kfp", "mlflow", "kserve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One finished run.

    Args:
        run_id: Its name.
        workspace: Where everything is.
        seconds: Wall time of the whole command.
        steps: Wall time of every step; 0 for one whose result was reused.
        usage: Hours, energy and money of the steps that this run did, together; reused results cost it nothing.
        accuracy: Share of right answers: blind baselines, wide and quantized model.
        served: Questions asked over HTTP, right answers and latency; empty when the gate refused.
        sizes: Bytes by form and part.
        model: Address in the registry, empty when the gate refused.
        passed: The gate's verdict.
        checks: The gate's checks.
        recipe: The resolved recipe.
        versions: Versions of the packages that matter.
        hardware: The machine in words.
        report: The report's file.
    """

    run_id: str
    workspace: str
    seconds: float
    steps: Mapping[str, float]
    usage: Mapping[str, float]
    accuracy: Mapping[str, float]
    served: Mapping[str, float]
    sizes: Mapping[str, Mapping[str, int]]
    model: str
    passed: bool
    checks: tuple[Mapping[str, Any], ...]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    report: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: getattr(self, name) for name in self.__slots__} | {"checks": list(self.checks)}

    def finished(self, seconds: float) -> Summary:
        """Return the summary with the final wall time."""
        return replace(self, seconds=round(seconds, 1))


def summarize(
    run: RunContext, recipe: Recipe, artifacts: Mapping[str, Path], step_seconds: Mapping[str, float], seconds: float
) -> Summary:
    """Collect the numbers of a run from the directories of its steps."""
    wide, quantized = (_read(artifacts, f"evaluate-{form}", "results.json") for form in ("wide", "quantized"))
    verdict = _read(artifacts, "gate", "verdict.json")
    served = _read(artifacts, "serve", "serve.json")
    baselines = quantized.get("baselines", {})
    return Summary(
        run_id=run.run_id,
        workspace=str(run.settings.workspace),
        seconds=round(seconds, 1),
        steps=dict(step_seconds),
        usage=_usage(artifacts, step_seconds),
        accuracy={
            "majority": baselines.get("majority", 0.0),
            "text_majority": baselines.get("text_majority", 0.0),
            "wide": wide.get("accuracy", 0.0),
            "quantized": quantized.get("accuracy", 0.0),
        },
        served={name: served[name] for name in ("asked", "right", "p50_ms", "p95_ms") if name in served},
        sizes=_read(artifacts, "quantize", "sizes.json"),
        model=str(served.get("model", "")),
        passed=bool(verdict.get("passed", False)),
        checks=tuple(verdict.get("checks", ())),
        recipe=recipe.to_dict(),
        versions={name: found for name in _PACKAGES if (found := _version(name))} | {"python": _python()},
        hardware={"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
        report=str(run.directory / "report.html"),
    )


def _usage(artifacts: Mapping[str, Path], step_seconds: Mapping[str, float]) -> dict[str, float]:
    done = (directory for step, directory in artifacts.items() if step_seconds.get(step, 0.0) > 0)
    manifests = (read_manifest(directory) for directory in done)
    return summed(usage_of(manifest.metrics) for manifest in manifests if manifest is not None)


def _read(artifacts: Mapping[str, Path], step: str, name: str) -> dict[str, Any]:
    if step not in artifacts:
        return {}
    found: dict[str, Any] = json.loads((artifacts[step] / name).read_text(encoding="utf-8"))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _python() -> str:
    return platform.python_version()
