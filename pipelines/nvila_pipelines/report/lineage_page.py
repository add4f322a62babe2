"""The page of `nvila lineage`: what a model is, the graph of what it was made of, and every digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nvila_pipelines.report.lineage_graph import draw, listing
from nvila_platform.artifacts import write_atomically
from nvila_platform.lineage import EXTERNAL
from nvila_platform.origin import Origin

TEMPLATE = "lineage.html.j2"


def write_lineage_page(origin: Origin, verified: Mapping[str, str] | None, path: Path) -> None:
    """Write one HTML file.

    Args:
        origin: What is shown.
        verified: Digest -> what is wrong with it, empty when nothing is; None when nobody looked.
        path: File to write; its folder is made.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    external = {node.digest for node in origin.artifacts() if node.step == EXTERNAL}
    text = environment.get_template(TEMPLATE).render(
        title=origin.version.model_uri if origin.version else origin.artifact.digest[:12],
        facts=facts(origin),
        svg=draw(origin.root),
        rows=listing(origin.root),
        verified=verified,
        external=external,
        damaged=[digest for digest, problem in (verified or {}).items() if problem and digest not in external],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def facts(origin: Origin) -> list[tuple[str, str]]:
    """Return what is known about the model, by name."""
    rows = []
    if origin.served:
        served = origin.served
        rows.append(("endpoint", f"{served.url} serves {served.name}, version {served.version}, {served.digest[:12]}"))
    if origin.version:
        names = f" ({', '.join(origin.aliases)})" if origin.aliases else ""
        rows.append(("model", f"{origin.version.model_uri}{names}"))
    else:
        rows.append(("model", "not registered"))
    if origin.verdict:
        failed = [name for name, passed in origin.verdict.checks.items() if not passed]
        count = len(origin.verdict.checks)
        said = f"refused: {', '.join(failed)}" if failed else f"passed {count} check{'s' * (count != 1)}"
        rows.append(("gate", said))
    elif origin.version:
        rows.append(("gate", "no verdict in the store"))
    return [*rows, *((name.removeprefix("nvila."), value) for name, value in origin.tags.items())]
