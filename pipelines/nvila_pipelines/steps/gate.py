"""Decide whether the quantized model may be registered and served."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvila.evaluation.scores import paired_difference
from nvila_pipelines.steps.context import StepContext

VERDICT_FILE = "verdict.json"


def run(context: StepContext) -> dict[str, float]:
    """Check the quantized model against the policy and against the wide model on the same samples.

    Outputs: `verdict.json`.
    """
    policy = context.recipe.gate
    wide, quantized = (_correct(context.inputs[form]) for form in ("wide", "quantized"))
    results = json.loads((context.inputs["quantized"] / "results.json").read_text(encoding="utf-8"))
    paired = paired_difference([wide[id] for id in quantized], list(quantized.values()))
    blind = results["baselines"]["text_majority"] + policy.min_over_blind
    checks = [
        _check("accuracy", results["accuracy"], policy.min_accuracy, at_least=True, why="the recipe's minimum"),
        _check("blind baseline", results["accuracy"], blind, at_least=True, why="answers without the image"),
        _check("quantization drop", paired.drop, policy.max_quantized_drop, at_least=False, why="paired, same samples"),
    ]
    agreed = all(check["passed"] for check in checks)
    verdict = {"passed": agreed, "checks": checks, "paired": asdict(paired)}
    (context.out_dir / VERDICT_FILE).write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
    for check in checks:
        if not check["passed"]:
            context.reporter.notice(
                f"refused: {check['name']} is {check['value']:.4f}, the limit is {check['limit']:.4f}"
            )
    return {"passed": float(agreed), "drop": paired.drop}


def passed(directory: Path) -> bool:
    """Read the verdict of a gate's output directory."""
    return bool(json.loads((directory / VERDICT_FILE).read_text(encoding="utf-8"))["passed"])


def _check(name: str, value: float, limit: float, *, at_least: bool, why: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "passed": value >= limit if at_least else value <= limit,
        "why": why,
    }


def _correct(directory: Path) -> dict[str, bool]:
    lines = (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["correct"] for line in map(json.loads, lines)}
