"""Decide whether the quantized model may be registered and served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.evaluation.gate import NO_LIVE_MODEL, Check, Verdict, at_least, at_most, not_applicable
from nvila.evaluation.scores import PairedDifference, paired_difference
from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from nvila_pipelines.recipe_schema import GateSection

VERDICT_FILE = "verdict.json"
GATE_TAG = "nvila.gate"


def run(context: StepContext) -> dict[str, float]:
    """Check the quantized model against the policy, the wide model and the live one, on the same samples.

    Outputs: `verdict.json`.

    Raises:
        InfrastructureError: The registry cannot say what the live model is.
    """
    policy = context.recipe.gate
    wide, quantized = (_correct(context.inputs[form]) for form in ("wide", "quantized"))
    results = json.loads((context.inputs["quantized"] / "results.json").read_text(encoding="utf-8"))
    paired = paired_difference([wide[id] for id in quantized], list(quantized.values()))
    checks = [*_score_checks(policy, results, len(quantized))]
    checks.insert(2, at_most("quantization drop", paired.drop, policy.max_quantized_drop, "paired, same samples"))
    if policy.max_size_mib is not None:
        checks.append(at_most("size MiB", _size_mib(context), policy.max_size_mib, "of the quantized weights"))
    live = None
    if policy.max_live_drop is not None:
        check, live = _live_check(context, policy.max_live_drop, quantized)
        checks.append(check)
    verdict = Verdict(checks=tuple(checks))
    said = verdict.to_dict() | {
        "paired": asdict(paired),
        "live": None if live is None else asdict(live),
        # Where a later gate finds the answers of this model, once it is live.
        "evaluated": {form: context.refs[form].digest for form in ("wide", "quantized")},
    }
    (context.out_dir / VERDICT_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    for one in checks:
        if not one.passed:
            context.reporter.notice(f"refused: {one}")
    return {"passed": float(verdict.passed), "drop": paired.drop}


def passed(directory: Path) -> bool:
    """Read the verdict of a gate's output directory."""
    return bool(read_verdict(directory)["passed"])


def read_verdict(directory: Path) -> dict[str, Any]:
    """Read all that a gate said."""
    found: dict[str, Any] = json.loads((directory / VERDICT_FILE).read_text(encoding="utf-8"))
    return found


def _score_checks(policy: GateSection, results: Mapping[str, Any], samples: int) -> Iterator[Check]:
    blind = results["baselines"]["text_majority"] + policy.min_over_blind
    yield at_least("accuracy", results["accuracy"], policy.min_accuracy, "the recipe's minimum")
    yield at_least("blind baseline", results["accuracy"], blind, "answers without the image")
    if policy.min_samples > 1:
        yield at_least("samples", samples, policy.min_samples, "questions that were answered")
    for source, least in policy.min_accuracy_by_source.items():
        value = results.get("by_source", {}).get(source, {}).get("accuracy")
        yield at_least(source, value, least, "the recipe's minimum" if value is not None else "no such questions")


def _size_mib(context: StepContext) -> float | None:
    """Return the size of the evaluated model, which the quantize step measured."""
    from nvila_platform.store import open_store

    store = open_store(context.settings)
    model = store.manifest(context.refs["quantized"]).inputs.get("model")
    ref = store.find(model) if model is not None else None
    if ref is None:
        return None
    sizes = json.loads((store.fetch(ref) / "sizes.json").read_text(encoding="utf-8"))
    return float(sizes["quantized"]["total"]) / 2**20


def _live_check(
    context: StepContext, limit: float, candidate: Mapping[str, bool]
) -> tuple[Check, PairedDifference | None]:
    """Compare with the answers that the live model gave when it went through the gate itself."""
    name = "live drop"
    live = _live_answers(context)
    if live is None:
        return not_applicable(name, limit, NO_LIVE_MODEL), None
    shared: Sequence[str] = [id for id in candidate if id in live]
    if not shared:
        return at_most(name, None, limit, "the live model answered other questions"), None
    paired = paired_difference([live[id] for id in shared], [candidate[id] for id in shared])
    why = f"paired with {_live_address(context)}, {len(shared):,} samples"
    return at_most(name, paired.drop, limit, why), paired


def _live_answers(context: StepContext) -> dict[str, bool] | None:
    """Return which questions the live model answered right; None where there is no live model.

    Raises:
        ArtifactError: The answers of the live model are not in the store.
    """
    from nvila.errors import ArtifactError
    from nvila_platform.registry import resolve_if_any, version_tags
    from nvila_platform.store import open_store

    address = _live_address(context)
    version = resolve_if_any(context.settings, address)
    if version is None:
        return None
    store = open_store(context.settings)
    gate = store.find(version_tags(context.settings, version).get(GATE_TAG, ""))
    evaluated = read_verdict(store.fetch(gate)).get("evaluated", {}) if gate is not None else {}
    ref = store.find(evaluated.get("quantized", ""))
    if ref is None:
        raise ArtifactError(
            f"the answers of {address} are not in the store", "run without gate.max_live_drop, or bring its artifacts"
        )
    return _correct(store.fetch(ref))


def _live_address(context: StepContext) -> str:
    return f"models:/{context.recipe.registration.name}@{context.recipe.gate.against}"


def _correct(directory: Path) -> dict[str, bool]:
    lines = (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["correct"] for line in map(json.loads, lines)}
