"""A tuning from request to registered model; whatever is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import GateError
from nvila_pipelines.curation.spec import data_digest
from nvila_pipelines.tuning.preparing import Prepared, prepare
from nvila_pipelines.tuning.report import write_report
from nvila_pipelines.tuning.request import TuneRequest
from nvila_pipelines.tuning.scoring import BASE, TUNED, Scores, score_model
from nvila_pipelines.tuning.training import ratio_text, train, train_in_processes
from nvila_pipelines.verb_run import VerbRun, dataset
from nvila_platform.artifacts import (
    code_version,
    content_key,
    read_manifest,
    storage_errors,
    utc_now,
    write_atomically,
    write_manifest,
)
from nvila_platform.cost import UsageMeter
from nvila_platform.registration import check_name
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store, reuse

if TYPE_CHECKING:
    from nvila.tuning.ratio import RatioTrial
    from nvila_platform.telemetry import ProgressView
    from nvila_platform.tracking import Tracker

STEP = "tune"
SUMMARY_FILE = "summary.json"
ALIAS = "candidate"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOutcome:
    """What a tuning made.

    Args:
        ref: The artifact.
        directory: Its folder; the model is in `model/`.
        summary: What `summary.json` holds.
        registered: Address in the registry; None when it was not registered.
        reused: Whether everything was there already.
    """

    ref: ArtifactRef
    directory: Path
    summary: dict[str, Any]
    registered: str | None
    reused: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of the command."""
        return {
            **self.summary,
            "model": self.registered,
            "path": str(self.directory / "model"),
            "digest": self.ref.digest,
            "reused": self.reused,
        }


def tune_model(request: TuneRequest, settings: Settings, view: ProgressView) -> TuneOutcome:
    """Tune, evaluate and register a model.

    Raises:
        GateError: The tuned model forgot more than it may; its artifact stays, unregistered.
        NvilaError: Something is wrong with the request, the data or the base; the same command goes on from there.
    """
    from nvila.tuning.adapters import base_digest

    if request.name is not None:
        check_name(request.name)
    reporter = view.reporter(STEP)
    prepared = prepare(request, settings, reporter)
    digest = base_digest(request.model)
    inputs = {"base": artifact_digest(request.model) or digest, "data": data_digest(request.data)}
    config = request.to_dict() | {"base_digest": digest, "tune": tune_dict(prepared)}
    key = content_key(STEP, config, inputs, code_version())
    store = open_store(settings)
    with store.lock(STEP, key, reporter), _verb_run(request, settings, prepared, key, inputs) as run:
        ref = reuse(store, STEP, key, reporter)
        reused = ref is not None
        if ref is None:
            out, started_at, meter = store.work_dir(STEP, key), utc_now(), UsageMeter(settings)
            with storage_errors(out):
                summary, timing = _work(request, prepared, digest, out, settings, view, run.open())
            write_manifest(
                out,
                step=STEP,
                key=key,
                config=config,
                inputs=inputs,
                code_version=code_version(),
                started_at=started_at,
                metrics={**summary["metrics"], **timing, **meter.usage().metrics()},
            )
            ref = store.publish(out)
        directory = store.fetch(ref)
        summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
        _check_guard(request, summary, directory)
        registered = _register(request, settings, run, ref, summary, directory) if request.name is not None else None
    return TuneOutcome(ref=ref, directory=directory, summary=summary, registered=registered, reused=reused)


def _verb_run(
    request: TuneRequest, settings: Settings, prepared: Prepared, key: str, inputs: Mapping[str, str]
) -> VerbRun:
    """Return the run in MLflow of a request."""
    numbers = {name: float(count) for name, count in _samples(prepared).items()}
    data = dataset(request.data, inputs["data"], "training", numbers)
    params = {"base": inputs["base"], "method_name": request.method.name, **request.to_dict()}
    return VerbRun(settings, STEP, key, params, (data,))


def artifact_digest(folder: Path) -> str | None:
    """Return the digest of the artifact that a model folder belongs to, for its lineage; None where there is none."""
    manifest = read_manifest(folder) or read_manifest(folder.parent)
    return None if manifest is None else manifest.digest


def tune_dict(prepared: Prepared) -> dict[str, Any]:
    """Return the settings of the run in JSON form."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(prepared.tune)))
    # How it is computed follows the machine's memory.
    del values["micro_batch_tokens"], values["gradient_checkpointing"]
    return values


def _work(
    request: TuneRequest,
    prepared: Prepared,
    digest: str,
    out: Path,
    settings: Settings,
    view: ProgressView,
    tracker: Tracker,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Do everything between the data and the artifact; returns its summary, and the times, which are not part of it."""
    from nvila.checkpoints.documents import carry_documents

    reporter = view.reporter(STEP)
    before = score_model(request, prepared, request.model, BASE, out, settings, view)
    if request.processes > 1:
        train_in_processes(request, prepared, digest, out, settings, view, tracker.handle)
    trained = train(request, prepared, digest, out, settings, reporter, tracker)
    prepared, tuned, trials = trained.prepared, trained.tuned, trained.trials
    carry_documents(request.model, tuned.directory)
    if trials:
        reporter.notice(ratio_text(trials))
    memory = memory_check(prepared, tuned.peak_bytes)
    if memory["error"] is not None:
        reporter.notice(
            f"peak memory of a step: {memory['measured']:,} bytes measured, {memory['predicted']:,} planned "
            f"({memory['error']:+.1%})"
        )
    timing = time_check(prepared, tuned.step_seconds)
    if timing:
        reporter.notice(
            f"time of a step: {timing['seconds_per_step']:.3g} s measured, "
            f"{timing['planned_seconds_per_step']:.3g} s planned ({timing['step_time_error']:+.0%})"
        )
    after = score_model(request, prepared, tuned.directory, TUNED, out, settings, view)
    summary = _summary(request, prepared, tuned, before, after, trials)
    write_atomically(out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    write_report(out, summary, settings.workspace / "cache" / "matplotlib")
    tracker.log_metrics({**summary["metrics"], **timing})
    tracker.log_artifact(out / "report.html")
    return summary, timing


def _summary(
    request: TuneRequest,
    prepared: Prepared,
    tuned: Any,
    before: Scores,
    after: Scores,
    trials: list[RatioTrial],
) -> dict[str, Any]:
    metrics: dict[str, float] = {"steps": float(tuned.steps)}
    memory = memory_check(prepared, tuned.peak_bytes)
    if memory["error"] is not None:
        metrics |= {"peak_bytes": float(memory["measured"]), "planned_bytes": float(memory["predicted"])}
    if tuned.best is not None:
        metrics |= {"held_out_loss_before": tuned.losses[0].loss, "held_out_loss": tuned.best.loss}
    for when, scores in (("before", before), ("after", after)):
        metrics |= {f"{name}_{when}": value for name, value in scores.values.items()}
    return {
        "method": request.method.to_dict(),
        "name": request.method.name,
        "rates": dict(prepared.tune.rates),
        "parts": {part: {"total": one.total, "trained": one.num_trained} for part, one in prepared.parts.items()},
        "samples": _samples(prepared),
        "losses": [{"step": one.step, "loss": one.loss} for one in tuned.losses],
        "best_step": None if tuned.best is None else tuned.best.step,
        "scores": {"before": before.values, "after": after.values, "guard": list(request.guard)},
        "examples": after.examples,
        "ratios": [asdict(trial) for trial in trials],
        "memory": memory_check(prepared, tuned.peak_bytes),
        "max_drop": request.max_drop,
        "scorer": request.scorer,
        "metrics": metrics,
    }


def _samples(prepared: Prepared) -> dict[str, int]:
    data = prepared.data
    held_out = 0 if data.held_out is None else data.held_out.count()
    return {"train": len(data.store), "held_out": held_out, "set_aside": data.store.num_bad}


def memory_check(prepared: Prepared, measured: int | None) -> dict[str, Any]:
    """Return predicted and measured peak of a step, and how far they are apart."""
    predicted = None if prepared.plan is None else prepared.plan.step.peak
    known = measured is not None and predicted is not None
    return {
        "predicted": predicted,
        "measured": measured,
        "error": (predicted or 0) / (measured or 1) - 1 if known else None,
    }


def time_check(prepared: Prepared, measured: float | None) -> dict[str, float]:
    """Return planned and measured seconds of a step, and how far they are apart; empty where one is not known."""
    if measured is None or prepared.plan is None:
        return {}
    planned = prepared.plan.seconds
    return {
        "seconds_per_step": measured,
        "planned_seconds_per_step": planned,
        "step_time_error": planned / measured - 1,
    }


def _check_guard(request: TuneRequest, summary: dict[str, Any], directory: Path) -> None:
    scores = summary["scores"]
    for task in scores["guard"]:
        before, after = scores["before"][task], scores["after"][task]
        if before - after > request.max_drop:
            raise GateError(
                f"the tuned model fell from {before:.3f} to {after:.3f} on {task}, more than --max-drop "
                f"{request.max_drop:g}; it is in {directory}, not registered",
                "mix general data into DATA, tune less (lower --lr, fewer --epochs), or allow more with --max-drop",
            )


def _register(
    request: TuneRequest, settings: Settings, run: VerbRun, ref: ArtifactRef, summary: dict[str, Any], directory: Path
) -> str:
    from nvila.checkpoints.documents import read_origin
    from nvila.tuning.run import MODEL_FOLDER
    from nvila_platform.lineage import trace
    from nvila_platform.model_card import make_card
    from nvila_platform.registry import set_alias

    assert request.name is not None
    store = open_store(settings)
    lineage = trace(store, ref.digest)
    tags = {f"nvila.lineage.{node.step}": node.digest for node in lineage.walk() if node.step}
    tags |= {"nvila.code_version": lineage.code_version, "nvila.method": summary["name"]}
    weights = read_origin(directory / MODEL_FOLDER)
    card = make_card(request.name, lineage, weights, scores=summary["scores"]["after"])
    version = run.register(request.name, ref, store.manifest(ref).metrics, tags, card)
    set_alias(settings, request.name, ALIAS, version.version)
    return version.model_uri
