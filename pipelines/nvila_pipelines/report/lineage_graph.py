"""Draws a lineage as a graph: what was made first stands on top, every artifact once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from nvila_platform.lineage import Lineage

_BOX_WIDTH, _BOX_HEIGHT = 154, 42
_GAP_X, _GAP_Y = 16, 34
_LANE = 11
SHORT = 12


def draw(root: Lineage) -> str:
    """Return the graph as SVG that takes colours and font from the page.

    An edge to the next row is straight; a longer one runs through a lane on the right, past the boxes between.
    """
    from markupsafe import escape

    nodes = _nodes(root)
    rows, labels = _rows(root, nodes), _labels(nodes)
    widest = max(len(row) for row in rows)
    inner = widest * _BOX_WIDTH + (widest - 1) * _GAP_X
    places = {
        digest: (
            (inner - len(row) * _BOX_WIDTH - (len(row) - 1) * _GAP_X) / 2 + column * (_BOX_WIDTH + _GAP_X),
            level * (_BOX_HEIGHT + _GAP_Y),
        )
        for level, row in enumerate(rows)
        for column, digest in enumerate(row)
    }
    level_of = {digest: level for level, row in enumerate(rows) for digest in row}
    edges = sorted(
        (child, node.digest)
        for node in nodes.values()
        for child in _inputs(node)
        if level_of[child] < level_of[node.digest]
    )
    long = [edge for edge in edges if level_of[edge[1]] - level_of[edge[0]] > 1]
    # One lane a producer, not an edge: several consumers of one artifact share its line.
    producers = sorted({edge[0] for edge in long}, key=lambda digest: -level_of[digest])
    width = inner + 4 + _LANE * (len(producers) + 1)
    height = len(rows) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width:.0f} {height:.0f}" role="img" '
        f'style="max-width:{width:.0f}px" aria-label="{escape(_sentence(root, nodes))}">'
    ]
    for start, end in edges:
        lane = inner + _LANE * (producers.index(start) + 1) if (start, end) in long else None
        parts.append(f'<path class="edge" d="{_edge(places[start], places[end], lane)}"/>')
    for digest, (x, y) in places.items():
        parts.append(_box(str(escape(labels[digest])), str(escape(digest[:SHORT])), x, y))
    return "".join([*parts, "</svg>"])


def listing(root: Lineage) -> tuple[tuple[str, str, str, str], ...]:
    """Return (step, digest, code version, inputs and stages) of every artifact, the newest first."""
    nodes = _nodes(root)
    labels = _labels(nodes)
    return tuple(
        (
            labels[node.digest],
            node.digest,
            node.code_version,
            ", ".join(
                f"{name} {digest[:SHORT]}"
                for name, digest in (*((one, child.digest) for one, child in node.inputs.items()), *node.stages.items())
            ),
        )
        for row in reversed(_rows(root, nodes))
        for node in (nodes[digest] for digest in row)
    )


def _labels(nodes: dict[str, Lineage]) -> dict[str, str]:
    """Name every artifact by its step, and by what its user calls it where the step alone is not enough."""
    called = {child.digest: name for node in nodes.values() for name, child in node.inputs.items()}
    times = Counter(node.step for node in nodes.values())
    labels = {}
    for digest, node in nodes.items():
        name = called.get(digest, "")
        labels[digest] = node.step or name or "external"
        if node.step and times[node.step] > 1 and name and name != node.step:
            labels[digest] = f"{node.step} {name}"
    return labels


def _nodes(root: Lineage) -> dict[str, Lineage]:
    nodes: dict[str, Lineage] = {}
    for node in _walk(root):
        # A step that copies its input has that input's digest; the walk comes to the step first.
        nodes.setdefault(node.digest, node)
    return nodes


def _inputs(node: Lineage) -> set[str]:
    return {child.digest for child in node.inputs.values()}


def _walk(node: Lineage) -> Iterator[Lineage]:
    yield node
    for child in node.inputs.values():
        yield from _walk(child)


def _rows(root: Lineage, nodes: dict[str, Lineage]) -> list[list[str]]:
    """Order the artifacts so that each stands below everything that it was made of."""
    depths: dict[str, int] = {}

    def depth(digest: str, above: frozenset[str]) -> int:
        if digest not in depths:
            inputs = sorted(_inputs(nodes[digest]) - above)
            depths[digest] = 1 + max((depth(child, above | {child}) for child in inputs), default=-1)
        return depths[digest]

    depth(root.digest, frozenset({root.digest}))
    by_depth: dict[int, list[str]] = defaultdict(list)
    for digest in sorted(depths, key=lambda digest: (nodes[digest].step, digest)):
        by_depth[depths[digest]].append(digest)
    return [by_depth[level] for level in sorted(by_depth)]


def _edge(start: tuple[float, float], end: tuple[float, float], lane: float | None) -> str:
    if lane is None:
        x1, y1, x2, y2 = start[0] + _BOX_WIDTH / 2, start[1] + _BOX_HEIGHT, end[0] + _BOX_WIDTH / 2, end[1]
        middle = (y1 + y2) / 2
        return f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    # Lines leave a box low and arrive high, so that two in one row stay apart.
    x1, y1 = start[0] + _BOX_WIDTH, start[1] + _BOX_HEIGHT - 9
    x2, y2 = end[0] + _BOX_WIDTH, end[1] + 9
    return f"M{x1:.0f} {y1:.0f}H{lane - 6:.0f}q6 0 6 6V{y2 - 6:.0f}q0 6 -6 6H{x2:.0f}"


def _box(step: str, digest: str, x: float, y: float) -> str:
    center = x + _BOX_WIDTH / 2
    return (
        f'<g class="node"><rect x="{x:.0f}" y="{y:.0f}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6"/>'
        f'<text class="step" x="{center:.0f}" y="{y + 18:.0f}">{step}</text>'
        f'<text class="digest" x="{center:.0f}" y="{y + 33:.0f}">{digest}</text></g>'
    )


def _sentence(root: Lineage, nodes: dict[str, Lineage]) -> str:
    return f"Lineage of {root.step} {root.digest[:SHORT]}: {len(nodes)} artifacts; the table below lists them."
