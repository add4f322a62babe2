"""Shards of scores: which records they hold, who scores them, and how they appear, whole or not at all.

Shard k holds the records k * size to (k + 1) * size - 1 and belongs to rank k % world. It is one Parquet file with a
row for every record, also for those that have no score, so nothing that was read can be lost between two files. The
first shard with fewer rows than the size is the last one. A file carries the digest of what its scores depend on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nvila.errors import ArtifactError, ConfigError

SHARDS = "shards"
_DIGEST = b"nvila.scoring"
_GROUP_ROWS = 2**16
_NAME = re.compile(r"scores-([0-9]{5,})\.parquet")

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("where", pa.string()),
        ("nll_small", pa.float64()),
        ("nll_large", pa.float64()),
        ("tokens_small", pa.int32()),
        ("tokens_large", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The shards of one data set in one directory.

    Args:
        directory: Where they are.
        size: Records of a shard.
        digest: Identity of everything that the scores depend on.
    """

    directory: Path
    size: int
    digest: str

    def own(self, rank: int, world: int) -> Iterator[int]:
        """Yield the numbers of a rank's shards, for ever."""
        number = rank
        while True:
            yield number
            number += world

    def path(self, number: int, kind: str = "scores") -> Path:
        """Return the file of a shard."""
        return self.directory / f"{kind}-{number:05d}.parquet"

    def rows(self, number: int, kind: str = "scores") -> int | None:
        """Return the number of rows of a finished shard, None when it is not finished.

        Raises:
            ConfigError: The file holds scores of something else.
            ArtifactError: It is damaged.
        """
        path = self.path(number, kind)
        if not path.exists():
            return None
        metadata = _metadata(path)
        found = (metadata.schema.to_arrow_schema().metadata or {}).get(_DIGEST, b"").decode()
        if found != self.digest:
            raise ConfigError(
                f"{path} holds scores of another configuration ({found[:12] or 'unknown'}, not {self.digest[:12]})",
                "choose another folder, or delete this one to score again",
            )
        return int(metadata.num_rows)

    def read(self, number: int, kind: str = "scores", columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of a finished shard, all columns of them or some.

        Raises:
            ArtifactError: It is damaged.
        """
        path = self.path(number, kind)
        try:
            return pq.read_table(path, columns=None if columns is None else list(columns))
        except (OSError, pa.ArrowException) as e:
            raise ArtifactError(f"{path} cannot be read: {e}", "delete it and run the same command again") from e

    def publish(self, number: int, table: pa.Table, kind: str = "scores") -> None:
        """Write a shard; it appears under its name once it is on the disk."""
        self.directory.mkdir(parents=True, exist_ok=True)
        marked = table.replace_schema_metadata({_DIGEST: self.digest.encode()})
        write_parquet(marked, self.path(number, kind))

    def finished(self) -> list[int] | None:
        """Return the numbers of all shards, in order, once none is missing; else None.

        Raises:
            ConfigError: A file holds scores of something else.
            ArtifactError: A file is damaged.
        """
        numbers: list[int] = []
        while (rows := self.rows(len(numbers))) is not None:
            numbers.append(len(numbers))
            if rows < self.size:
                return numbers
        return None

    def present(self) -> list[int]:
        """Return the numbers of the finished shards, whether or not others are missing."""
        matches = (_NAME.fullmatch(path.name) for path in sorted(self.directory.glob("scores-*.parquet")))
        return [int(match[1]) for match in matches if match]

    def tidy(self) -> None:
        """Remove what finished shards no longer need: halves of sequential runs, empty files behind the last shard."""
        last = len(self.finished() or ()) - 1
        for path in self.directory.glob("small-*.parquet"):
            path.unlink()
        for number in self.present():
            if 0 <= last < number:
                self.path(number).unlink()
                self.path(number, "features").unlink(missing_ok=True)
        for path in self.directory.glob(".*.tmp"):
            path.unlink()


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table under another name, have it on the disk, and rename it."""
    with ParquetFile(path, table.schema) as file:
        file.write(table)


class ParquetFile:
    """A Parquet file that appears under its name when the `with` block ends well.

    Args:
        path: The file; an existing one is replaced at once.
        schema: Of its rows.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._schema = schema
        self._writer: Any = None

    def __enter__(self) -> ParquetFile:
        self._waiting: list[pa.Table] = []
        self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        return self

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows; they are gathered, because many small groups of rows make a slow file."""
        self._waiting.append(rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows]))
        if sum(table.num_rows for table in self._waiting) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).cast(self._schema))
            self._waiting = []

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        publish_file(self._temporary, self._path)


def publish_file(temporary: Path, path: Path) -> None:
    """Have a finished file on the disk and give it its name."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def write_lines(path: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """Write lines under another name, have them on the disk, and rename the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(lines)
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as e:
        raise ArtifactError(f"{path} is damaged: {e}", "delete it and run the same command again") from e


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
