"""`nvila plan`: which way of tuning fits."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from nvila.errors import ResourceError
from nvila_pipelines.cli.options import prepare_workspace
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.tune import add_model_and_data, method_of, quiet_libraries, request_of
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.tuning.planner import Option

SUMMARY = "say which way of tuning fits into memory, and how long a step takes"
EPILOG = """\
examples:
  nvila plan MODEL my-data/ --memory 24GiB          all methods side by side
  nvila plan MODEL my-data/ --method ln+qlora       one method on this machine

No weights are read: a step runs on tensors without data, and what lives at its peak is counted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL DATA [--memory AMOUNT] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_model_and_data(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    own = any(getattr(args, name) is not None for name in ("method", "vision", "projector", "language"))
    method_of(args)
    prepare_workspace(settings)
    request = request_of(args, settings)
    from nvila.tuning.planner import pick
    from nvila_pipelines.tuning.preparing import open_planner, read
    from nvila_platform.telemetry import ProgressView

    quiet_libraries()
    with ProgressView(format=settings.log_format) as view:
        reporter = view.reporter("plan")
        planner = open_planner(request, read(request, settings, reporter))
        options = [planner.best(request.method)] if own else planner.compare(reporter=reporter)
    chosen = pick(options)
    if args.json:
        emit_json(
            {
                "available": planner.available,
                "options": [option.to_dict() for option in options],
                "picked": None if chosen is None else chosen.to_dict(),
            }
        )
    else:
        for line in lines(options, chosen):
            emit(line)
    if chosen is None:
        least = min(options, key=lambda option: option.step.peak)
        from nvila.tuning.planner import size_text

        raise ResourceError(
            f"nothing fits into {size_text(planner.available)}: {least.method.name} needs the least, "
            f"{size_text(least.step.peak)}",
            "use a smaller --max-length, a smaller model, or more --memory",
        )
    if not args.json:
        emit(f"\nnvila tune {shlex.quote(args.model)} {shlex.quote(args.data)} --method {chosen.method.name}")
    return 0


def lines(options: list[Option], chosen: Option | None) -> list[str]:
    """Return the table of options, the chosen one marked."""
    from nvila.tuning.planner import size_text

    head = ("", "method", "peak", "weights", "grads+moments", "activations", "micro-batch", "recompute", "s/step", "")
    rows = [head]
    for option in options:
        step = option.step
        rows.append(
            (
                ">" if option is chosen else "",
                option.method.name,
                size_text(step.peak),
                size_text(step.weights),
                size_text(step.gradients + step.moments),
                size_text(step.activations),
                f"{option.micro_batch_tokens:,}",
                "yes" if option.checkpointing else "no",
                f"{option.seconds:.3g}",
                "fits" if option.fits else option.why,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    last = len(head) - 1
    return [
        "  ".join(
            cell.ljust(width) if column < 2 or column == last else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
