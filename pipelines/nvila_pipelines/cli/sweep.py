"""`nvila sweep`: what a model scores and costs at every way to run it, on one's own data."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import prepare_workspace, share, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.evaluation.sweep_request import SweepRequest, SweptData, SweptModel

SUMMARY = "measure accuracy, tokens, time and memory over tilings, pooling, frames and quantization on your data"
EPILOG = """\
DATA is a file, folder or mixture of questions about images or videos with their answers, or the name or YAML file of a
task. Every combination is a point; a finished point is kept, so the same command goes on after an interruption. What a
model cannot do, such as another projector, is listed with the reason: add a model that was trained so with --with.

examples:
  nvila sweep MODEL my-data/                                 what is usual for the model
  nvila sweep MODEL mine.jsonl --tilings resize,dynamic:4,dynamic:12 --forms stored,int8 --loss 0.5
  nvila sweep MODEL clips.jsonl --frames 8,16,32 --pools 1,4 --cost tokens
  nvila sweep MODEL chartqa --data /data/chartqa --limit 500
  nvila sweep 2x2-MODEL my-data/ --with 3x3-MODEL            several models beside each other

outputs in DIR:
  sweep.html   every point, the Pareto fronts and the recommended point
  sweep.json   the same for machines
  points/, answers/   what is measured and answered
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL DATA [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(WORDS, nargs="*", metavar="MODEL DATA", help="model folder or models:/NAME@ALIAS; and the data")
    tried = parser.add_argument_group("what is tried", "Lists with commas.")
    tried.add_argument(
        "--with", action="append", dest="others", metavar="MODEL", help="another model beside it; may be repeated"
    )
    tried.add_argument(
        "--tilings",
        metavar="LIST",
        help="resize, pad, dynamic:TILES, dynamic_s2:TILES (default: what it can do)",
    )
    tried.add_argument("--frames", metavar="LIST", help="frames of a video (default: half to four times the model's)")
    tried.add_argument("--pools", metavar="LIST", help="frames averaged, 4, or cells too, 4x2x2 (default: own, 1, 4)")
    tried.add_argument(
        "--forms", metavar="LIST", help="stored, int8, fp8, w8a8, w4a16, w8a8+w4a16 (default: stored,int8,w8a8+w4a16)"
    )
    said = parser.add_argument_group("what is recommended")
    said.add_argument("--loss", type=_points, metavar="POINTS", default=1.0, help="below the best (default: 1.0)")
    said.add_argument(
        "--cost", choices=("ttft", "tokens", "memory"), default="ttft", help="what is to be low (default: ttft)"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PLACE", help="where the data of a task is: folder, file, address or hub")
    data.add_argument("--media-dir", metavar="DIR", help="folder that the paths of images and videos start from")
    data.add_argument("--scorer", metavar="NAME", help="of data that is no task (default: exact_match)")
    data.add_argument("--max-new-tokens", type=whole_number, metavar="N", help="of an answer, likewise (default: 32)")
    data.add_argument("--limit", type=whole_number, metavar="N", help="only the first N samples")
    data.add_argument("--max-failed", type=share, metavar="SHARE", help="samples without a score (default: 10%%)")
    running = parser.add_argument_group("running")
    running.add_argument("--probes", type=whole_number, metavar="N", help="samples to measure costs on (default: 8)")
    running.add_argument("--batch-size", type=whole_number, metavar="N", help="questions asked together (default: 32)")
    running.add_argument("--threads", type=whole_number, metavar="N", help="threads (default: all cores)")
    running.add_argument("--dtype", choices=("fp32", "bf16"), help="type of wide weights (default: fp32)")
    running.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where models run (default: a GPU if any)")
    running.add_argument("--seed", type=int, metavar="N", help="of resampled intervals (default: 0)")
    running.add_argument("--out", type=Path, metavar="DIR", help="default: WORKSPACE/evaluations/sweeps/MODEL-DATA")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.evaluation.sweep import sweep_points
    from nvila_pipelines.evaluation.sweep_result import (
        judge_sweep,
        other_lines,
        sentence,
        table_lines,
        to_dict,
        write_sweep,
    )
    from nvila_platform.telemetry import ProgressView

    if len(args.words) != 2:
        raise ConfigError(f"{len(args.words)} words are given, a sweep needs two", "nvila sweep MODEL DATA")
    prepare_workspace(settings)
    request = request_of(args, settings)
    with ProgressView(format=settings.log_format) as view:
        result = judge_sweep(sweep_points(request, view.reporter("sweep")), request)
        page = write_sweep(result, request, settings)
    if args.json:
        emit_json(to_dict(result, request) | {"page": str(page)})
        return 0
    for line in [*table_lines(result, request), "", sentence(result, request), *other_lines(result)]:
        emit(line)
    emit(f"page: {page}")
    return 0


def request_of(args: argparse.Namespace, settings: Settings) -> SweepRequest:
    """Return what the arguments ask for.

    Raises:
        ConfigError: A model, the data or an option is wrong.
    """
    from nvila.evaluation.sweep.points import Choices, parse_pool
    from nvila_pipelines.cli.evaluation_options import device_of
    from nvila_pipelines.evaluation.sweep_request import SweepRequest

    model, data = args.words
    models = tuple(_model(word, settings) for word in (model, *(args.others or ())))
    if twice := sorted({one.digest for one in models if [m.digest for m in models].count(one.digest) > 1}):
        raise ConfigError(f"the same model is named twice ({twice[0][:12]})", "leave one of them out")
    swept = _data(data, args, settings)
    choices = Choices(
        tilings=_listed(args.tilings, str, "--tilings"),
        pools=_listed(args.pools, parse_pool, "--pools"),
        frames=_listed(args.frames, _frames, "--frames"),
        forms=_listed(args.forms, str, "--forms"),
    )
    folder = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{models[0].name}-{Path(data).stem or swept.task.name}")
    out = args.out or settings.workspace / "evaluations" / "sweeps" / folder
    names = ("limit", "probes", "batch_size", "dtype", "seed", "max_failed")
    known: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    return SweepRequest(
        models=models,
        data=swept,
        choices=choices,
        out=out.absolute(),
        loss=args.loss / 100,
        cost=args.cost,
        threads=args.threads or os.cpu_count() or 1,
        device=device_of(args.device or "auto"),
        **known,
    )


def _model(word: str, settings: Settings) -> SweptModel:
    from nvila_pipelines.cli.evaluation_options import model_of
    from nvila_pipelines.evaluation.sweep_request import SweptModel

    if word.startswith(("http://", "https://")):
        raise ConfigError(f"{word} is an endpoint", "a sweep changes how a model runs; name the model's folder")
    folder, name, digest = model_of(word, settings)
    return SweptModel(folder=folder, name=name, digest=digest)


def _data(word: str, args: argparse.Namespace, settings: Settings) -> SweptData:
    """Return the data as a task: one that is named, or questions and answers of one's own."""
    from nvila.evaluation.registry import SUFFIX, find_task, task_files
    from nvila.evaluation.rows import open_rows, stream_rows
    from nvila_pipelines.curation.spec import DataSpec, data_digest, open_stream
    from nvila_pipelines.evaluation.sweep_request import SweptData, own_data_task
    from nvila_platform.s3_filesystem import data_filesystems

    is_task = word.partition("@")[0] in task_files() or word.endswith(SUFFIX)
    wrong = ("media_dir", "scorer", "max_new_tokens") if is_task else ("data",)
    for name in wrong:
        if getattr(args, name) is not None:
            what = "data that is no task" if is_task else f"a task, and there is none '{word}'"
            raise ConfigError(f"--{name.replace('_', '-')} is about {what}", "leave it out")
    if is_task:
        task = find_task(word)
        rows = open_rows(task, args.data, filesystems=data_filesystems(settings))
        local = args.data is not None and Path(args.data).exists()
        return SweptData(task=task, rows=rows, digest=data_digest(DataSpec(data=args.data)) if local else rows.name)
    spec = DataSpec(data=word, media_dir=args.media_dir)
    name = re.sub(r"[^A-Za-z0-9_]+", "_", Path(word).stem) or "data"
    task = own_data_task(name, args.scorer or "exact_match", args.max_new_tokens or 32)
    return SweptData(task=task, rows=stream_rows(open_stream(spec), word), digest=data_digest(spec))


def _listed(text: str | None, read: Callable[[str], Any], option: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} is empty", "name values with commas between them, or leave it out")
    return tuple(read(word) for word in words)


def _frames(text: str) -> int:
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f"--frames: {e}", "write numbers of frames: 8,32") from e


def _points(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of points, write 0.5")
    return value
