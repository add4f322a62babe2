"""Writes the report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvila.errors import NvilaError
from nvila_pipelines.report import lineage_graph, plots, sections, training_panels
from nvila_pipelines.report.cost_panel import costs
from nvila_pipelines.report.formats import duration
from nvila_pipelines.report.outputs import Outputs
from nvila_platform.artifacts import redact, write_atomically
from nvila_platform.lineage import Lineage

logger = logging.getLogger(__name__)

TEMPLATE = "template.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page; without content it shows the sentence why."""

    id: str
    title: str
    content: Any
    why: str = ""


def write_report(artifacts: Mapping[str, Path], summary: Mapping[str, Any], lineage: Lineage | None, out: Path) -> Path:
    """Write the report and return its path.

    A step that did not run, or whose output is damaged, leaves its section with a sentence instead of its content: the
    report of a refused or broken run is the one that is needed most.

    Args:
        artifacts: Step name to the step's directory; the evaluations under names that start with "evaluate".
        summary: What `nvila run --json` prints, with the recipe, versions and hardware.
        lineage: Where the registered (or last) artifact came from; None leaves the drawing out.
        out: The HTML file; an existing one is replaced at once.
    """
    workspace = summary.get("workspace")
    with plots.cached_in(Path(workspace) / "cache" / "matplotlib" if workspace else None):
        page = _page(Outputs(artifacts, refused=summary.get("passed") is False), summary, lineage)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def _page(outputs: Outputs, summary: Mapping[str, Any], lineage: Lineage | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    recipe = summary.get("recipe") or {}
    return environment.get_template(TEMPLATE).render(
        name=str(recipe.get("name") or "run"),
        verdict=_verdict(summary),
        model=summary.get("model"),
        run_id=str(summary.get("run_id", "")),
        seconds=duration(summary.get("seconds")),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections={section.id: section for section in _sections(outputs, summary, lineage)},
        environment=sections.environment(summary),
        recipe=_recipe_text(recipe),
    )


def _sections(outputs: Outputs, summary: Mapping[str, Any], lineage: Lineage | None) -> list[Section]:
    builders: list[tuple[str, str, Callable[[], Any]]] = [
        ("accuracy", "Accuracy", lambda: sections.headline(outputs, summary)),
        ("kinds", "Accuracy by kind of question", lambda: sections.by_kind(outputs)),
        ("sizes", "Size by part", lambda: sections.sizes(outputs)),
        ("times", "Time per step", lambda: sections.times(summary)),
        ("quantization", "Quantization by part", lambda: sections.quantization(outputs)),
        ("losses", "Training loss", lambda: sections.losses(outputs)),
        ("speed", "Training speed", lambda: training_panels.speed(outputs)),
        ("rates", "Learning rate and gradients", lambda: training_panels.rates(outputs)),
        ("cost", "Cost", lambda: costs(outputs)),
        ("selection", "Curation with DeltaLoss", lambda: sections.selection(outputs)),
        ("examples", "Answered examples", lambda: sections.examples(outputs)),
        ("gate", "Gate", lambda: sections.gate(outputs)),
        ("registered", "Registered version", lambda: outputs.json("register", "registered.json")),
        ("served", "Served over HTTP", lambda: outputs.json("serve", "serve.json")),
        ("lineage", "Lineage", lambda: _lineage(lineage)),
    ]
    return [_attempt(id, title, build) for id, title, build in builders]


def _attempt(id: str, title: str, build: Callable[[], Any]) -> Section:
    try:
        content = build()
    except NvilaError as e:
        return Section(id=id, title=title, content=None, why=str(e))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        # One file of an unexpected form must not cost the report of a whole run.
        logger.warning("the report leaves out the section '%s'", title, exc_info=True)
        return Section(id=id, title=title, content=None, why=f"Its data have an unexpected form: {e!r}.")
    return Section(id=id, title=title, content=content or None, why="There is nothing to show.")


def _lineage(lineage: Lineage | None) -> dict[str, Any] | None:
    if lineage is None:
        return None
    return {"svg": lineage_graph.draw(lineage), "rows": lineage_graph.listing(lineage)}


def _verdict(summary: Mapping[str, Any]) -> str:
    passed = summary.get("passed")
    return "unfinished" if passed is None else "passed" if passed else "refused"


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(redact(recipe), sort_keys=False, allow_unicode=True, width=100) if recipe else ""
