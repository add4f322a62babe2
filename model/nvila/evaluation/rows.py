"""The rows of a task's data: a folder or file in any format that the readers know, a Hub id, or a built-in set."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from nvila.data.readers.formats import data_files
from nvila.data.readers.locations import FileSystems, Location, locate
from nvila.data.readers.packages import package
from nvila.data.readers.record import CountedStream
from nvila.data.readers.rows import DataFile, Row
from nvila.errors import ConfigError, DataError, nearest
from nvila.evaluation.task import Task, as_list

HUB = "hub"
IMAGES, VIDEOS = "_images", "_videos"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """Rows of a data set, from front to back, as often as wanted.

    Args:
        name: What it is, for messages and result files.
        read: Yields the rows anew, with at least the columns that are asked for.
        count: Counts them, without reading media.
        home: Folder that paths of media start from; None where media are bytes.
    """

    name: str
    read: Callable[[Collection[str]], Iterator[Row]]
    count: Callable[[], int]
    home: Location | None = None


def open_rows(task: Task, place: str | None, *, filesystems: FileSystems | None = None) -> TaskRows:
    """Open the data of a task.

    Args:
        task: The task.
        place: File, folder or address; `hub` reads the Hub id of the task and `hub:ORG/NAME` another one; None is for
            built-in data.
        filesystems: File systems by scheme besides local files.

    Raises:
        ConfigError: No place is given and the data is not built in, or there is no Hub id.
        DataError: Nothing is there, or a column that the task needs is missing.
    """
    if place is None:
        if task.file.data.builtin is None:
            raise ConfigError(
                f"the task {task.name} has no data here",
                f"give --data {task.name}=FOLDER, {_hub_hint(task)}or --fixture for a few made samples",
            )
        return _builtin(task.file.data.builtin)
    rows = _hub(task, place) if place == HUB or place.startswith(f"{HUB}:") else _files(task, place, filesystems)
    _check_columns(task, rows)
    return rows


def _hub_hint(task: Task) -> str:
    return f"--data {task.name}={HUB} (downloads {task.file.data.hub}) " if task.file.data.hub else ""


def _files(task: Task, place: str, filesystems: FileSystems | None) -> TaskRows:
    location = locate(place, filesystems)
    files = data_files(location)
    home = files[0][0].parent

    def read(columns: Collection[str]) -> Iterator[Row]:
        for file, kind in files:
            name = posixpath.relpath(file.path, home.path)
            rows = kind().open(DataFile(location=file, name=name), columns)
            try:
                yield from rows
            finally:
                rows.close()

    def count() -> int:
        # Where no footer says it, the rows pass by with one column of text.
        narrow = [column for value in task.file.fields.values() for column in as_list(value)][:1]
        known = [kind().count(DataFile(location=file, name=file.path)) for file, kind in files]
        return sum(n for n in known if n is not None) if None not in known else sum(1 for _ in read(narrow))

    return TaskRows(name=place, read=read, count=count, home=home)


def _hub(task: Task, place: str) -> TaskRows:
    hub = place.removeprefix(HUB).removeprefix(":") or task.file.data.hub
    if hub is None:
        raise ConfigError(f"the task {task.name} names no Hub id", f"give --data {task.name}=hub:ORG/NAME")
    datasets = package("datasets")
    try:
        loaded = datasets.load_dataset(hub, task.file.data.config, split=task.file.data.split)
    except (OSError, ValueError, RuntimeError) as e:  # what it raises for names, splits and the network
        raise DataError(f"cannot load {hub} from the Hub: {e}", "check the name, or give a folder") from e
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            # Encoded images are hashed and decoded here, as those of files are.
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    return TaskRows(
        name=f"{HUB}:{hub}", read=lambda columns: (Row(fields=row) for row in loaded), count=lambda: len(loaded)
    )


def _builtin(name: str) -> TaskRows:
    from nvila.data.builtin import BUILTINS, open_builtin

    if name not in BUILTINS:
        raise ConfigError(f"there is no built-in data set '{name}'", nearest(name, BUILTINS))
    return stream_rows(open_builtin(name), f"builtin:{name}")


def stream_rows(stream: CountedStream, name: str) -> TaskRows:
    """Return the records of a data set as rows with `id`, `question`, `answer` and `category`.

    A conversation of several turns has no single question; it is a row with a problem.

    Args:
        stream: The data set.
        name: What it is called.
    """

    def read(columns: Collection[str]) -> Iterator[Row]:
        for record in stream.records():
            sample = record.sample
            if sample is None:
                yield Row(fields=None, problem=record.problem)
                continue
            if [message.role for message in sample.messages if message.role != "system"] != ["user", "assistant"]:
                yield Row(fields=None, problem="it is no question with an answer, but has more or fewer turns")
                continue
            parts = [part for message in sample.messages for part in message.content]
            media: dict[str, list[Any]] = {
                key: [record.media[part.value] for part in parts if part.type == kind]
                for key, kind in ((IMAGES, "image"), (VIDEOS, "video"))
            }
            said = {"id": sample.id, "question": sample.question, "answer": sample.answer, "category": sample.source}
            yield Row(fields=said | media)

    return TaskRows(name=name, read=read, count=stream.count)


def _check_columns(task: Task, rows: TaskRows) -> None:
    """Look at the first row that can be read, before a model is loaded."""
    fields = next((row.fields for row in rows.read(_Everything()) if row.fields is not None), None)
    if fields is None:
        raise DataError(f"{rows.name} holds no row that can be read", "check the file")
    for column in task.columns:
        if column not in fields:
            raise DataError(
                f"{rows.name} has no column '{column}', which the task {task.name} needs", nearest(column, fields)
            )


class _Everything(Collection[str]):
    """Holds every name: to read all columns of a table, so that a missing one can be told from its likes."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        raise TypeError("every name cannot be listed")

    def __len__(self) -> int:
        raise TypeError("every name cannot be counted")
