"""What the Kubeflow UI shows of one step: tables as Markdown, curves as HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nvila.errors import NvilaError
from nvila_pipelines.report.curation_panels import Panel
from nvila_pipelines.report.formats import number, percent
from nvila_pipelines.report.outputs import Outputs


def step_report(step: str, directory: Path) -> str:
    """Return Markdown, or HTML of the steps that draw, about the results of a step.

    A file of an unexpected form costs the report and never the step.

    Args:
        step: Step in the table.
        directory: Its results.
    """
    try:
        return _REPORTS.get(step, _metrics)(step, directory)
    except (NvilaError, KeyError, TypeError, ValueError, OSError) as e:
        return f"There is no report of the step {escape(step)}: {escape(str(e))}\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    cells = (["---" if cell == "---" else f" {_cell(cell)} " for cell in line] for line in lines)
    return "\n".join(f"|{'|'.join(line)}|" for line in cells)


def numbers_of(value: Mapping[str, Any], prefix: str = "", depth: int = 3) -> dict[str, float]:
    """Return the numbers in nested objects under dotted names; lists and text are left out."""
    found: dict[str, float] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping) and depth:
            found |= numbers_of(inner, f"{prefix}{name}.", depth - 1)
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found[f"{prefix}{name}"] = float(inner)
    return found


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _metrics(step: str, directory: Path) -> str:
    values = Outputs({step: directory}, refused=False).metrics().get(step, {})
    return markdown_table(["metric", "value"], [[name, number(value)] for name, value in values.items()]) + "\n"


def _evaluate(step: str, directory: Path) -> str:
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    blind = results.get("baselines", {})
    rows = [
        [kind, number(cell["total"]), percent(blind.get("by_source", {}).get(kind)), percent(cell["accuracy"])]
        for kind, cell in sorted(results["by_source"].items())
    ]
    rows.append(
        ["**all**", number(results["num_samples"]), percent(blind.get("text_majority")), percent(results["accuracy"])]
    )
    title = f"## Accuracy of the {results['model']} model\n\n"
    return title + markdown_table(["kind of question", "questions", "blind", "accuracy"], rows) + "\n"


def _gate(step: str, directory: Path) -> str:
    verdict = json.loads((directory / "verdict.json").read_text(encoding="utf-8"))
    rows = [
        [
            one["name"],
            "missing" if one["value"] is None else number(one["value"]),
            number(one["limit"]),
            "passed" if one["passed"] else "**refused**",
            one.get("why", ""),
        ]
        for one in verdict["checks"]
    ]
    title = f"## The gate {'lets the model through' if verdict['passed'] else 'refuses the model'}\n\n"
    return title + markdown_table(["check", "value", "limit", "verdict", "about"], rows) + "\n"


def _quantize(step: str, directory: Path) -> str:
    from nvila_pipelines.report.sections import quantization, sizes

    outputs = Outputs({step: directory}, refused=False)
    bars = sizes(outputs)
    efficiency = markdown_table(["part", "wide", "quantized", "left"], [[bar.label, *bar.cells] for bar in bars])
    head, *rows = quantization(outputs)
    return f"## Size\n\n{efficiency}\n\n## Parts\n\n{markdown_table(head, rows)}\n"


def _object(file: str) -> Callable[[str, Path], str]:
    def read(step: str, directory: Path) -> str:
        found = json.loads((directory / file).read_text(encoding="utf-8"))
        rows = [[name, value if isinstance(value, str) else number(value)] for name, value in found.items()]
        return markdown_table([step, ""], rows) + "\n"

    return read


def _train(step: str, directory: Path) -> str:
    from nvila_pipelines.report.sections import losses

    return html_page("Training loss", losses(Outputs({step: directory}, refused=False)))


def _curate(step: str, directory: Path) -> str:
    from nvila_pipelines.report.curation_panels import selection_of
    from nvila_pipelines.report.score_summary import summarise

    selection = selection_of(summarise(directory / "scores.parquet", directory / "selection.parquet"), ())
    return html_page("Curation with DeltaLoss", (*selection.panels, selection.scatter), selection.text)


def html_page(title: str, panels: Iterable[Panel], text: str = "") -> str:
    """Return a page with figures that needs nothing else."""
    figures = "".join(
        f"<figure><figcaption><b>{escape(one.title)}</b></figcaption>{one.svg}<p>{escape(one.text)}</p></figure>"
        for one in panels
    )
    style = "body{font:14px sans-serif;margin:1.5em}figure{display:inline-block;margin:0 1.5em 1.5em 0;width:26em}"
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{style}</style>"
    body = f"<h1>{escape(title)}</h1><p>{escape(text)}</p>{figures}"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


_REPORTS: dict[str, Callable[[str, Path], str]] = {
    "curate": _curate,
    "train": _train,
    "quantize": _quantize,
    "evaluate-wide": _evaluate,
    "evaluate-quantized": _evaluate,
    "gate": _gate,
    "register": _object("registered.json"),
    "serve": _object("serve.json"),
}
