"""The report of a curated data set: one HTML file that needs nothing else, and its plots as files for MLflow."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.data.images import load_image
from nvila.data.records import Sample
from nvila.errors import NvilaError
from nvila_pipelines.report import plots
from nvila_pipelines.report.curation_panels import Selection, selection_of
from nvila_pipelines.report.formats import percent, shortened
from nvila_pipelines.report.gallery import curated
from nvila_pipelines.report.images import data_uri
from nvila_pipelines.report.score_summary import Score, summarise
from nvila_pipelines.report.sections import Bar
from nvila_platform.artifacts import write_atomically

if TYPE_CHECKING:
    from nvila.curation.choosing import SourceCount
    from nvila.data.readers.record import MediaSource, RecordStream

logger = logging.getLogger(__name__)

REPORT = "report.html"
PLOTS = "plots"
_TEMPLATE = "curation.html.j2"
_MAX_SOURCES = 100


def write_curation_report(
    out: Path,
    *,
    name: str,
    method: str,
    sources: Mapping[str, SourceCount],
    statuses: Mapping[str, int],
    stream: RecordStream | None,
    made: Mapping[str, str],
    cache: Path | None = None,
) -> Path:
    """Write `report.html` and `plots/*.svg` into the directory of a selection.

    Args:
        out: Directory with the scores, the selection and the quarantine.
        name: Of the data set.
        method: How was chosen, in words.
        sources: What every source has.
        statuses: Records of each status.
        stream: The data set, for the samples that are shown; None shows none.
        made: What the selection was made of, by label.
        cache: Where matplotlib keeps its list of fonts.

    Returns:
        The HTML file.
    """
    summary = summarise(out / "scores.parquet", out / "selection.parquet", out)
    pictures = RecordPictures()
    with plots.cached_in(cache):
        find = (lambda scores: {}) if stream is None else _samples_of(stream, pictures)
        selection = selection_of(summary, curated(summary.ends, find, pictures))
    _write_plots(out / PLOTS, selection)
    page = (
        environment()
        .get_template(_TEMPLATE)
        .render(
            name=name,
            kept=f"{summary.kept:,} of {summary.records:,} records",
            method=method,
            bad=f"{summary.records - summary.scored:,}",
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            sources=_source_rows(sources),
            selection=selection,
            problems=_problems(out / "quarantine.jsonl", statuses),
            made=list(made.items()),
        )
    )
    write_atomically(out / REPORT, page)
    return out / REPORT


class RecordPictures:
    """The pictures of some records, read through the reader that knows where they are."""

    def __init__(self) -> None:
        self.media: dict[str, tuple[str, MediaSource]] = {}

    def uri(self, key: str) -> str:
        """Return an image, or the first frame of a video, as a data URI; empty when it cannot be shown."""
        from nvila.data.video import load_video

        if key not in self.media:
            return ""
        kind, source = self.media[key]
        try:
            data = source.read()
            if kind == "image":
                return data_uri(load_image(data))
            return data_uri(load_image(load_video(data, num_frames=1).frames[0]))
        except NvilaError as e:
            logger.warning("the report leaves a picture out: %s", e)
            return ""


def _samples_of(stream: RecordStream, pictures: RecordPictures) -> Callable[[Collection[Score]], Mapping[int, Sample]]:
    """Find samples by reading the data set once from front to back, and remember where their media are."""

    def find(scores: Collection[Score]) -> dict[int, Sample]:
        found: dict[int, Sample] = {}
        for position in sorted({score.position for score in scores}):
            for record in stream.records(position, position + 1):
                if record.sample is None:
                    continue
                found[position] = record.sample
                for message in record.sample.messages:
                    for part in message.content:
                        if part.type != "text" and part.value in record.media:
                            pictures.media[part.value] = (part.type, record.media[part.value])
        return found

    return find


def environment() -> Any:
    """Return the templates of this folder; they escape what they are given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source_rows(sources: Mapping[str, SourceCount]) -> tuple[Bar, ...]:
    largest = sorted(sources, key=lambda source: (-sources[source].records, source))[:_MAX_SOURCES]
    return tuple(
        Bar(
            label=source,
            cells=(
                f"{count.records:,}",
                f"{count.scored:,}",
                f"{count.kept:,}",
                f"{count.records - count.kept:,}",
                "-" if count.boundary is None else f"{count.boundary:+.3f}",
            ),
            share=count.kept / count.records if count.records else 0.0,
        )
        for source, count in sources.items()
        if source in set(largest)
    )


def _problems(quarantine: Path, statuses: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    from nvila.curation.problems import MEANINGS, OK

    wanted = {status for status in statuses if status != OK}
    first: dict[str, str] = {}
    with quarantine.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            first.setdefault(row["status"], shortened(f"{row['where']}: {row['reason']}"))
            if wanted <= first.keys():
                break
    total = sum(statuses.values())
    return [
        (status, f"{statuses[status]:,} ({percent(statuses[status] / total)})", MEANINGS[status], first.get(status, ""))
        for status in sorted(wanted, key=lambda status: -statuses[status])
    ]


def _write_plots(folder: Path, selection: Selection) -> None:
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.svg"):
        left.unlink()
    named = [(f"delta-{number:02d}-{_slug(panel.title)}", panel) for number, panel in enumerate(selection.panels)]
    for stem, panel in [*named, ("likelihoods", selection.scatter)]:
        write_atomically(folder / f"{stem}.svg", plots.standalone(panel.svg))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "source"
