"""The end of a curation: the report, the manifest last, and the run in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvila.errors import NvilaError
from nvila_pipelines.curation.request import CurationRequest, CurationResult
from nvila_pipelines.curation.spec import ScoringSpec, open_stream
from nvila_platform.artifacts import code_version, content_key, write_manifest
from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

STEP = "curate"


def finish(
    request: CurationRequest, spec: ScoringSpec, result: CurationResult, settings: Settings, started_at: str
) -> CurationResult:
    """Write the report, the manifest last, and track the run."""
    config = {"scoring": asdict(spec), "rule": asdict(request.rule), "normalize": request.normalize}
    inputs = {"data": spec.data_digest, "small": spec.small_digest, "large": spec.large_digest}
    scored = sum(count.scored for count in result.sources.values())
    metrics = {"records": float(result.records), "scored": float(scored), "kept": float(result.kept)}
    result = replace(result, report=_report(request, spec, result, settings))
    write_manifest(
        request.out,
        step=STEP,
        key=content_key(STEP, config, inputs, code_version()),
        config=config,
        inputs=inputs,
        code_version=code_version(),
        started_at=started_at,
        metrics=metrics,
    )
    bad = {f"bad/{name}": float(count) for name, count in result.statuses.items() if name != "ok"}
    track(settings, request.out, config, metrics | bad)
    return result


def _report(request: CurationRequest, spec: ScoringSpec, result: CurationResult, settings: Settings) -> Path | None:
    """Write the report; data that can no longer be read costs its pictures only."""
    from nvila_pipelines.report.curation_report import write_curation_report

    try:
        stream = open_stream(spec.data)
    except NvilaError as e:
        logger.warning("the report shows no samples: %s", e)
        stream = None
    rule = request.rule
    rates = ", ".join([f"{rule.keep_rate:g}", *(f"{source} {rate:g}" for source, rate in rule.rates.items())])
    limits = [
        f"{name} {value:g}" for name, value in (("from", rule.min_delta), ("to", rule.max_delta)) if value is not None
    ]
    return write_curation_report(
        request.out,
        name=Path(spec.data.data).name if spec.data.mixtures is None else spec.data.data,
        method=f"{rule.method}, keep {'; '.join([rates, *limits])}",
        sources=result.sources,
        statuses=result.statuses,
        stream=stream,
        made={
            "data": spec.data.data,
            "small model": f"{spec.small} ({spec.small_digest[:12]})",
            "large model": f"{spec.large} ({spec.large_digest[:12]})",
            "likelihoods": f"{spec.dtype} on {spec.device}, normalized by {request.normalize}",
            "code": code_version(),
        },
        cache=settings.workspace / "cache" / "matplotlib",
    )


def track(settings: Settings, out: Path, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Record the run with its report and plots; without MLflow the events wait in the workspace."""
    from nvila_pipelines.report.curation_report import PLOTS, REPORT
    from nvila_platform.tracking import open_tracker

    with open_tracker(settings, f"{STEP} {out.name}", tags={"nvila.step": STEP}) as tracker:
        tracker.log_params(config)
        tracker.log_metrics(metrics)
        for name in (REPORT, PLOTS):
            tracker.log_artifact(out / name)
