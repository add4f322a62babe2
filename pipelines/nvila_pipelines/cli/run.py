"""`nvila run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, GateError
from nvila_pipelines.cli.failures import report
from nvila_pipelines.cli.options import add_recipe_arguments, port_number, prepare_workspace, recipe_of
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.recipe import Recipe

SUMMARY = "run the whole lifecycle: data, curate, train, quantize, evaluate, gate, register, serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--serve", action="store_true", help="leave the endpoint of the registered model up at the end")
    parser.add_argument("--port", type=port_number, help="port of that endpoint (default: 8080; 0: a free one)")
    parser.add_argument("--dry-run", action="store_true", help="show the resolved recipe and the steps, run nothing")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    recipe = recipe_of(args)
    if args.port is not None and not args.serve:
        raise ConfigError("--port is the port of --serve, which is not given", "add --serve")
    if args.dry_run:
        return _show(recipe, args, settings)
    prepare_workspace(settings)
    if args.serve:
        _check_port(args)
    summary = _lifecycle(recipe, args, settings)
    if not summary["passed"]:
        # Reported, not raised: for machines the summary stays the last line of standard output.
        error = GateError("the gate refused the model, nothing was registered", f"see why in {summary['report']}")
        report(error)
        return error.exit_code
    if args.serve:
        from nvila_pipelines.cli.serve import serve_model

        serve_model(str(summary["model"]), settings, port=_port(args), quiet=args.json)
    return 0


def _lifecycle(recipe: Recipe, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from nvila_pipelines.lifecycle import run_lifecycle
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        summary = run_lifecycle(recipe, settings, view=view).to_dict()
    if args.json:
        emit_json(summary)
    else:
        from rich.console import Console

        from nvila_pipelines.report.terminal import render_summary

        render_summary(summary, Console())
    return summary


def _port(args: argparse.Namespace) -> int:
    from nvila_platform.serving.server import DEFAULT_PORT

    return DEFAULT_PORT if args.port is None else int(args.port)


def _check_port(args: argparse.Namespace) -> None:
    """Refuse a port in use now rather than after minutes of work."""
    from nvila_platform.serving.server import DEFAULT_HOST, bind

    bind(DEFAULT_HOST, _port(args)).close()


def _show(recipe: Recipe, args: argparse.Namespace, settings: Settings) -> int:
    from nvila_pipelines.lifecycle import plan

    steps = plan(recipe, settings)
    if args.json:
        rows = [{"name": step.name, "key": step.key, "finished": step.finished} for step in steps]
        emit_json({"recipe": recipe.to_dict(), "steps": rows})
        return 0
    emit(recipe.to_yaml())
    width = max(len(step.name) for step in steps)
    for step in steps:
        state = "finished" if step.finished else "to run"
        emit(f"# {step.name:<{width}}  {(step.key or 'key unknown yet')[:16]:<16}  {state}")
    return 0
