"""The `nvila` command: one module a verb, each with `add_arguments` and `run`."""

from nvila_pipelines.cli.app import build_parser, main

__all__ = ["build_parser", "main"]
