"""`nvila curate`: a data set of one's own, or the step of a recipe."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import add_recipe_arguments, prepare_workspace, share, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.curation.choosing import Rule
    from nvila_pipelines.curation.request import CurationRequest, CurationResult
    from nvila_pipelines.curation.spec import DataSpec

SUMMARY = "choose what is worth training on (DeltaLoss)"
EPILOG = """\
examples:
  nvila curate llava.jsonl --small tiny/ --large models:/nvila@champion --out curated
                                     score every answer under both models, keep half of every source
  nvila curate --out curated --keep-rate 0.3 --keep-rate chart=0.8
                                     choose again from the same scores; nothing is scored
  nvila curate --out curated --keep-rate 0.1 --dry-run
                                     show what that would keep, write nothing
  nvila curate s3://data/shards/ --small A --large B --out curated --processes 4 --dtype bf16
  nvila curate /data/x.jsonl --small A --large B --out /out/x --nodes 4 --gpus 8 --image IMG:TAG --claim data=/data \\
      --claim out=/out --submit
  nvila curate fast seed=1           the curation step of a recipe, with scorers trained on the fly

outputs in DIR:
  scores.parquet     id, source, nll_small, nll_large, delta, num_answer_tokens, status of every record
  selection.parquet  id, source, delta, kept
  ignore/            for other trainers: per source, the positions of what is not kept
  quarantine.jsonl   every record without a score: where it is, and why
  report.html        histograms, scatter and examples; needs no network
  manifest.json      digests of all of this, and what it was made of
"""
_SOURCE_LETTERS = 48
_WHERE = ("out", "media_dir", "mixtures", "max_bad")
_SCORING = ("small", "large", "dtype", "device", "sequential", "processes", "threads", "shard_size", "batch_tokens")
_CLUSTER = ("image", "gpus", "cpu", "memory", "claim", "namespace", "job_name", "submit")
_CHOOSING = ("normalize", "keep_rate", "min_delta", "max_delta", "method", "seed", "clusters", "dry_run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.usage = (
        "%(prog)s DATA --small MODEL --large MODEL --out DIR [options]\n"
        "       %(prog)s --out DIR [--keep-rate R] [options]       choose again\n"
        "       %(prog)s [RECIPE] [KEY=VALUE ...] [options]        the step of a recipe"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    words = next(action for action in parser._actions if action.dest == "words")
    words.metavar, words.help = (
        "DATA",
        "file, folder, s3:// address or mixture (a + b*2); or a recipe and changes",
    )
    # No defaults here: what was not given must be told from what was, since each use of the verb has its own options.
    data = parser.add_argument_group("data")
    data.add_argument("--out", type=Path, metavar="DIR", help="folder of everything that is made")
    data.add_argument("--media-dir", metavar="DIR", help="folder that the paths of images and videos start from")
    data.add_argument("--mixtures", metavar="FILE", help="YAML file that names data sets; DATA is then names: a + b")
    data.add_argument("--max-bad", type=share, metavar="SHARE", help="stop when more cannot be scored (default: 10%%)")
    score = parser.add_argument_group("scoring")
    for name in ("small", "large"):
        score.add_argument(
            f"--{name}", metavar="MODEL", help=f"the {name} model: a folder, models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    score.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights (default: fp32)")
    score.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where models run (default: a GPU if any)")
    score.add_argument(
        "--sequential", action="store_true", default=None, help="one model in memory at a time; reads the data twice"
    )
    score.add_argument("--processes", type=whole_number, metavar="N", help="local processes (default: 1)")
    score.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads of a process (default: its share of cores)"
    )
    score.add_argument(
        "--shard-size", type=whole_number, metavar="N", help="records that appear together (default: 4096)"
    )
    score.add_argument("--batch-tokens", type=whole_number, metavar="N", help="positions of a batch (default: 8192)")
    choice = parser.add_argument_group("choosing")
    choice.add_argument(
        "--keep-rate",
        action="append",
        metavar="[SOURCE=]R",
        help="share of every source to keep (default: 0.5), or of one; may be repeated",
    )
    choice.add_argument("--normalize", choices=("none", "token"), help="token divides likelihoods by their tokens")
    choice.add_argument("--min-delta", type=_number, metavar="D", help="keep nothing below")
    choice.add_argument("--max-delta", type=_number, metavar="D", help="keep nothing above; the next takes its place")
    choice.add_argument(
        "--method",
        choices=("deltaloss", "random", "cluster"),
        help="by delta (default), or a baseline: at random, or the same share of every cluster of like images",
    )
    choice.add_argument("--seed", type=int, metavar="N", help="of random and cluster (default: 0)")
    choice.add_argument("--clusters", type=whole_number, metavar="N", help="of the method cluster (default: by size)")
    choice.add_argument(
        "--dry-run", action="store_true", default=None, help="show what saved scores would keep, write nothing"
    )
    _add_cluster(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group(
        "cluster", "With --nodes, print the manifest of a Kubeflow TrainJob, or --submit it."
    )
    cluster.add_argument(
        "--nodes", type=whole_number, metavar="N", help="nodes of the job; DIR must be on a shared volume"
    )
    cluster.add_argument("--image", help="container image with nvila")
    cluster.add_argument(
        "--gpus", type=whole_number, metavar="N", help="GPUs and processes of a node (default: one CPU process)"
    )
    cluster.add_argument("--cpu", metavar="N", help="cores of a node")
    cluster.add_argument("--memory", metavar="SIZE", help="memory of a node: 64Gi")
    cluster.add_argument(
        "--claim", action="append", metavar="NAME=PATH", help="mount a persistent volume claim; may be repeated"
    )
    cluster.add_argument("--namespace", help="where the job runs")
    cluster.add_argument("--job-name", metavar="NAME", help="default: curate-DIR")
    cluster.add_argument(
        "--submit", action="store_true", default=None, help="create the job in the cluster of the kubeconfig"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.out is not None and re.match(r"[a-z][a-z0-9+.-]*:/", str(args.out)):
        raise ConfigError(f"--out {args.out} is no folder", "write into a folder, then copy it to where it shall be")
    if args.method in (None, "deltaloss"):
        _refuse(args, ("seed", "clusters"), "changes nothing without a baseline", "add --method random or cluster")
    if args.method == "random":
        _refuse(args, ("clusters",), "is of --method cluster", "leave one of them out")
    if args.nodes is None:
        _refuse(args, _CLUSTER, "is about a job of a cluster", "say how many nodes with --nodes")
    else:
        return _cluster_job(args, settings)
    if not _given(args, (*_WHERE, *_SCORING)):
        _refuse(args, _CHOOSING, "is about a data set, but no folder is named", "name one with --out")
        return run_to("curate", args, settings)
    if args.fast:
        raise ConfigError("--fast is a recipe, but a data set is meant", "leave it out")
    if args.out is None:
        raise ConfigError("there is no folder to write to", "name one with --out")
    out = args.out.absolute()
    if args.dry_run:
        _refuse(args, (*_SCORING, "media_dir", "mixtures"), "scores, --dry-run does not", "leave one of them out")
        _refuse(args, ("max_bad",), "was decided when the data was scored", "leave it out")
        if args.words:
            raise ConfigError(f"--dry-run chooses from saved scores, not from {args.words[0]}", "leave the data out")
        from nvila_pipelines.curation.dataset_run import preview

        show(preview(out, _rule(args), args.normalize or "none", args.clusters), as_json=args.json)
        return 0
    request = _request(args, out, settings)
    prepare_workspace(settings)
    from nvila_pipelines.curation.dataset_run import curate
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        result = curate(request, settings, view=view)
    if result is not None:
        show(result, as_json=args.json)
    return 0


def _cluster_job(args: argparse.Namespace, settings: Settings) -> int:
    """Print the manifest of the job that runs this command on several nodes, or create it."""
    from nvila_pipelines.curation.cluster_job import curation_job

    missing = [name for name in ("words", "small", "large", "out", "image") if not getattr(args, name)]
    if missing:
        what = "a data set" if missing[0] == "words" else f"--{missing[0]}"
        raise ConfigError(
            f"a job needs {what}", "nvila curate DATA --small A --large B --out DIR --nodes N --image IMG"
        )
    _refuse(args, ("dry_run", "processes"), "is for one machine, --nodes for several", "leave one of them out")
    _rule(args)
    manifest = curation_job(args, settings)
    if args.submit:
        from nvila_platform.cluster.client import ClusterClient

        job = ClusterClient().submit(manifest)
        if args.json:
            emit_json({"job": job.name, "namespace": job.namespace, "state": job.state})
        else:
            emit(f"job {job.name} is created; follow it: kubectl get trainjob {job.name} -n {job.namespace} -w")
    elif args.json:
        emit_json(manifest)
    else:
        import yaml

        emit(yaml.safe_dump(manifest, sort_keys=False).rstrip())
    return 0


def show(result: CurationResult, *, as_json: bool) -> None:
    """Print what every source has and what is kept of it."""
    if as_json:
        emit_json(result.to_dict())
        return
    from nvila_pipelines.report.formats import shortened

    rows = [("source", "records", "scored", "kept", "from delta")]
    for source, count in result.sources.items():
        boundary = "-" if count.boundary is None else f"{count.boundary:+.3f}"
        rows.append(
            (shortened(source, _SOURCE_LETTERS), f"{count.records:,}", f"{count.scored:,}", f"{count.kept:,}", boundary)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        padded = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        emit(f"  {name:<{widths[0]}}  {padded}")
    bad = {status: count for status, count in result.statuses.items() if status != "ok"}
    kinds = f" ({', '.join(f'{count:,} {status}' for status, count in sorted(bad.items()))})" if bad else ""
    emit(f"kept {result.kept:,} of {result.records:,} records; {sum(bad.values()):,} have no score{kinds}")
    if result.report is not None:
        emit(f"report: {result.report}")


def _request(args: argparse.Namespace, out: Path, settings: Settings) -> CurationRequest:
    from nvila_pipelines.curation.request import CurationRequest

    data, rule = _data(args), _rule(args)
    models: dict[str, Any] = {}
    if data is None:
        _refuse(args, (*_SCORING, "media_dir", "mixtures"), "scores, but no data set is named", "name it first")
    else:
        from nvila_pipelines.cli.serve import find_model

        for name in ("small", "large"):
            if getattr(args, name) is None:
                raise ConfigError(f"there is no {name} model to score {data.data} with", f"name one with --{name}")
            models[name] = find_model(getattr(args, name), settings).directory
    names = (*_SCORING[2:], "normalize", "max_bad")
    options: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    return CurationRequest(out=out, rule=rule, data=data, num_clusters=args.clusters, **models, **options)


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str, fix: str) -> None:
    if given := _given(args, names):
        raise ConfigError(f"{given[0]} {why}", fix)


def _data(args: argparse.Namespace) -> DataSpec | None:
    from nvila_pipelines.curation.spec import DataSpec

    if len(args.words) > 1:
        raise ConfigError(f"two data sets are named: {args.words[0]} and {args.words[1]}", "write them as one: a + b")
    if not args.words:
        return None
    return DataSpec(
        data=_lasting(args.words[0]),
        mixtures=_lasting(args.mixtures) if args.mixtures is not None else None,
        media_dir=_lasting(args.media_dir) if args.media_dir is not None else None,
    )


def _lasting(place: str) -> str:
    """Return a local path as one that means the same in another folder; names and addresses stay."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def _rule(args: argparse.Namespace) -> Rule:
    from nvila.curation.choosing import Rule

    rates: dict[str, float] = {}
    everywhere = 0.5
    for text in args.keep_rate or ():
        source, separator, value = text.rpartition("=")
        try:
            rate = share(value)
        except argparse.ArgumentTypeError as e:
            raise ConfigError(f"--keep-rate {text!r}: {e}", "write 0.5, 50% or chart=0.8") from e
        if separator:
            rates[source] = rate
        else:
            everywhere = rate
    return Rule(
        keep_rate=everywhere,
        rates=rates,
        method=args.method or "deltaloss",
        min_delta=args.min_delta,
        max_delta=args.max_delta,
        seed=args.seed or 0,
    )


def _number(text: str) -> float:
    """Return a number that is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value
