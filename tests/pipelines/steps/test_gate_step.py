"""The gate: what it compares, when it refuses, and what it says then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ArtifactError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.gate import GATE_TAG, passed
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import set_alias
from nvila_platform.store import ArtifactRef, LocalStore

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


def test_more_limits_of_the_recipe(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change(*STRICT, "gate.min_samples=21", "gate.min_accuracy_by_source={color: 0.9, shape: 0.5}")
    inputs = {"wide": evaluation(bench.root / "w", 18), "quantized": evaluation(bench.root / "q", 18)}
    results = inputs["quantized"] / "results.json"
    found = json.loads(results.read_text()) | {"by_source": {"color": {"accuracy": 0.8}}}
    results.write_text(json.dumps(found))
    _, out = bench.run("gate", inputs)
    verdict = json.loads((out / "verdict.json").read_text())
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == ["samples", "color", "shape"]
    assert "shape is not known: no such questions" in verdict["reason"]


def made(store: LocalStore, step: str, write: Callable[[Path], object], inputs: dict[str, str]) -> ArtifactRef:
    """Publish an artifact of a step."""
    key = content_key(step, {}, inputs, "1")
    directory = store.work_dir(step, key)
    write(directory)
    write_manifest(directory, step=step, key=key, config={}, inputs=inputs, code_version="1", started_at=utc_now())
    return store.publish(directory)


def small(directory: Path) -> None:
    (directory / "sizes.json").write_text(json.dumps({"quantized": {"total": 3 * 2**20}}))


def answers(right: int) -> Callable[[Path], object]:
    return lambda directory: [
        path.rename(directory / path.name) for path in evaluation(directory / "tmp", right).iterdir()
    ]


@pytest.mark.parametrize(("limit", "refused"), [("3", []), ("2.5", ["size MiB"])])
def test_the_size_is_that_of_the_evaluated_model(
    bench: Any, change: Callable[..., Recipe], limit: str, refused: list[str]
) -> None:
    bench.recipe = change(*STRICT, f"gate.max_size_mib={limit}")
    store = LocalStore(Path(bench.settings.store_uri))
    model = made(store, "quantize", small, {})
    small_answers = made(store, "evaluate-quantized", answers(18), {"model": model.digest})
    inputs = {"wide": evaluation(bench.root / "w", 18), "quantized": store.fetch(small_answers)}
    refs = {"wide": small_answers, "quantized": small_answers}
    _, out = bench.run("gate", inputs, refs=refs)
    verdict = json.loads((out / "verdict.json").read_text())
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused


def test_losses_against_the_live_model(bench: Any, change: Callable[..., Recipe]) -> None:
    """The first model has nothing to be compared with; the second is compared with the first, once that is live."""
    bench.recipe = change(*STRICT, "gate.max_live_drop=0.05")
    store = LocalStore(Path(bench.settings.store_uri))
    model = made(store, "quantize", small, {})

    def judged(right: int) -> dict[str, Any]:
        given = made(store, "evaluate-quantized", answers(right), {"model": model.digest, "run": str(right)})
        inputs = {"wide": evaluation(bench.root / f"w{right}", right), "quantized": store.fetch(given)}
        _, out = bench.run("gate", inputs, refs={"wide": given, "quantized": given})
        found: dict[str, Any] = json.loads((out / "verdict.json").read_text())
        return found

    first = judged(18)
    assert first["passed"]
    assert first["checks"][-1]["why"] == "there is no live model to compare with"
    text = json.dumps(first)
    gate = made(store, "gate", lambda directory: (directory / "verdict.json").write_text(text), {})
    version = register_model(bench.settings, "micro", model, None, {GATE_TAG: gate.digest})
    set_alias(bench.settings, "micro", "champion", version.version)
    worse, better = judged(16), judged(19)
    assert not worse["passed"]
    assert worse["reason"] == "live drop is 0.1000, the limit is 0.0500"
    assert worse["live"]["worse"] == 2
    assert better["passed"]
    assert better["checks"][-1]["value"] == pytest.approx(-0.05)


def test_answers_of_the_live_model_that_are_gone_stop_the_gate(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change(*STRICT, "gate.max_live_drop=0.05")
    store = LocalStore(Path(bench.settings.store_uri))
    version = register_model(bench.settings, "micro", made(store, "quantize", small, {}), None, {})
    set_alias(bench.settings, "micro", "champion", version.version)
    inputs = {"wide": evaluation(bench.root / "w", 18), "quantized": evaluation(bench.root / "q", 18)}
    with pytest.raises(ArtifactError, match="the answers of models:/micro@champion are not in the store"):
        bench.run("gate", inputs)
