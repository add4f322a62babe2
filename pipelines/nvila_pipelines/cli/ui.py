"""`nvila ui`."""

from __future__ import annotations

import argparse

from nvila.errors import InfrastructureError
from nvila_pipelines.cli.options import port_number, prepare_workspace
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

SUMMARY = "open MLflow on the workspace: runs, metrics, registered models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s [options]"
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=5000, help="0 takes a free one (default: %(default)s)")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    prepare_workspace(settings)
    from nvila_platform.mlflow_ui import start_ui

    with start_ui(settings, args.host, args.port) as server:
        if args.json:
            emit_json({"url": server.url})
        else:
            emit(f"MLflow shows {settings.workspace} at {server.url}; Ctrl-C stops it")
        status = server.wait()
    if status:
        raise InfrastructureError(f"MLflow's server ended with exit status {status}", f"its log is {server.log_path}")
    return 0
