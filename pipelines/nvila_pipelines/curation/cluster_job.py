"""`nvila curate` as a job of a cluster: the same command, run under torchrun on every node."""

from __future__ import annotations

import argparse
import re
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.cluster.trainjob import TrainJobSpec, train_job
from nvila_platform.settings import Settings

# What a job of its own must be told; where the workspace is, its nodes know themselves.
_SETTINGS = (
    "NVILA_TRACKING_URI",
    "NVILA_EXPERIMENT",
    "NVILA_STORE_URI",
    "NVILA_S3_ENDPOINT",
    "NVILA_S3_SECURE",
    "NVILA_METRICS_ADDRESS",
)
# Options that the command in the job gets as they were given here.
_PASSED = (
    "small",
    "large",
    "out",
    "media_dir",
    "mixtures",
    "max_bad",
    "dtype",
    "device",
    "threads",
    "shard_size",
    "batch_tokens",
    "normalize",
    "min_delta",
    "max_delta",
    "method",
    "seed",
    "clusters",
)


def curation_job(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Return the manifest of a TrainJob that runs a command line of `nvila curate`.

    Args:
        args: The parsed command line; paths in it are those of the nodes.
        settings: Addresses of services, as far as the nodes can reach them.

    Raises:
        ConfigError: A value cannot be used.
    """
    gpus = args.gpus or 0
    return train_job(
        TrainJobSpec(
            name=args.job_name or _job_name(args.out.name),
            image=args.image,
            command=command_line(args),
            num_nodes=args.nodes,
            processes_per_node=gpus or 1,
            gpus=gpus,
            cpu=args.cpu,
            memory=args.memory,
            env=_environment(settings),
            claims=dict(_claim(text) for text in args.claim or ()),
            namespace=args.namespace,
        )
    )


def command_line(args: argparse.Namespace) -> list[str]:
    """Return the words that say the same to the nodes; progress is written as JSON lines there."""
    words = ["nvila", "curate", *args.words]
    for name in _PASSED:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for rate in args.keep_rate or ():
        words += ["--keep-rate", rate]
    if args.sequential:
        words.append("--sequential")
    return [*words, "--log-format", "json"]


def _environment(settings: Settings) -> dict[str, str]:
    """Return the addresses that mean the same on another machine."""
    values = settings.to_env()
    return {
        name: value
        for name in _SETTINGS
        if (value := values[name])
        and not value.startswith(("sqlite:", "/", "file:", "127.0.0.1:"))
        # Meaningless without the address that it belongs to.
        and (name != "NVILA_S3_SECURE" or values["NVILA_S3_ENDPOINT"])
    }


def _claim(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator:
        raise ConfigError(f"--claim {text!r} names no path", "write NAME=/path/in/the/container")
    return name, path


def _job_name(folder: str) -> str:
    return f"curate-{re.sub('[^a-z0-9]+', '-', folder.lower())}".strip("-")[:63].rstrip("-")
