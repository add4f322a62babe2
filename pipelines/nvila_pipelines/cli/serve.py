"""`nvila serve`."""

from __future__ import annotations

import argparse
import base64
import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import port_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.model_source import DEFAULT_NAME, fetch, locate
from nvila_platform.scratch import scratch_folder
from nvila_platform.serving.options import ServerOptions, options_of, updates_of
from nvila_platform.serving.options import add_arguments as add_server_arguments
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_platform.serving.limits import Limits
    from nvila_platform.serving.updates import UpdateOptions

SUMMARY = "serve a model over HTTP: OpenAI, KServe V1 and V2"
DECODERS = ("auto", "transformers", "fused", "fused-int8")
COMPILE = ("auto", "on", "off")
_ANY = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
_QUESTION = "what color is the shape?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model folder, and who it is."""

    directory: Path
    name: str
    version: str
    digest: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s (MODEL | --model-dir DIR) [options]"
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder or s3://BUCKET/PREFIX",
    )
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="folder of the model, instead of MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8080, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--name", help=f"name that clients ask for (default: the registered name, or {DEFAULT_NAME})")
    parser.add_argument("--version", help="version reported with every answer (default: the registered one)")
    parser.add_argument("--digest", help="artifact digest reported with every answer (default: the artifact's own)")
    parser.add_argument("--max-requests", type=int, metavar="N", help="requests running and waiting together")
    parser.add_argument("--max-running", type=int, metavar="N", help="requests that share the model's steps")
    parser.add_argument("--kv-cache-gib", type=float, metavar="GIB", help="memory of keys and values")
    parser.add_argument("--decoder", choices=DECODERS, help="what runs the language model (default: auto)")
    parser.add_argument(
        "--compile", choices=COMPILE, help="compile decoding, on CUDA record graphs of it (default: auto)"
    )
    parser.add_argument("--request-timeout", type=float, metavar="SECONDS", help="longest time for one answer")
    parser.add_argument("--grace", type=float, metavar="SECONDS", help="time for running answers after SIGTERM")
    add_server_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if (args.model is None) == (args.model_dir is None):
        given = "no model is named" if args.model is None else "both MODEL and --model-dir are given"
        raise ConfigError(given, "nvila serve models:/nvila@champion, or nvila serve --model-dir DIR")
    serve_model(
        args.model if args.model is not None else args.model_dir,
        settings,
        host=args.host,
        port=args.port,
        name=args.name,
        version=args.version,
        digest=args.digest,
        limits=_limits(args),
        options=options_of(args),
        adapters=args.adapter,
        updates=updates_of(args),
        kv_cache_gib=args.kv_cache_gib,
        decoder=args.decoder,
        compiled=args.compile,
        grace_s=args.grace,
        as_json=args.json,
    )
    return 0


def serve_model(
    model: str | Path,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    name: str | None = None,
    version: str | None = None,
    digest: str | None = None,
    limits: Limits | None = None,
    options: ServerOptions | None = None,
    adapters: Sequence[str] = (),
    updates: UpdateOptions | None = None,
    kv_cache_gib: float | None = None,
    decoder: str | None = None,
    compiled: str | None = None,
    grace_s: float | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Serve a model until a signal comes; once it is ready, say how to ask it.

    Args:
        model: Folder, or address in the registry.
        settings: Where registry and store are.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        name: Name that clients ask for.
        version: Version to report.
        digest: Digest to report.
        limits: What a request may cost.
        options: Who may ask, where media may come from, how the server ends.
        adapters: Adapters as `NAME=ADDRESS`.
        updates: When to look for another version of the model.
        kv_cache_gib: Memory of the engine's keys and values.
        decoder: What runs the language model.
        compiled: Whether decoding is compiled: auto, on or off.
        grace_s: How long running answers may take after the signal.
        as_json: Say it as a JSON object.
        quiet: Say it on standard error, because standard output ends with something else.
    """
    from nvila_platform.serving.limits import Limits
    from nvila_platform.serving.server import DEFAULT_GRACE_S, engine_config, serve
    from nvila_platform.serving.source import ModelSource, engine_loader, parse_adapters

    config = engine_config(limits or Limits(), kv_cache_gib, decoder, compiled)
    source = ModelSource(
        model,
        settings,
        engine_loader(config),
        name=name,
        version=version,
        digest=digest,
        adapters=parse_adapters(adapters),
    )
    plan = source.look()
    with scratch_folder("nvila-serve") as scratch:
        port_file = scratch / "port"

        def on_ready() -> None:
            url = f"http://{_reachable(host)}:{port_file.read_text(encoding='ascii')}"
            _announce(url, plan.version.identity, as_json=as_json, quiet=quiet)

        serve(
            source,
            plan,
            host=host,
            port=port,
            limits=limits,
            options=options,
            updates=updates,
            config=config,
            grace_s=DEFAULT_GRACE_S if grace_s is None else grace_s,
            port_file=port_file,
            on_ready=on_ready,
        )


def find_model(model: str | Path, settings: Settings) -> Source:
    """Return the folder behind an address, and what is known about it.

    Raises:
        ConfigError: There is no such model.
        ArtifactError: Its files are missing or damaged.
        InfrastructureError: The registry or the store failed.
    """
    found = locate(model, settings)
    directory = fetch(found, settings, verify=False)
    return Source(directory=directory, name=found.name, version=found.version, digest=found.digest)


def curl_line(url: str, name: str) -> str:
    """Return a command that can be pasted as it is: a question about a small picture that travels inside it."""
    image = f"data:image/png;base64,{base64.b64encode(_blue_rectangle()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": _QUESTION}]
    body = {"model": name, "messages": [{"role": "user", "content": content}]}
    words = ["curl", "-s", f"{url}/openai/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    return shlex.join([*words, json.dumps(body, separators=(",", ":"))])


def _blue_rectangle() -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), (232, 240, 230))
    ImageDraw.Draw(image).rectangle((14, 22, 46, 42), fill=(0, 0, 255))
    png = io.BytesIO()
    image.quantize(2).save(png, "PNG", optimize=True)
    return png.getvalue()


def _announce(url: str, identity: object, *, as_json: bool, quiet: bool) -> None:
    name, version, digest = (str(getattr(identity, field)) for field in ("name", "version", "digest"))
    if as_json:
        emit_json({"url": url, "name": name, "version": version, "digest": digest})
        return
    text = f"model {name} (version {version}) is served at {url}; Ctrl-C stops it. Ask it:\n\n{curl_line(url, name)}\n"
    if quiet:
        sys.stderr.write(text)
    else:
        emit(text)


def _reachable(host: str) -> str:
    return _ANY.get(host) or (f"[{host}]" if ":" in host else host)


def _limits(args: argparse.Namespace) -> Limits:
    from nvila_platform.serving.limits import Limits

    given = {
        "max_requests": args.max_requests,
        "max_running": args.max_running,
        "request_timeout_s": args.request_timeout,
    }
    return Limits(**{field: value for field, value in given.items() if value is not None})
