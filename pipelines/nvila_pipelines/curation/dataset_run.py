"""Curating a data set: score in one or several processes, merge, choose, report. Finished work is never done again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, NvilaError
from nvila_pipelines.curation.finishing import STEP, finish
from nvila_pipelines.curation.request import CurationRequest, CurationResult
from nvila_pipelines.curation.scoring_process import own_rank, scoring_run, shards_of
from nvila_pipelines.curation.spec import ScoringSpec, data_digest, folder_digest, open_stream
from nvila_pipelines.curation.watching import CurationWatch
from nvila_pipelines.processes import run_watched
from nvila_platform.artifacts import MANIFEST_NAME, storage_errors, utc_now

if TYPE_CHECKING:
    from nvila.curation.choosing import Rule, SourceCount
    from nvila.curation.merging import Merged
    from nvila.curation.selection import Normalize
    from nvila.curation.shards import Shards
    from nvila.progress import Reporter
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView

# Beside the outputs and hidden, so that it is none.
_SCRATCH = ".work"
_WAIT_S = 0.5


def curate(request: CurationRequest, settings: Settings, *, view: ProgressView) -> CurationResult | None:
    """Score what is not scored yet, and choose.

    Under torchrun every process scores its shards; the first one waits for the others and does the rest.

    Args:
        request: What to do.
        settings: Tracking.
        view: Draws progress.

    Returns:
        What was made; None in the processes of torchrun that only score.

    Raises:
        NvilaError: Something is wrong with the request, the data or the models; the same command goes on from there.
    """
    from nvila_platform.launch import calm_threads
    from nvila_platform.training.curation import offer_curation

    started, started_at = time.monotonic(), utc_now()
    calm_threads()
    rank, world = own_rank()
    if world > 1 and request.processes > 1:
        raise ConfigError("--processes starts processes, and so did torchrun", "leave --processes out")
    with storage_errors(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    watch = CurationWatch()
    with (
        _alone(request.out, view, needed=world == 1),
        # One process speaks for all: their shards lie in one folder.
        offer_curation(settings, watch.counts, view.reporter(STEP)) if rank == 0 else nullcontext(),
    ):
        spec = _resolve(request, view.reporter(STEP), rank)
        watch.follow(shards_of(request.out, spec))
        _score(request, spec, settings, view, rank, world)
        if rank > 0:
            return None
        shards = shards_of(request.out, spec)
        if world > 1:
            _wait(request, shards, view.reporter(STEP))
        merged = _merge(request, spec, shards, view.reporter(STEP))
        sources = _choose(request, shards, view.reporter(STEP))
        watch.settle(sources)
        result = CurationResult(
            out=request.out,
            records=merged.total,
            statuses=merged.statuses,
            sources=sources,
            seconds=time.monotonic() - started,
        )
        return finish(request, spec, result, settings, started_at)


def preview(out: Path, rule: Rule, normalize: Normalize = "none", num_clusters: int | None = None) -> CurationResult:
    """Say what a choice would keep of saved scores, and write nothing beside them.

    Args:
        out: Directory with the scores.
        rule: What to keep.
        normalize: How delta is made of the likelihoods.
        num_clusters: For the method `cluster`; None chooses.

    Raises:
        ConfigError: There are no scores yet, or none that this choice can be made from.
    """
    from nvila.curation.choosing import choose, count_sources
    from nvila.curation.clusters import write_clusters
    from nvila.curation.merging import SCORES, count_statuses, merge, merged_already

    started = time.monotonic()
    spec = ScoringSpec.load(out)
    if spec is None or not (out / SCORES).exists():
        raise ConfigError(f"{out} has no scores to choose from", "run the command without --dry-run once")
    shards = shards_of(out, spec)
    with tempfile.TemporaryDirectory(prefix="nvila-curate-") as name:
        folder = Path(name)
        if merged_already(shards.digest, out, normalize) is not None:
            (folder / SCORES).symlink_to(out / SCORES)
        elif shards.finished() is not None:
            merge(shards, folder, normalize)
        else:
            raise ConfigError(
                f"{shards.directory} is needed to normalize by {normalize}, and not there", "leave --dry-run out"
            )
        if rule.method == "cluster":
            if not _has_features(shards):
                raise ConfigError(f"{out} has no features of images yet", "run --method cluster without --dry-run once")
            write_clusters(shards, folder, num_clusters=num_clusters, seed=rule.seed)
        statuses = count_statuses(folder)
        return CurationResult(
            out=out,
            records=sum(statuses.values()),
            statuses=statuses,
            sources=count_sources(folder, choose(folder, rule)),
            seconds=time.monotonic() - started,
        )


def _resolve(request: CurationRequest, reporter: Reporter, rank: int) -> ScoringSpec:
    """Say how to score, and refuse to mix with scores of another making."""
    earlier = ScoringSpec.load(request.out)
    if request.data is None or request.small is None or request.large is None:
        if earlier is None:
            raise ConfigError(
                f"{request.out} has no scores yet", "nvila curate DATA --small MODEL --large MODEL --out DIR"
            )
        return _accepting(request, earlier, rank)
    import torch

    device = request.device or (earlier.device if earlier is not None else "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    fresh: dict[str, Any] = {"dtype": "fp32", "shard_size": 4096, "batch_tokens": 8192}
    local = max(request.processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    fresh["threads"] = max(1, (os.cpu_count() or 1) // local)
    options = {
        name: getattr(request, name) or (getattr(earlier, name) if earlier is not None else value)
        for name, value in fresh.items()
    }
    reporter.progress("models", 0, 2)
    spec = ScoringSpec(
        data=request.data,
        data_digest=data_digest(request.data),
        small=str(request.small.absolute()),
        small_digest=folder_digest(request.small),
        large=str(request.large.absolute()),
        large_digest=folder_digest(request.large),
        device=device,
        **options,
    )
    reporter.progress("models", 2, 2)
    while earlier is None and rank > 0:  # the first process counts the records for all
        time.sleep(_WAIT_S)
        earlier = ScoringSpec.load(request.out)
    if earlier is not None:
        spec.refuse_other(earlier, request.out)
        return _accepting(request, replace(spec, records=earlier.records, max_bad=earlier.max_bad), rank)
    spec = replace(spec, records=_count(spec, reporter))
    if request.max_bad is not None:
        spec = replace(spec, max_bad=request.max_bad)
    spec.save(request.out)
    return spec


def _accepting(request: CurationRequest, spec: ScoringSpec, rank: int) -> ScoringSpec:
    """Remember how much may be bad, so that choosing again accepts what scoring did."""
    if request.max_bad in (None, spec.max_bad):
        return spec
    spec = replace(spec, max_bad=request.max_bad)
    if rank == 0:
        spec.save(request.out)
    return spec


def _count(spec: ScoringSpec, reporter: Reporter) -> int:
    """Count the records: that makes the time left known, and how many may be bad."""
    reporter.progress("count", 0, 0)
    return open_stream(spec.data).count()


def _score(
    request: CurationRequest, spec: ScoringSpec, settings: Settings, view: ProgressView, rank: int, world: int
) -> None:
    features = request.rule.method == "cluster"
    shards = shards_of(request.out, spec)
    if _is_scored(request, shards) and not (features and not _has_features(shards)):
        return
    try:
        if request.processes > 1 and world == 1:
            _launch(request, spec, settings, view, features=features)
            return
        run = scoring_run(
            request.out,
            spec,
            view.reporter(STEP if world == 1 else f"{STEP} {rank}"),
            rank=rank,
            world=world,
            sequential=request.sequential,
            max_bad=spec.max_bad,
        )
        run.run()
        if features:
            run.run_features()
    except NvilaError:
        from nvila.curation.merging import write_quarantine

        if rank == 0 and shards.directory.is_dir():
            write_quarantine(shards, request.out)
        raise


def _is_scored(request: CurationRequest, shards: Shards) -> bool:
    """Whether every record has been scored; the shards themselves are no longer needed once they are merged."""
    from nvila.curation.merging import merged_already

    return shards.finished() is not None or merged_already(shards.digest, request.out, request.normalize) is not None


def _has_features(shards: Shards) -> bool:
    numbers = shards.finished()
    return numbers is not None and all(shards.path(number, "features").exists() for number in numbers)


def _launch(
    request: CurationRequest, spec: ScoringSpec, settings: Settings, view: ProgressView, *, features: bool
) -> None:
    """Score in several processes of this machine and draw what they report."""
    scratch = request.out / _SCRATCH
    scratch.mkdir(exist_ok=True)
    events, order = scratch / "events.jsonl", scratch / "order.json"
    values = {"out": str(request.out), "events": str(events), "features": features}
    values |= {"sequential": request.sequential, "max_bad": spec.max_bad}
    order.write_text(json.dumps(values), encoding="utf-8")
    run_watched(
        "nvila_pipelines.curation.scoring_process",
        order,
        events=events,
        processes=request.processes,
        threads=spec.threads,
        settings=settings,
        view=view,
    )


def _wait(request: CurationRequest, shards: Shards, reporter: Reporter) -> None:
    """Wait for the shards of other ranks; torchrun ends this process when one of them fails."""

    def is_complete() -> bool:
        scored = _is_scored(request, shards)
        return scored and (request.rule.method != "cluster" or _has_features(shards))

    if not is_complete():
        reporter.notice("waiting for the other processes")
    while not is_complete():
        time.sleep(_WAIT_S)


def _merge(request: CurationRequest, spec: ScoringSpec, shards: Shards, reporter: Reporter) -> Merged:
    from nvila.curation.merging import merge, merged_already
    from nvila.curation.problems import OK, check_share

    _sweep(request.out)
    if shards.finished() is not None:
        shards.tidy()
    merged = merged_already(shards.digest, request.out, request.normalize)
    if merged is None:
        reporter.progress("merge", 0, 0)
        merged = merge(shards, request.out, request.normalize)
    bad = {status: count for status, count in merged.statuses.items() if status != OK}
    check_share(bad, merged.total, spec.max_bad, merged.first_bad)
    return merged


def _sweep(out: Path) -> None:
    """Remove what a killed run was writing; whatever is left counts under another name."""
    from nvila_pipelines.report.curation_report import PLOTS

    for path in [*out.glob(".*.tmp"), *out.glob(f"{PLOTS}/.*")]:
        path.unlink()
    for folder in out.glob(".duckdb-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _choose(request: CurationRequest, shards: Shards, reporter: Reporter) -> dict[str, SourceCount]:
    from nvila.curation.choosing import choose, write_selection

    (request.out / MANIFEST_NAME).unlink(missing_ok=True)
    if request.rule.method == "cluster":
        from nvila.curation.clusters import write_clusters

        reporter.progress("cluster", 0, 0)
        write_clusters(shards, request.out, num_clusters=request.num_clusters, seed=request.rule.seed)
    reporter.progress("select", 0, 0)
    return write_selection(request.out, choose(request.out, request.rule))


@contextmanager
def _alone(out: Path, view: ProgressView, *, needed: bool) -> Iterator[None]:
    """Keep a second command out of the directory until this one has ended."""
    from nvila_platform.store import file_lock

    if not needed:
        yield
        return
    with file_lock(out / _SCRATCH / "lock", f"{STEP} {out.name}", view.reporter(STEP)):
        yield


__all__ = ["CurationRequest", "CurationResult", "curate", "preview"]
