"""Register the quantized model by reference and move the alias to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nvila.errors import GateError
from nvila_pipelines.evaluation.gate import gate_tags
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.gate import GATE_TAG, read_verdict

if TYPE_CHECKING:
    from nvila_platform.lineage import Lineage

# Figures of the quantize step that a version carries.
TAGGED = frozenset(
    {
        "wide_bytes",
        "quantized_bytes",
        "parts_left_wide",
        "loss_points",
        *(f"{part}_{what}" for part in ("vision", "language") for what in ("loss_points", "layer_error")),
        *(f"{what}_{form}" for form in ("wide", "quantized") for what in ("ttft_ms", "decode_tokens_per_second")),
    }
)


def run(context: StepContext) -> dict[str, float]:
    """Create a model version with its lineage digests.

    Outputs: `registered.json`, `README.md` (the model card).

    Raises:
        GateError: The gate refused the model.
        InfrastructureError: The registry failed; nothing is half-registered.
    """
    from nvila.checkpoints.documents import CARD_FILE, read_origin
    from nvila_platform.artifacts import read_manifest
    from nvila_platform.lineage import trace
    from nvila_platform.model_card import licence_warning, make_card
    from nvila_platform.pipeline_runs import RUN_TAG, URL_TAG
    from nvila_platform.registration import register_model
    from nvila_platform.registry import run_tags, set_alias
    from nvila_platform.store import open_store

    verdict = read_verdict(context.inputs["verdict"])
    if not verdict["passed"]:
        raise GateError("the gate refused this model", "see verdict.json of the gate step")
    section, ref = context.recipe.register, context.refs["model"]
    lineage = trace(open_store(context.settings), ref.digest)
    tags = {GATE_TAG: context.refs["verdict"].digest, "nvila.code_version": lineage.code_version}
    tags |= gate_tags(verdict)
    tags |= {f"nvila.lineage.{node.step}": node.digest for node in lineage.walk() if node.step}
    if context.tracking_run is not None:
        known = run_tags(context.settings, context.tracking_run)
        tags |= {name: known[name] for name in (RUN_TAG, URL_TAG) if name in known}
    manifest = read_manifest(context.inputs["model"])
    figures = manifest.metrics if manifest is not None else {}
    tags |= {f"nvila.quantization.{name}": f"{value:.6g}" for name, value in figures.items() if name in TAGGED}
    card = make_card(
        section.name,
        lineage,
        read_origin(context.inputs["model"] / "model"),
        licence=section.licence,
        scores=_scores(verdict, lineage),
        figures={name: value for name, value in figures.items() if name in TAGGED},
    )
    if (warning := licence_warning(card.origin.licence)) is not None:
        context.reporter.notice(warning)
    version = register_model(context.settings, section.name, ref, context.tracking_run, tags, card)
    set_alias(context.settings, section.name, section.alias, version.version)
    record = {
        "name": version.name,
        "version": version.version,
        "alias": section.alias,
        "digest": version.digest,
        "uri": version.uri,
    }
    (context.out_dir / CARD_FILE).write_text(card.text(), encoding="utf-8")
    (context.out_dir / "registered.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return {"version": float(version.version)}


def _scores(verdict: Mapping[str, Any], lineage: Lineage) -> dict[str, float]:
    """Return the accuracy that the gate saw, under the name of the data set."""
    sets = (str(node.config.get("data.dataset") or "") for node in lineage.walk() if node.step == "data")
    name = next(filter(None, sets), "own data")
    seen = [one["value"] for one in verdict.get("checks", ()) if one["name"] == "accuracy" and one["value"] is not None]
    return {name: seen[0]} if seen else {}
