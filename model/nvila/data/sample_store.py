"""The samples of a training stage on disk: any of them by its number, none of them in memory.

Readers go from front to back, training jumps about. So a data set is passed by once: each sample is checked, measured
and written down with the places of its media. The media stay where they are, but for those that lie inside records.
What cannot be used is quarantined with its reason.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvila.data.media_tiles import MediaReader, MediaSize
from nvila.data.readers.locations import FileSystems, locate
from nvila.data.readers.media import FileMedia, TableFile, TableMedia
from nvila.data.readers.record import CountedStream, MediaSource, Record
from nvila.data.records import Sample
from nvila.data.sample_encoding import Medium, SampleCost, SampleEncoder, media_of
from nvila.data.token_budget import SampleSizes
from nvila.errors import ConfigError, DataError
from nvila.progress import SILENT, Reporter

_INDEX, _COLUMNS, _SAMPLES, _BLOBS = "index.json", "columns.npz", "samples.jsonl", "media.bin"
QUARANTINE = "quarantine.jsonl"
_REPORT_EVERY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """A sample with the sizes and the places of its media."""

    sample: Sample
    where: str
    sizes: Mapping[Medium, MediaSize]
    media: Mapping[Medium, MediaSource]


@dataclass(slots=True)
class SampleStore:
    """Random access to the samples of an indexed data set.

    Args:
        directory: Where `build_store` wrote it.
        sizes: What each sample costs.
        num_bad: Records that were set aside.
    """

    directory: Path
    sizes: SampleSizes
    num_bad: int
    _offsets: NDArray[np.int64]
    _filesystems: FileSystems
    _tables: dict[str, TableFile] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, filesystems: FileSystems | None = None) -> SampleStore:
        """Open a finished store.

        Raises:
            DataError: It is not there, or damaged.
        """
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            with np.load(directory / _COLUMNS, allow_pickle=False) as columns:
                sizes = SampleSizes(**{name: columns[name] for name in ("lengths", "tiles", "prefixes", "groups")})
                offsets = columns["offsets"]
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"the index of training samples in {directory} cannot be read: {e}", "delete it") from e
        return cls(directory, sizes, index["bad"], offsets, filesystems or {})

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> StoredSample:
        """Return a sample; nothing of its media is read."""
        path = self.directory / _SAMPLES
        with path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            line = file.readline()
        try:
            raw = json.loads(line)
        except ValueError as e:
            raise DataError(f"sample {number} in {path} is damaged", f"delete {self.directory}") from e
        media = [(_medium(one), one) for one in raw["media"]]
        return StoredSample(
            sample=Sample.from_dict(raw["sample"], where=raw["where"]),
            where=raw["where"],
            sizes={medium: tuple(one["size"]) for medium, one in media},
            media={medium: self._source(one) for medium, one in media},
        )

    def _source(self, raw: Mapping[str, Any]) -> MediaSource:
        if "uri" in raw:
            return FileMedia(locate(raw["uri"], self._filesystems))
        if "table" in raw:
            if raw["table"] not in self._tables:
                self._tables[raw["table"]] = TableFile(locate(raw["table"], self._filesystems))
            return TableMedia(self._tables[raw["table"]], raw["row"])
        return _Blob(self.directory / _BLOBS, *raw["blob"])


@dataclass(frozen=True, slots=True)
class _Blob:
    path: Path
    start: int
    length: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)


def build_store(
    stream: CountedStream,
    reader: MediaReader,
    encoder: SampleEncoder,
    directory: Path,
    *,
    max_bad: float,
    filesystems: FileSystems | None = None,
    reporter: Reporter = SILENT,
) -> SampleStore:
    """Index a data set, or open the index that is there; of several processes one does the work.

    Args:
        stream: The data set.
        reader: Measures media.
        encoder: Measures samples.
        directory: Where the index goes; appears when it is complete.
        max_bad: Largest share of records that may be unusable.
        filesystems: File systems of the media besides local files.
        reporter: Receives progress.

    Raises:
        ConfigError: There are no samples.
        DataError: The data set cannot be read, or too much of it cannot be used; the message counts the reasons.
    """
    with _locked(directory):
        if not (directory / _INDEX).is_file():
            partial = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            writer = _Writer(partial, reader, encoder)
            for record in stream.records():
                writer.add(record)
                if record.index % _REPORT_EVERY == 0:
                    reporter.progress(f"index {stream.name}", record.index + 1, stream.count())
            writer.finish(stream.name, max_bad)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
    return SampleStore.open(directory, filesystems)


class _Writer:
    """Writes samples one after the other; what is kept in memory are a few numbers of each."""

    def __init__(self, directory: Path, reader: MediaReader, encoder: SampleEncoder) -> None:
        self._directory, self._reader, self._encoder = directory, reader, encoder
        self._samples = (directory / _SAMPLES).open("wb")
        self._blobs = (directory / _BLOBS).open("wb")
        self._quarantine = (directory / QUARANTINE).open("w", encoding="utf-8")
        self._columns = {name: array("q") for name in ("lengths", "tiles", "prefixes", "groups", "offsets")}
        self._num_bad, self._first_bad = 0, ""
        # Questions about one medium follow each other, so remembering those of the record before is enough.
        self._before: dict[Medium, dict[str, Any]] = {}

    def add(self, record: Record) -> None:
        """Write a sample down, or why there is none."""
        try:
            line, cost = self._measured(record)
        except (DataError, ConfigError) as e:  # a ConfigError says that the model cannot pool the frames of a video
            entry = {"where": record.where, "id": record.sample.id if record.sample else None, "reason": str(e)}
            self._quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._num_bad += 1
            self._first_bad = self._first_bad or f"{record.where}: {e.message}"
            return
        row = (cost.length, cost.tiles, cost.prefix, cost.group, self._samples.tell())
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        self._samples.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def finish(self, name: str, max_bad: float) -> None:
        """Write the columns and, last, the file that says that everything is there."""
        for file in (self._samples, self._blobs, self._quarantine):
            file.close()
        total = len(self._columns["offsets"]) + self._num_bad
        if not total:
            raise ConfigError(f"the data '{name}' of a training stage is empty", "name data with samples")
        check_bad(self._num_bad, total, max_bad, self._first_bad, self._directory / QUARANTINE)
        columns = {name: np.array(column, np.int64) for name, column in self._columns.items()}
        np.savez(self._directory / _COLUMNS, allow_pickle=False, **columns)
        summary = {"data": name, "samples": len(columns["offsets"]), "bad": self._num_bad}
        (self._directory / _INDEX).write_text(json.dumps(summary), encoding="utf-8")

    def _measured(self, record: Record) -> tuple[dict[str, Any], SampleCost]:
        if record.sample is None:
            raise DataError(record.problem or "the reader gave no reason")
        placed = {medium: self._placed(record, medium) for medium in media_of(record.sample)}
        self._before = placed
        sizes: dict[Medium, MediaSize] = {medium: tuple(one["size"]) for medium, one in placed.items()}
        cost = self._encoder.cost(self._encoder(record.sample, sizes), sizes)
        line = {"sample": record.sample.to_dict(), "where": record.where, "media": list(placed.values())}
        return line, cost

    def _placed(self, record: Record, medium: Medium) -> dict[str, Any]:
        if medium in self._before:
            return self._before[medium]
        kind, key = medium
        if key not in record.media:
            raise DataError(f"{kind} '{key}' is nowhere", "keep samples and media together")
        source = record.media[key]
        size = self._reader.measure(kind, key, source.read)
        return {"kind": kind, "key": key, "size": size, **self._place(source)}

    def _place(self, source: MediaSource) -> dict[str, Any]:
        if isinstance(source, FileMedia):
            return {"uri": source.location.uri}
        if isinstance(source, TableMedia):
            return {"table": source.table.location.uri, "row": source.key}
        data = source.read()
        start = self._blobs.tell()
        self._blobs.write(data)
        return {"blob": [start, len(data)]}


def check_bad(bad: int, total: int, max_bad: float, first: str, quarantine: Path) -> None:
    """Refuse data of which too much cannot be used.

    Raises:
        DataError: More than the share `max_bad`, or all of it.
    """
    if bad > max_bad * total or bad == total:
        raise DataError(
            f"{bad} of {total} samples cannot be used, more than the {max_bad:.1%} of max_bad; first: {first}",
            f"{quarantine} names each; mend the data, or raise max_bad (of nvila tune: --max-bad) or, where samples "
            "are too long, max_length (--max-length)",
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the system frees the lock of one that dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _medium(raw: Mapping[str, Any]) -> Medium:
    return raw["kind"], raw["key"]
