"""Starts the model server: socket first, then HTTP, then the model.

The order is what makes start-up observable: a port in use is reported before seconds are spent on loading, and probes
get "alive, not ready" while the model loads.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, NvilaError, ResourceError
from nvila_platform.launch.outcome import leave_error
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.options import ServerOptions, add_arguments, options_of, updates_of
from nvila_platform.serving.source import ModelSource, engine_loader, parse_adapters
from nvila_platform.serving.tracing import open_tracing
from nvila_platform.serving.updates import UpdateOptions, Updater
from nvila_platform.settings import Settings
from nvila_platform.telemetry import configure_logging

if TYPE_CHECKING:
    from nvila.inference.config import EngineConfig
    from nvila_platform.serving.kserve_server import NvilaServer
    from nvila_platform.serving.served import Version
    from nvila_platform.serving.service import ChatService
    from nvila_platform.serving.source import Load, Plan

logger = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
DEFAULT_GRACE_S = 30.0
DECODERS = ("auto", "transformers", "fused", "fused-int8")
COMPILE = ("auto", "on", "off")
_BACKLOG = 128
# The SDK reads the process's command line when it is imported; these are the arguments it gets instead of ours.
_SDK_ARGV = ["nvila-serve", "--configure_logging=false", "--enable_grpc=false", "--enable_docs_url=false"]


def serve(
    source: ModelSource,
    plan: Plan,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    limits: Limits | None = None,
    options: ServerOptions | None = None,
    updates: UpdateOptions | None = None,
    config: Callable[[], EngineConfig] | None = None,
    grace_s: float = DEFAULT_GRACE_S,
    port_file: Path | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve one model until SIGTERM or SIGINT, then finish running answers and return.

    Args:
        source: Brings and loads the model, in a thread, after the server answers liveness probes.
        plan: What it found.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one.
        limits: What a request may cost.
        options: Who may ask, where media may come from, how the server ends.
        updates: When to look for another version; SIGHUP always does.
        config: Makes the engine's configuration, which says what memory a second one takes.
        grace_s: How long running answers may take after the signal.
        port_file: Gets the port as text once it is bound.
        on_ready: Called once requests are answered.

    Raises:
        ResourceError: The port is taken.
        ConfigError: The host is not an address of this machine, or an option cannot be used.
        NvilaError: The model cannot be loaded.
    """
    updates = updates or UpdateOptions()
    updates.check(plan)
    with bind(host, port) as listener:
        bound = listener.getsockname()[1]
        if port_file is not None:
            port_file.write_text(str(bound), encoding="ascii")
        options = options or ServerOptions()
        service, server = _build(plan.version, limits or Limits(), options, listener, grace_s)
        updater = server.updater = _updater(service, source, updates, config)
        if not options.access.closed and not _is_loopback(listener):
            logger.warning("anybody who reaches %s:%d may ask; --api-keys or --trusted-header closes it", host, bound)
        service.decoder.warm_up()
        failures: list[Exception] = []
        loader = threading.Thread(
            target=_load, args=(source, plan, on_ready, server, failures), name="load", daemon=True
        )
        loader.start()
        logger.info("listening on http://%s:%d, loading model %s", host, bound, service.identity.name)
        try:
            server.run()
        finally:
            updater.close()
            service.close()
    if failures:
        raise failures[0]


def bind(host: str, port: int) -> socket.socket:
    """Listen on exactly `host` and `port`.

    Raises:
        ResourceError: The port is taken or reserved.
        ConfigError: The host is not an address of this machine, or the port is no port.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not a port", "use 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as e:
        raise ConfigError(f"host {host!r} is not an address: {e.strerror}", "use 127.0.0.1 or 0.0.0.0") from e
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening at once: two sockets may bind one port as long as neither listens.
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        raise _bind_error(e, host, port) from e
    listener.setblocking(False)
    return listener


def main(argv: Sequence[str] | None = None, *, load: Load | None = None) -> int:
    """Run the server from the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
        load: Loads another engine than ours.

    Returns:
        The exit code; a typed error has been written to standard error and, for a launcher, to its error file.
    """
    args = _arguments().parse_args(argv)
    try:
        settings = Settings.load()
        configure_logging(args.log_format or settings.log_format)
        limits = Limits(
            max_requests=args.max_requests, max_running=args.max_running, request_timeout_s=args.request_timeout
        )
        config = engine_config(limits, args.kv_cache_gib, args.decoder, args.compile)
        source = ModelSource(
            args.model_dir,
            settings,
            load or engine_loader(config),
            name=args.name,
            version=args.version,
            digest=args.digest,
            adapters=parse_adapters(args.adapter),
        )
        serve(
            source,
            source.look(),
            host=args.host,
            port=args.port,
            limits=limits,
            options=options_of(args),
            updates=updates_of(args),
            config=config,
            grace_s=args.grace,
            port_file=args.port_file,
        )
    except NvilaError as e:
        leave_error(e)
        return e.exit_code
    return 0


def _arguments() -> argparse.ArgumentParser:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="python -m nvila_platform.serving", description="Serve one model directory.")
    parser.add_argument("--model-dir", type=Path, required=True, help="directory of the model")
    parser.add_argument("--name", required=True, help="name that clients ask for")
    parser.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--version", help="registry version, reported with every answer")
    parser.add_argument("--digest", help="artifact digest, reported with every answer")
    parser.add_argument("--max-requests", type=int, default=defaults.max_requests, help="running and waiting together")
    parser.add_argument("--max-running", type=int, default=defaults.max_running, help="in the engine at once")
    parser.add_argument("--kv-cache-gib", type=float, help="memory of keys and values (default: the engine's)")
    parser.add_argument("--decoder", choices=DECODERS, help="what runs the language model (default: auto)")
    parser.add_argument(
        "--compile", choices=COMPILE, help="compile decoding, on CUDA record graphs of it (default: auto)"
    )
    parser.add_argument("--request-timeout", type=float, default=defaults.request_timeout_s, help="seconds a request")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE_S, help="seconds for running answers on SIGTERM")
    parser.add_argument("--log-format", choices=("auto", "text", "json"), help="default: NVILA_LOG_FORMAT, then auto")
    parser.add_argument("--port-file", type=Path, help="file that gets the bound port")
    add_arguments(parser)
    return parser


def _build(
    version: Version, limits: Limits, options: ServerOptions, listener: socket.socket, grace_s: float
) -> tuple[ChatService, NvilaServer]:
    # The SDK builds on a class that the web framework has deprecated; nothing a reader of our log could act on.
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
    ours, sys.argv = sys.argv, _SDK_ARGV
    try:
        from nvila_platform.serving.kserve_server import NvilaServer
    finally:
        sys.argv = ours
    from prometheus_client import REGISTRY

    from nvila_platform.drift.watch import DriftWatch
    from nvila_platform.serving.drift import TrafficWatch, register_drift
    from nvila_platform.serving.fetching import MediaDoor
    from nvila_platform.serving.media_store import open_media_store
    from nvila_platform.serving.metrics import ServingMetrics
    from nvila_platform.serving.service import ChatService

    door = MediaDoor(options.hosts, timeout_s=limits.fetch_timeout_s) if options.hosts.hosts else None
    store = open_media_store(options.media_store, Settings.load()) if options.media_store else None
    metrics = ServingMetrics(version.identity, REGISTRY)
    traffic = None
    if options.drift is not None:
        watch = DriftWatch(options.drift, share=options.drift_share)
        register_drift(version.identity.name, watch, REGISTRY)
        traffic = TrafficWatch(watch)
    tracing = open_tracing(options.otlp_endpoint, version.identity.name) if options.otlp_endpoint else None
    service = ChatService(version, limits, metrics, door=door, store=store, traffic=traffic, tracing=tracing)
    return service, NvilaServer(service, listener, grace_s, options)


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _updater(
    service: ChatService, source: ModelSource, options: UpdateOptions, config: Callable[[], EngineConfig] | None
) -> Updater:
    from prometheus_client import REGISTRY

    def cache_bytes() -> int:
        made = None if config is None else config()
        return 0 if made is None else made.kv_cache_bytes + made.media_cache_bytes

    return Updater(service, source, options, cache_bytes=cache_bytes, registry=REGISTRY)


def _load(
    source: ModelSource,
    plan: Plan,
    on_ready: Callable[[], None] | None,
    server: NvilaServer,
    failures: list[Exception],
) -> None:
    service, updater = server.service, server.updater
    assert updater is not None
    try:
        from prometheus_client import REGISTRY

        service.start(source.load(source.fetch(plan)), REGISTRY)
        updater.start()
        if on_ready is not None:
            on_ready()
    except Exception as e:
        failures.append(e)
        server.shut_down()
    else:
        logger.info("model %s is ready", service.identity.name)


def engine_config(
    limits: Limits, kv_cache_gib: float | None, decoder: str | None, compiled: str | None = None
) -> Callable[[], EngineConfig]:
    """Return what makes the engine's configuration; the engine, and torch with it, is imported only then.

    Raises:
        ConfigError: The memory is no positive number.
    """
    if kv_cache_gib is not None and not kv_cache_gib > 0:
        raise ConfigError(f"--kv-cache-gib is {kv_cache_gib}", "give a positive number of GiB")

    def make() -> EngineConfig:
        from nvila.inference.config import EngineConfig

        given: dict[str, Any] = {"kv_cache_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30)}
        given |= {"decoder": decoder, "compile": compiled}
        return EngineConfig(
            max_running=limits.max_running, **{name: value for name, value in given.items() if value is not None}
        )

    return make


def _bind_error(error: OSError, host: str, port: int) -> NvilaError:
    if error.errno == errno.EADDRINUSE:
        return ResourceError(
            f"port {port} on {host} is in use", "stop the program that has it, or choose another port (0: any free one)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ResourceError(f"port {port} on {host} may not be used by this user", "choose a port above 1023")
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", "use 127.0.0.1 or 0.0.0.0")
