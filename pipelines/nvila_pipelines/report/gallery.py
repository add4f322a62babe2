"""Samples as pictures: what curation kept or ignored, and what the model answered."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nvila.data.media import ImageTable
from nvila.data.records import Sample, read_jsonl
from nvila_pipelines.report.formats import shortened
from nvila_pipelines.report.images import Thumbnails
from nvila_pipelines.report.outputs import Outputs
from nvila_pipelines.report.score_summary import End, Score

NUM_CURATED = 6
_RANKS: dict[End, Callable[[Score], float]] = {
    "informative": lambda score: -score.delta,
    "redundant": lambda score: abs(score.delta),
    "distracting": lambda score: score.delta,
}
# Letters of a question or answer: six samples shall be seen at a glance.
MAX_LETTERS = 160
# Pictures of one sample; a document of fifty pages would fill the page.
MAX_PICTURES = 4
NUM_WRONG = 12
NUM_RIGHT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One sample as a picture with its question.

    Args:
        image: Data URI; empty when the sample has no image that can be shown.
        alt: What the picture is, for readers who cannot see it.
        source: Where the sample comes from; the question kind for easy-VQA.
        question: The question, shortened.
        facts: Label and value of what belongs to it, in order.
        verdict: "right" or "wrong" for an answered question, else empty.
        more: Further pictures of the same sample, each as data URI and what it is.
    """

    image: str
    alt: str
    source: str
    question: str
    facts: tuple[tuple[str, str], ...]
    verdict: str = ""
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cards under one heading with one sentence about them."""

    title: str
    text: str
    cards: tuple[Card, ...]


class Pictures(Protocol):
    """Gives images of a data set as small data URIs."""

    def uri(self, key: str) -> str:
        """Return an image as a data URI, or the empty string when it cannot be shown."""


def thumbnails(outputs: Outputs) -> Thumbnails:
    """Open the image table of the run.

    Raises:
        ArtifactError: The data step has no images.
        DataError: The table is damaged.
    """
    return Thumbnails(ImageTable.open(outputs.file("data", "images.parquet")))


def curated(
    ends: Mapping[End, Sequence[Score]], samples: Callable[[Collection[Score]], Mapping[int, Sample]], images: Pictures
) -> tuple[Group, ...]:
    """Show the samples at both ends and in the middle of the delta scale, spread over the sources.

    Args:
        ends: Samples to choose from, best first; see `score_summary`.
        samples: Finds the samples of scores, by position.
        images: Their pictures.
    """
    chosen = {end: _spread(ends[end], rank) for end, rank in _RANKS.items()}
    found = samples([score for group in chosen.values() for score in group])
    texts: dict[End, tuple[str, str]] = {
        "informative": ("Most informative", "The large scorer knows the answer, the small one does not yet."),
        "redundant": ("Redundant", "Delta near 0: both scorers find the answer equally likely."),
        "distracting": (
            "Distracting",
            "The most negative delta: the larger scorer finds the answer less likely than the small one.",
        ),
    }
    return tuple(
        Group(
            title=title,
            text=text,
            cards=tuple(
                _scored(score, found[score.position], images) for score in chosen[end] if score.position in found
            ),
        )
        for end, (title, text) in texts.items()
    )


def samples_by_id(path: Path) -> Callable[[Collection[Score]], Mapping[int, Sample]]:
    """Find samples in a file of our own form, by the ids of their scores."""

    def find(scores: Collection[Score]) -> dict[int, Sample]:
        positions = {score.id: score.position for score in scores}
        return {positions[sample.id]: sample for sample in read_jsonl(path) if sample.id in positions}

    return find


def answered(rows: Iterable[Mapping[str, Any]], images: Thumbnails) -> tuple[Group, ...]:
    """Show wrong answers first, then right ones, each spread over the question kinds and over the images."""
    by_verdict: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    for row in rows:
        by_verdict[bool(row["correct"])].append(row)
    wrong, right = by_verdict[False], by_verdict[True]
    return (
        Group(
            title="Wrong answers",
            text=_shown(len(wrong), NUM_WRONG, "wrong answer") if wrong else "There is no wrong answer.",
            cards=tuple(_answer(row, images) for row in _pick(wrong, NUM_WRONG)),
        ),
        Group(
            title="Right answers",
            text=_shown(len(right), NUM_RIGHT, "right answer") if right else "There is no right answer.",
            cards=tuple(_answer(row, images) for row in _pick(right, NUM_RIGHT)),
        ),
    )


def _spread(scores: Sequence[Score], rank: Callable[[Score], float]) -> list[Score]:
    """Take the best of every source in turn, so that no source fills the gallery."""
    queues: dict[str, list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: (rank(score), score.position)):
        if len(queues[score.source]) < NUM_CURATED:
            queues[score.source].append(score)
    picked: list[Score] = []
    while len(picked) < NUM_CURATED and any(queues.values()):
        best = sorted((queue.pop(0) for queue in queues.values() if queue), key=rank)
        picked.extend(best[: NUM_CURATED - len(picked)])
    return sorted(picked, key=rank)


def _pick(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Take rows of every kind in turn; rows stand together by image, so a stride gives different images."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[str(row["source"])].append(row)
    # A different start in every kind: the first question of each would show the same image.
    queues = [_strided(kinds[kind], limit, number / len(kinds)) for number, kind in enumerate(sorted(kinds))]
    picked: list[Mapping[str, Any]] = []
    while len(picked) < limit and any(queues):
        picked.extend(queue.pop(0) for queue in queues if queue)
    return picked[:limit]


def _strided(rows: Sequence[Mapping[str, Any]], limit: int, offset: float) -> list[Mapping[str, Any]]:
    stride = len(rows) / min(limit, len(rows))
    return [rows[int((number + offset) * stride)] for number in range(min(limit, len(rows)))]


def _scored(score: Score, sample: Sample, images: Pictures) -> Card:
    media = [part for message in sample.messages for part in message.content if part.type != "text"]
    shown = [_picture(part.value, images, part.type) for part in media[:MAX_PICTURES]]
    image, alt = shown[0] if shown else _picture("", images)
    answers = [message.text for message in sample.messages if message.role == "assistant"]
    left_out = [("pictures", f"{len(shown)} of {len(media)}")] if len(media) > len(shown) else []
    return Card(
        image=image,
        alt=alt,
        more=tuple(shown[1:]),
        source=score.source,
        question=shortened(sample.question, MAX_LETTERS),
        facts=(
            ("answer" if len(answers) == 1 else "answers", shortened(" / ".join(answers), MAX_LETTERS)),
            *left_out,
            ("likely to small", _likelihood(score.small)),
            ("likely to large", _likelihood(score.large)),
            ("delta", _signed(score.delta)),
        ),
    )


def _answer(row: Mapping[str, Any], images: Thumbnails) -> Card:
    image, alt = _picture(str(row.get("image") or ""), images)
    right = bool(row["correct"])
    given = ("answered", shortened(str(row["prediction"])) or "(nothing)")
    return Card(
        image=image,
        alt=alt,
        source=str(row["source"]),
        question=shortened(str(row["question"])),
        facts=(given,) if right else (given, ("expected", shortened(str(row["answer"])))),
        verdict="right" if right else "wrong",
    )


def _picture(key: str, images: Pictures, kind: str = "image") -> tuple[str, str]:
    if not key:
        return "", "no image"
    image = images.uri(key)
    name = "/".join(key.split("/")[-2:])
    return image, f"{kind} {name}" if image else f"{kind} {name} cannot be shown"


def _likelihood(nll: float) -> str:
    # The whole answer's likelihood; a loss of 0.02 says less to a reader than 98 %, but one of 20 more than 0 %.
    share = math.exp(-nll) if math.isfinite(nll) and nll >= 0 else 0.0
    return f"{share * 100:.1f} %" if share >= 0.001 else f"e^-{nll:.1f}"


def _signed(delta: float) -> str:
    return "0.000" if abs(delta) < 0.0005 else f"{delta:+.3f}"


def _shown(total: int, limit: int, noun: str) -> str:
    if total == 1:
        return f"The only {noun}."
    return f"All {total} {noun}s." if total <= limit else f"{limit} of {total:,} {noun}s, from all kinds of questions."
