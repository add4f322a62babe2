"""Describing an evaluation set, and putting a summary of drift into words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from nvila.errors import DataError
from nvila_platform.drift.features import FEATURES, Values, answer_features, request_features
from nvila_platform.drift.reference import Reference, build_reference
from nvila_platform.drift.watch import verdict

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.readers.record import CountedStream, Record
    from nvila.progress import Reporter


def describe(stream: CountedStream, limit: int, reporter: Reporter) -> tuple[Reference, int]:
    """Describe the first records of a data set.

    Returns:
        The reference, and how many records were left out because they or their images cannot be used.

    Raises:
        ConfigError: No record can be used.
        DataError: The data set itself cannot be read.
    """
    total = min(limit, stream.count())
    skipped = 0

    def observed() -> Iterator[Values]:
        nonlocal skipped
        for number, record in enumerate(stream.records(stop=total), 1):
            reporter.progress("describe", number, total)
            try:
                yield _features(record)
            except DataError:
                skipped += 1

    return build_reference(observed(), stream.name), skipped


def _features(record: Record) -> Values:
    if record.sample is None:
        raise DataError(f"{record.where}: {record.problem}")
    images = [_image(record, key) for key in record.sample.images]
    return request_features(record.sample.question, images) | answer_features(len(record.sample.answer))


def _image(record: Record, key: str) -> Image.Image:
    from nvila.data.images import load_image

    return load_image(BytesIO(record.media[key].read()))


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Put a server's summary into lines: the most drifted feature first."""
    reference = summary["reference"]
    yield (
        f"{summary['requests']} requests, a share of {summary['share']:g}, against {reference['samples']} samples of "
        f"{reference['data']}"
    )
    for name, found in by_drift(summary):
        psi = "-" if found["psi"] is None else f"{found['psi']:.3f}"
        meaning = FEATURES.get(name, name)
        yield f"  {name:<15} {psi:>7}  {verdict(found['psi']):<8}  {found['seen']:>6} values  {meaning}"


def by_drift(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the features, the most drifted first, those without a number last."""
    return sorted(summary["features"].items(), key=lambda item: 1.0 if item[1]["psi"] is None else -item[1]["psi"])
