"""The gate: what it compares, when it refuses, and what it says then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.gate import passed

STRICT = ("gate.min_accuracy=0.5", "gate.min_over_blind=0.0", "gate.max_quantized_drop=0.1")


def evaluation(directory: Path, right: int, total: int = 20, blind: float = 0.3) -> Path:
    """An evaluation with the first `right` of `total` questions answered right."""
    directory.mkdir(parents=True)
    lines = [json.dumps({"id": f"q{index}", "correct": index < right}) for index in range(total)]
    (directory / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = {"accuracy": right / total, "baselines": {"text_majority": blind}}
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("wide", "quantized", "blind", "refused"),
    [
        pytest.param(18, 18, 0.3, [], id="good"),
        pytest.param(18, 16, 0.3, [], id="drop-at-the-limit"),
        pytest.param(10, 10, 0.3, [], id="accuracy-at-the-limit"),
        pytest.param(9, 9, 0.3, ["accuracy"], id="accuracy-below"),
        pytest.param(12, 12, 0.7, ["blind baseline"], id="no-better-than-blind"),
        pytest.param(18, 15, 0.3, ["quantization drop"], id="quantization-costs-too-much"),
        pytest.param(12, 5, 0.9, ["accuracy", "blind baseline", "quantization drop"], id="everything"),
    ],
)
def test_verdict(
    wide: int, quantized: int, blind: float, refused: list[str], bench: Any, change: Callable[..., Recipe]
) -> None:
    bench.recipe = change(*STRICT)
    inputs = {
        "wide": evaluation(bench.root / "w", wide, blind=blind),
        "quantized": evaluation(bench.root / "q", quantized, blind=blind),
    }
    metrics, out = bench.run("gate", inputs)
    verdict = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused
    assert verdict["passed"] is passed(out) is (not refused)
    assert metrics["passed"] == float(not refused)
    assert [notice.split(":")[1].split(" is ")[0].strip() for notice in bench.reporter.notices] == refused


def test_a_better_quantized_model_is_no_drop(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change(*STRICT)
    inputs = {"wide": evaluation(bench.root / "w", 15), "quantized": evaluation(bench.root / "q", 17)}
    metrics, out = bench.run("gate", inputs)
    assert metrics["drop"] == pytest.approx(-0.1)
    assert passed(out)


def test_the_blind_margin_moves_the_limit(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change(*STRICT, "gate.min_over_blind=0.25")
    inputs = {"wide": evaluation(bench.root / "w", 10), "quantized": evaluation(bench.root / "q", 10)}
    _, out = bench.run("gate", inputs)
    check = json.loads((out / "verdict.json").read_text(encoding="utf-8"))["checks"][1]
    assert check["limit"] == pytest.approx(0.55)
    assert not check["passed"]


def test_a_refusal_says_value_and_limit(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change(*STRICT, "gate.min_accuracy=1.0")
    inputs = {"wide": evaluation(bench.root / "w", 18), "quantized": evaluation(bench.root / "q", 18)}
    bench.run("gate", inputs)
    assert bench.reporter.notices == ["refused: accuracy is 0.9000, the limit is 1.0000"]
