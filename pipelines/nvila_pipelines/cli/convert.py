"""`nvila convert`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

SUMMARY = "convert a checkpoint between our layout, the original one and the flat one"

# As nvila.checkpoints.LAYOUTS, which the help does without: importing that package imports more.
_LAYOUTS = ("nvila", "vila", "hf")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s SRC DST --to LAYOUT [options]"
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a checkpoint; its layout is recognised")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--to",
        choices=_LAYOUTS,
        required=True,
        help="nvila: ours, for transformers; vila: the original with a folder for each part; hf: flat, original names",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="spread weights over files of this size (default: %(default)s)",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila.checkpoints import convert
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        done = convert(
            args.source,
            args.target,
            args.to,
            max_shard_bytes=args.max_shard_size,
            reporter=view.reporter("convert"),
        )
    if args.json:
        emit_json(done.to_dict())
    else:
        emit(f"{done.path}: layout {done.layout}, from {done.source_layout}")
        emit(f"  {done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB in {done.num_files} files")
        if done.added_tokens:
            emit(f"  added to the tokenizer: {' '.join(done.added_tokens)}")
    return 0


def _size(text: str) -> int:
    """Return a number of bytes; for `type=` of an argument."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = match[2].removesuffix("B") if match else ""
    size = int(float(match[1]) * _UNITS[f"{unit}B" if unit else ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, use one such as 500MB or 5GB")
    return size
