"""The page of a comparison: differences with their intervals, categories, and the samples that changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.data.images import load_image
from nvila.errors import NvilaError
from nvila_pipelines.report import plots
from nvila_pipelines.report.curation_panels import Panel
from nvila_pipelines.report.curation_report import environment
from nvila_pipelines.report.formats import shortened
from nvila_pipelines.report.gallery import MAX_LETTERS, MAX_PICTURES, Card, Group
from nvila_pipelines.report.images import data_uri

if TYPE_CHECKING:
    from nvila.evaluation.asking import Piece, Question
    from nvila.evaluation.comparison import Difference, Pair, TaskComparison
    from nvila_pipelines.evaluation.compare import Comparison
    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

_TEMPLATE = "comparison.html.j2"
MAX_FLIPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table of differences, with the places of its interval on the table's scale, from 0 to 100."""

    label: str
    cells: tuple[str, ...]
    verdict: str
    low: float
    value: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Differences on one scale, whose middle is none."""

    rows: tuple[Row, ...]
    ends: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection:
    """What the page says about a task."""

    id: str
    title: str
    text: str
    metrics: Table
    categories: Table | None
    plot: Panel | None
    groups: tuple[Group, ...]


def comparison_page(comparison: Comparison, settings: Settings, data: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        comparison: The comparison.
        settings: Where data in an object store are.
        data: Places of data by task, for pictures.
    """
    tasks = comparison.tasks.values()
    with plots.cached_in(settings.workspace / "cache" / "matplotlib"):
        sections = [_section(number, task, comparison, settings, data) for number, task in enumerate(tasks)]
    return str(
        environment()
        .get_template(_TEMPLATE)
        .render(
            names=comparison.names,
            digests=[str(side.results.get("model_digest") or "unknown") for side in comparison.sides],
            files=[str(side.file) for side in comparison.sides],
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            summary=_table({task.task: task.difference for task in tasks}),
            sections=sections,
        )
    )


def _section(
    number: int, task: TaskComparison, comparison: Comparison, settings: Settings, data: Mapping[str, str]
) -> TaskSection:
    paired = task.difference.paired
    text = (
        f"{task.difference.samples:,} samples have a score of both. In {task.main}, {len(task.worse):,} are lower "
        f"under B and {len(task.better):,} are higher; p is {paired.p_value:.3g} ({paired.test})."
    )
    if task.only_reference or task.only_candidate:
        text += (
            f" Not compared: {task.only_reference:,} samples with a score of A alone and {task.only_candidate:,} of B."
        )
    shown = {"worse": task.worse[:MAX_FLIPS], "better": task.better[:MAX_FLIPS]}
    questions = _questions(task, [pair[0].index for pairs in shown.values() for pair in pairs], settings, data)
    return TaskSection(
        id=f"task{number}",
        title=task.task,
        text=text,
        metrics=_table(task.metrics),
        categories=_table(task.categories) if task.categories else None,
        plot=_plot(number, task) if len(task.categories) > 1 else None,
        groups=tuple(_group(kind, pairs, task, comparison, questions) for kind, pairs in shown.items() if pairs),
    )


def _table(differences: Mapping[str, Difference]) -> Table:
    ends = [abs(end) for d in differences.values() for end in (d.paired.low, d.paired.high, d.paired.difference)]
    scale = max([end for end in ends if math.isfinite(end)], default=0.0) or 1.0

    def place(value: float) -> float:
        return 50 + 48 * value / scale

    rows = []
    for label, difference in differences.items():
        paired = difference.paired
        low, high = ((e if math.isfinite(e) else paired.difference) for e in (paired.low, paired.high))
        cells = (
            f"{difference.samples:,}",
            f"{difference.reference:.4f}",
            f"{difference.candidate:.4f}",
            f"{paired.difference:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{paired.p_value:.3g}",
        )
        kind = difference.verdict if difference.verdict in ("better", "worse") else "none"
        rows.append(
            Row(
                label=label,
                cells=cells,
                verdict=kind,
                low=place(low),
                value=place(paired.difference),
                high=place(high),
            )
        )
    return Table(rows=tuple(rows), ends=(f"{-scale:.3g}", f"{scale:+.3g}"))


def _plot(number: int, task: TaskComparison) -> Panel:
    points = [(d.reference, d.candidate, d.verdict) for d in task.categories.values()]
    above = sum(b > a for a, b, _ in points)
    text = f"{above} of {len(points)} categories are above the line, where B has the higher {task.main}."
    svg = plots.category_scatter(points, name=f"categories{number}", alt=f"{task.main} by category: {text}")
    return Panel(title=f"{task.main} by category", svg=svg, text=text)


def _group(
    kind: str, pairs: Sequence[Pair], task: TaskComparison, comparison: Comparison, questions: Mapping[int, Question]
) -> Group:
    count = len(task.worse if kind == "worse" else task.better)
    shown = f"; {len(pairs)} are shown" if len(pairs) < count else ""
    return Group(
        title=f"{'Worse' if kind == 'worse' else 'Better'} under B",
        text=f"{count:,} sample{'s' * (count != 1)}{shown}.",
        cards=tuple(_card(kind, pair, comparison, questions.get(pair[0].index)) for pair in pairs),
    )


def _card(kind: str, pair: Pair, comparison: Comparison, question: Question | None) -> Card:
    before, after = pair
    asked = question is not None and question.digest == before.digest
    pictures = list(_pictures(question.pieces if asked and question is not None else ()))[:MAX_PICTURES] or [""]
    alt = f"sample {before.id}" if pictures[0] else "picture not at hand" if _has_media(before.prompt) else "text alone"
    expected = before.target if isinstance(before.target, str) else str(before.target)
    return Card(
        image=pictures[0],
        alt=alt,
        source=" - ".join(filter(None, (before.id, before.category))),
        question=shortened(before.prompt.replace("<image>", "").replace("<video>", "").strip(), MAX_LETTERS),
        facts=(
            ("expected", shortened(expected, MAX_LETTERS)),
            ("A", shortened(before.answer, MAX_LETTERS) or "(nothing)"),
            ("B", shortened(after.answer, MAX_LETTERS) or "(nothing)"),
        ),
        verdict="wrong" if kind == "worse" else "right",
        more=tuple((image, alt) for image in pictures[1:]),
    )


def _has_media(prompt: str) -> bool:
    return "<image>" in prompt or "<video>" in prompt


def _questions(
    task: TaskComparison, indices: Sequence[int], settings: Settings, data: Mapping[str, str]
) -> dict[int, Question]:
    """Find samples in the data again, for their pictures; where that fails the page has none."""
    from nvila.evaluation.asking import Question
    from nvila.evaluation.registry import find_task
    from nvila.evaluation.rows import open_rows
    from nvila.evaluation.runner import read_samples
    from nvila_platform.s3_filesystem import data_filesystems

    log = task.reference
    # A task of one's own is found by its file.
    name = log.where if Path(log.where).is_file() else log.name
    wanted = frozenset(indices)
    try:
        found = find_task(name)
        place = None if log.source.startswith("builtin:") else data.get(log.name, log.source)
        rows = open_rows(found, place, filesystems=data_filesystems(settings))
        samples = read_samples(found, rows, max(wanted, default=-1) + 1, wanted=wanted.__contains__)
        return {sample.index: sample for sample in samples if isinstance(sample, Question)}
    except (NvilaError, OSError) as e:
        logger.warning("the page shows %s without pictures: %s", log.name, e)
        return {}


def _pictures(pieces: Iterable[Piece]) -> Iterable[str]:
    for piece in pieces:
        if piece.kind == "text":
            continue
        try:
            for image in _images(piece):
                yield data_uri(load_image(image))
        except NvilaError as e:
            logger.warning("the page leaves a picture out: %s", e)


def _images(piece: Piece) -> Iterable[Any]:
    """Return an image, or some frames of a video."""
    from nvila.data.video import Video, load_video

    if piece.kind == "image":
        return [piece.value]
    if isinstance(piece.value, Video):
        frames = piece.value.frames
        return [frames[len(frames) * n // MAX_PICTURES] for n in range(min(MAX_PICTURES, len(frames)))]
    return list(load_video(piece.value, num_frames=MAX_PICTURES).frames)
