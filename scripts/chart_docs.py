"""Write the table of values in each chart's README from the comments in its values.yaml.

A key is documented by the comment lines right above it, the first of which starts with `# --`. The table goes between
two markers in the README; everything around them is written by hand.

Usage:
    python scripts/chart_docs.py [--check] [CHART ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CHARTS = Path(__file__).resolve().parent.parent / "charts"
BEGIN = "<!-- values: made by scripts/chart_docs.py, do not edit -->"
END = "<!-- /values -->"


class ChartDocsError(Exception):
    """A chart whose values cannot be documented, with the line to mend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One documented key of values.yaml.

    Attributes:
        path: Dotted path of the key.
        text: What its comment says, on one line.
        default: Default as JSON; empty for a key that only holds others.
    """

    path: str
    text: str
    default: str


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of values in the charts' READMEs.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a README is out of date")
    parser.add_argument("charts", nargs="*", type=Path, metavar="CHART", help="chart folders (default: all of charts/)")
    args = parser.parse_args(argv)
    charts: list[Path] = args.charts or sorted(file.parent for file in CHARTS.glob("*/Chart.yaml"))
    try:
        stale = [chart for chart in charts if update(chart, write=not args.check)]
    except (ChartDocsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for chart in stale:
        print(f"{chart / 'README.md'}: {'out of date, run scripts/chart_docs.py' if args.check else 'updated'}")
    return 1 if stale and args.check else 0


def update(chart: Path, *, write: bool) -> bool:
    """Bring one README up to date; return whether it was not."""
    readme = chart / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ChartDocsError(f"{readme}: needs the lines {BEGIN!r} and {END!r} around the table")
    fresh = f"{before}{BEGIN}\n{table(read_values(chart / 'values.yaml'))}\n{END}{after}"
    if fresh == text:
        return False
    if write:
        readme.write_text(fresh, encoding="utf-8")
    return True


def table(values: list[Value]) -> str:
    """Return the values as a Markdown table."""
    rows = [(f"`{value.path}`", f"`{value.default}`" if value.default else "", value.text) for value in values]
    # A bar ends a cell, wherever it stands.
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(["| Key | Default | Meaning |", "|---|---|---|", *lines])


def read_values(path: Path) -> list[Value]:
    """Return every key of a values.yaml in order, with its comment and default.

    Raises:
        ChartDocsError: When a key has no `# --` comment.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ChartDocsError(f"{path}: not a mapping")
    return list(walk(path, lines, root, ()))


def walk(path: Path, lines: list[str], node: yaml.MappingNode, above: tuple[str, ...]) -> Iterator[Value]:
    """Yield the keys of a mapping and, after each, the keys below it."""
    for key, child in node.value:
        line: int = key.start_mark.line
        name = (*above, str(key.value))
        nested = isinstance(child, yaml.MappingNode) and bool(child.value)
        yield Value(
            path=".".join(name),
            text=comment_above(path, lines, line),
            default="" if nested else json.dumps(plain(child)),
        )
        if nested:
            yield from walk(path, lines, child, name)


def comment_above(path: Path, lines: list[str], line: int) -> str:
    """Return the `# --` comment that ends right above a line."""
    found: list[str] = []
    for text in reversed(lines[:line]):
        stripped = text.strip()
        if stripped.startswith("# --"):
            return " ".join([stripped.removeprefix("# --").strip(), *found])
        if not stripped.startswith("#"):
            break
        found.insert(0, stripped.removeprefix("#").strip())
    key = lines[line].strip()
    raise ChartDocsError(f"{path}:{line + 1}: no '# --' comment above {key!r}")


def plain(node: yaml.Node) -> object:
    """Return the Python value of a YAML node."""
    constructor = yaml.SafeLoader("")
    try:
        return constructor.construct_object(node, deep=True)
    finally:
        constructor.dispose()


if __name__ == "__main__":
    sys.exit(main())
