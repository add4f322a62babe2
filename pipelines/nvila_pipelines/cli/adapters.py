"""`nvila adapters`: what an adapter is, and merging it into its base."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvila.errors import ConfigError
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

SUMMARY = "show an adapter, or merge it into its base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s show ADAPTER\n       %(prog)s merge ADAPTER DIR [--base DIR]"
    parser.add_argument("action", choices=("show", "merge"), help="what to do")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, or models:/NAME@ALIAS")
    parser.add_argument("out", nargs="?", type=Path, metavar="DIR", help="new folder of the whole model, for merge")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the base is now")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila.tuning.adapters import AdapterRecord, checked_base, is_adapter
    from nvila_pipelines.cli.serve import find_model
    from nvila_pipelines.cli.tune import quiet_libraries

    folder = find_model(args.adapter, settings).directory
    if not is_adapter(folder):
        raise ConfigError(f"{folder} is no adapter", "it is a whole model already")
    record = AdapterRecord.read(folder)
    if args.action == "show":
        facts = {"method": record.method.name, "rank": record.method.rank, "base": record.base}
        facts |= {"base_digest": record.base_digest, "path": str(folder)}
        if args.json:
            emit_json(facts)
        else:
            for name, value in facts.items():
                emit(f"{name:<12} {value}")
        return 0
    if args.out is None:
        raise ConfigError("merge needs a folder to write to", "nvila adapters merge ADAPTER DIR")
    if args.out.exists():
        raise ConfigError(f"{args.out} exists", "name a new folder")
    checked_base(folder, record, args.base)
    quiet_libraries()
    from nvila.tuning.adapters import load_adapter
    from nvila.tuning.run import save_merged

    model, processor = load_adapter(folder, args.base)
    save_merged(model, processor, args.out)
    if args.json:
        emit_json({"path": str(args.out.absolute())})
    else:
        emit(f"merged: {args.out.absolute()}")
    return 0
