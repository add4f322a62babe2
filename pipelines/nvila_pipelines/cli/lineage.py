"""`nvila lineage`: from an endpoint, a version or an artifact back to the data and the code."""

from __future__ import annotations

import argparse
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError, ConfigError
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_platform.lineage import Lineage
    from nvila_platform.store import ArtifactStore

SUMMARY = "show what a model, an endpoint or an artifact was made of"
_DIGEST = re.compile("[0-9a-f]{64}")
_GATE_TAG = "nvila.gate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.add_argument(
        "ref", metavar="REF", help="models:/NAME@ALIAS, address of an endpoint, folder of an artifact, or whole digest"
    )
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its digest")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the graph as a page")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_platform.lineage import verify_lineage
    from nvila_platform.store import open_store

    store = open_store(settings)
    root = find_lineage(args.ref, settings, store)
    verdicts = verify_lineage(store, root) if args.verify else {}
    if args.html is not None:
        from nvila_platform.artifacts import storage_errors

        with storage_errors(args.html):
            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(lineage_page(args.ref, root), encoding="utf-8")
    if args.json:
        emit_json({"lineage": root.to_dict(), "verified": verdicts or None})
    else:
        for line in root.lines():
            emit(line)
        for digest, verdict in verdicts.items():
            emit(f"{digest[:12]}  {verdict}")
        if args.html is not None:
            emit(f"page: {args.html.absolute()}")
    damaged = [digest for digest, verdict in verdicts.items() if verdict not in ("sound", "outside")]
    if damaged:
        raise ArtifactError(
            f"{len(damaged)} of {len(verdicts)} artifacts are damaged: {verdicts[damaged[0]]}", "run their steps again"
        )
    return 0


def find_lineage(ref: str, settings: Settings, store: ArtifactStore) -> Lineage:
    """Return the lineage of what a reference names.

    Raises:
        ConfigError: The reference names nothing.
        ArtifactError: The artifact is not in the store.
        InfrastructureError: The registry, the store or the endpoint failed.
    """
    from nvila_platform.lineage import trace, trace_version

    if ref.startswith("models:/"):
        from nvila_platform.registry import resolve, version_tags

        version = resolve(settings, ref)
        gate = version_tags(settings, version).get(_GATE_TAG, "")
        return trace_version(store, version.model_uri, version.digest, {"verdict": gate} if gate else {})
    if ref.startswith(("http://", "https://")):
        from nvila_platform.endpoint import find_endpoint

        served = find_endpoint(ref, None, api_key=settings.endpoint_api_key).digest
        if served is None:
            raise ConfigError(f"{ref} does not tell the digest of its model", "name the model: models:/NAME@ALIAS")
        return trace(store, served)
    if _DIGEST.fullmatch(ref):
        return trace(store, ref)
    return trace(store, _digest_of(Path(ref)))


def lineage_page(ref: str, root: Lineage) -> str:
    """Return a page with the graph and a table of what is in it; it needs nothing else."""
    from nvila_pipelines.report.lineage_graph import draw, listing

    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in listing(root))
    style = (
        "body{font:14px sans-serif;margin:2em;color:#222}svg{display:block;margin:1em 0}"
        ".edge{fill:none;stroke:#888}rect{fill:#fff;stroke:#555}td,th{text-align:left;padding:.2em 1em .2em 0}"
    )
    head = f"<meta charset='utf-8'><title>Lineage of {escape(ref)}</title><style>{style}</style>"
    table = f"<table><tr><th>step</th><th>digest</th><th>code</th><th>made of</th></tr>{rows}</table>"
    body = f"<h1>Lineage of {escape(ref)}</h1>{draw(root)}{table}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def _digest_of(folder: Path) -> str:
    from nvila_platform.artifacts import read_manifest

    manifest = read_manifest(folder) or read_manifest(folder.parent)
    if manifest is None:
        raise ConfigError(
            f"'{folder}' is no artifact", "give models:/NAME@ALIAS, an endpoint, a digest or a folder with a manifest"
        )
    return manifest.digest
