"""What a server is told beside its limits: who may ask, where media may come from, how it ends."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

from nvila.errors import ConfigError
from nvila_platform.drift.reference import Reference
from nvila_platform.serving.addresses import HostRules, rules
from nvila_platform.serving.auth import AccessRules
from nvila_platform.serving.tracing import check_endpoint
from nvila_platform.serving.updates import UpdateOptions

DRIFT_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of one server.

    Args:
        access: Who may ask, and how often.
        hosts: Hosts that media are fetched from.
        media_store: Folder or `s3://bucket/prefix` that `store:PATH` is looked up in; empty for none.
        production: No playground, and nobody is let in without a key or a proxy's word.
        drain_s: Seconds between the stop signal, when readiness drops, and the closing of the port.
        drift: What traffic is compared with; None watches nothing.
        drift_share: Share of the requests that are looked at.
        otlp_endpoint: Collector that traces are sent to; empty sends none.

    Raises:
        ConfigError: They do not go together.
    """

    access: AccessRules = field(default_factory=AccessRules)
    hosts: HostRules = field(default_factory=HostRules)
    media_store: str = ""
    production: bool = False
    drain_s: float = 0.0
    drift: Reference | None = None
    drift_share: float = DRIFT_SHARE
    otlp_endpoint: str = ""

    def __post_init__(self) -> None:
        check_endpoint(self.otlp_endpoint)
        if self.production and not self.access.closed:
            raise ConfigError(
                "a server in production lets nobody in without a key", "give --api-keys or --trusted-header"
            )
        if not 0 <= self.drain_s < math.inf:
            raise ConfigError(f"the drain time is {self.drain_s}", "give seconds, 0 or more")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a command line."""
    add_model_arguments(parser)
    group = parser.add_argument_group("who may ask, and where media may come from")
    group.add_argument("--api-keys", type=Path, metavar="FILE", help="lines of NAME SHA256 [REQUESTS_PER_MINUTE]")
    group.add_argument("--trusted-header", metavar="NAME", help="header in which a checking proxy names the caller")
    group.add_argument("--rate-limit", type=float, metavar="N", help="requests a minute of one caller")
    group.add_argument(
        "--media-host", action="append", default=[], metavar="HOST", help="host that media are fetched from by https"
    )
    group.add_argument(
        "--media-network", action="append", default=[], metavar="CIDR", help="private network such a host may be in"
    )
    group.add_argument("--media-store", default="", metavar="URI", help="folder or s3:// prefix behind store:PATH")
    group.add_argument("--production", action="store_true", help="no playground; keys or a trusted header needed")
    group.add_argument("--drift", type=Path, metavar="FILE", help="watch for drift from this: nvila drift reference")
    group.add_argument(
        "--drift-share", type=float, default=DRIFT_SHARE, metavar="N", help="share of requests (default: %(default)s)"
    )
    group.add_argument("--otlp-endpoint", default="", metavar="URL", help="send traces there, such as http://HOST:4318")
    group.add_argument("--drain", type=float, default=0.0, metavar="SECONDS", help="serve on, not ready, after SIGTERM")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options about adapters and updates."""
    group = parser.add_argument_group("adapters and updates")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="adapter, a folder or models:/..., that clients select by its name; may be given several times",
    )
    group.add_argument(
        "--update-interval",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="look for another version so often (default: 0, on SIGHUP alone)",
    )
    group.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="memory for two versions during an update (default: what the container or machine has)",
    )


def updates_of(args: argparse.Namespace) -> UpdateOptions:
    """Read how the model is updated from parsed arguments.

    Raises:
        ConfigError: A number cannot be used.
    """
    return UpdateOptions(interval_s=args.update_interval, memory_gib=args.memory_gib)


def options_of(args: argparse.Namespace) -> ServerOptions:
    """Read the options from parsed arguments.

    Raises:
        ConfigError: One of them cannot be used.
    """
    return ServerOptions(
        access=AccessRules(key_file=args.api_keys, trusted_header=args.trusted_header, per_minute=args.rate_limit),
        hosts=rules(args.media_host, args.media_network),
        media_store=args.media_store,
        production=args.production,
        drain_s=args.drain,
        drift=Reference.read(args.drift) if args.drift is not None else None,
        drift_share=args.drift_share,
        otlp_endpoint=args.otlp_endpoint,
    )
