"""From a row of data to what is asked: texts and media in order, and the reference that answers are scored by."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvila.data.readers.locations import LOCAL
from nvila.data.readers.media import MediaFolder
from nvila.data.readers.problems import RecordError
from nvila.errors import DataError
from nvila.evaluation.rows import IMAGES, VIDEOS, TaskRows
from nvila.evaluation.scorers.choices import LETTERS
from nvila.evaluation.subtitles import read_subtitles, shown_at
from nvila.evaluation.task import CHOICES, SUBTITLES, Columns, Task, names_in

_PLACE = re.compile(r"<image (\d+)>")
_OWN_LETTER = re.compile(r"^\(?([A-Z])[.):]\s*")
_SECONDS = re.compile(r"<(\d+(?:\.\d+)?)>")
# A long video is known by its size, its first and its last bytes.
_HEAD_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of what is asked: a text, bytes of an image, a video as bytes, path or frames; None when dropped."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One sample of a task.

    Args:
        index: Its number in the data.
        id: What the data calls it.
        pieces: What is asked, in order.
        reference: What answers are scored by.
        group: What results are told apart by; None where the task does not.
        digest: Identity of all of this.
    """

    index: int
    id: str
    pieces: tuple[Piece, ...]
    reference: Mapping[str, Any]
    group: str | None
    digest: str

    @property
    def prompt(self) -> str:
        """The texts, with a marker for every medium."""
        return "".join(piece.value if piece.kind == "text" else f"<{piece.kind}>" for piece in self.pieces)

    def without_media(self) -> Question:
        """Return it with its texts alone, which is enough to score it: media of a whole task would fill the memory."""
        return replace(
            self, pieces=tuple(piece if piece.kind == "text" else Piece(piece.kind, None) for piece in self.pieces)
        )


class Asker:
    """Makes the questions of a task.

    Args:
        task: The task.
        rows: Its data.
    """

    def __init__(self, task: Task, rows: TaskRows) -> None:
        self.task, self._rows = task, rows
        home = rows.home
        self._folder = MediaFolder(home=home, root=home) if home is not None else None

    def question(self, index: int, fields: Mapping[str, Any]) -> Question:
        """Return the question of a row.

        Raises:
            DataError: The row lacks a column, holds something of the wrong kind, or a medium cannot be read.
        """
        reference = self._reference(fields)
        videos = self._videos(fields)
        frames = self.task.file.generation.num_frames
        if self.task.file.subtitles is not None:
            videos, reference = self._with_subtitles(fields, videos, reference, frames)
        text = _prompt(self.task, reference)
        pieces = (*videos, *self._with_images(text, self._images(fields)))
        self.task.scorer.score("", reference)  # what is wrong with a reference shows before anything is answered
        group = self.task.file.group_by
        return Question(
            index=index,
            id=str(reference.get("id", fields.get("id", index))),
            pieces=pieces,
            reference=reference,
            group=str(reference[group]) if group is not None else None,
            digest=_digest(pieces, reference),
        )

    def _reference(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        file = self.task.file
        reference = dict(file.constants) | {name: self._value(fields, where) for name, where in file.fields.items()}
        if CHOICES in reference:
            reference[CHOICES] = _choices(reference[CHOICES], file.no_choice)
        if file.answer_is == "index":
            reference["answer"] = _by_index(reference["answer"], reference[CHOICES])
        elif file.answer_is == "span":
            reference["answer"] = [float(text) for text in _SECONDS.findall(str(reference["answer"]))]
        return reference

    def _value(self, fields: Mapping[str, Any], columns: Columns) -> Any:
        if isinstance(columns, str):
            return self._cell(fields, columns)
        if isinstance(columns, Mapping):
            return {name: self._cell(fields, column) for name, column in columns.items()}
        return [self._cell(fields, column) for column in columns]

    def _cell(self, fields: Mapping[str, Any], column: str) -> Any:
        if column not in fields:
            raise DataError(f"the row has no column '{column}'", f"the task {self.task.name} needs it")
        return fields[column]

    def _images(self, fields: Mapping[str, Any]) -> list[Piece]:
        columns = self.task.file.images
        cells: list[Any] = [
            self._path(fields, [column]).read_bytes() if names_in(column) else self._cell(fields, column)
            for column in columns
        ] or [fields.get(IMAGES)]
        found: list[Piece] = []
        for cell in cells:
            for item in cell if isinstance(cell, list | tuple) else [cell]:
                if item is not None:
                    found.append(Piece("image", self._image(item)))
        return found

    def _image(self, item: Any) -> bytes:
        """Return the encoded bytes of an image: as they are, in a struct of `datasets`, or in a file."""
        if isinstance(item, Mapping):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            return item
        if hasattr(item, "read"):
            return bytes(item.read())
        if isinstance(item, str) and self._folder is not None:
            try:
                return self._folder.find(item)[1].read()
            except RecordError as e:
                raise DataError(str(e), "put the images below the data") from e
        raise DataError(f"an image is a {type(item).__name__}", "give encoded bytes, or a path below the data")

    def _videos(self, fields: Mapping[str, Any]) -> list[Piece]:
        found = [Piece("video", item.read()) for item in fields.get(VIDEOS, ())]
        if self.task.file.videos:
            found.append(Piece("video", self._path(fields, self.task.file.videos)))
        return found

    def _path(self, fields: Mapping[str, Any], templates: Sequence[str]) -> Path:
        """Return the first file that exists."""
        if self._folder is None or self._folder.root.scheme != LOCAL:
            raise DataError(
                f"files beside {self._rows.name} are not on this machine", "download the data, and give its folder"
            )
        tried = []
        for template in templates:
            values = {column: self._cell(fields, column) for column in names_in(template)}
            try:
                path = Path(self._folder.find(template.format(**values))[0])
            except RecordError as e:
                raise DataError(str(e), "put the files below the data") from e
            if path.exists():
                return path
            tried.append(str(path))
        raise DataError(
            f"{tried[0]} does not exist", "put the file there" + "".join(f", or {path}" for path in tried[1:])
        )

    def _with_subtitles(
        self, fields: Mapping[str, Any], videos: list[Piece], reference: dict[str, Any], frames: int | None
    ) -> tuple[list[Piece], dict[str, Any]]:
        """Sample the frames now: the lines that are shown then belong into the prompt."""
        from nvila.data.video import load_video

        assert frames is not None, "checked with the task"
        video = load_video(videos[0].value, num_frames=frames)
        lines = ""
        try:
            path = self._path(fields, [self.task.file.subtitles or ""])
        except DataError:
            pass  # not every video of a benchmark has subtitles
        else:
            lines = "\n".join(shown_at(read_subtitles(path), video.timestamps))
        return [Piece("video", video)], reference | {SUBTITLES: lines}

    def _with_images(self, text: str, images: list[Piece]) -> Iterator[Piece]:
        """Yield the text with its images: at their places, or in front."""
        if not self.task.file.interleave:
            yield from images
            yield Piece("text", text)
            return
        used: set[int] = set()
        end = 0
        for match in _PLACE.finditer(text):
            number = int(match[1])
            if number in used:
                continue  # mentioned again: it stays text
            if not 1 <= number <= len(images):
                raise DataError(f"the prompt says {match[0]}, but there are {len(images)} images", "check the row")
            used.add(number)
            if before := text[end : match.start()]:
                yield Piece("text", before)
            yield images[number - 1]
            end = match.end()
        if rest := text[end:]:
            yield Piece("text", rest)


def _prompt(task: Task, reference: Mapping[str, Any]) -> str:
    file = task.file
    choices = reference.get(CHOICES) or []
    values = {name: "" if value is None else str(value) for name, value in reference.items()}
    letters = zip(LETTERS, choices, strict=False)
    values[CHOICES] = "\n".join(file.choice_line.format(letter=letter, text=choice) for letter, choice in letters)
    for name, text in file.optional.items():
        values[name] = text.format(**values) if values[name] else ""
    template = file.prompt if choices or file.prompt_open is None else file.prompt_open
    return template.format(**values)


def _choices(value: Any, no_choice: str | None) -> list[str]:
    """Return the choices of a sample, without letters of their own."""
    if isinstance(value, str):
        value = _listed(value)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"the choices are a {type(value).__name__}", "map them to a list, or to one column a choice")
    texts = [str(item).strip() for item in value if item is not None and str(item) != no_choice]
    if len(texts) > len(LETTERS):
        raise DataError(f"there are {len(texts)} choices", f"at most {len(LETTERS)} can be told by letters")
    own = [_OWN_LETTER.match(text) for text in texts]
    if texts and all(match and match[1] == letter for match, letter in zip(own, LETTERS, strict=False)):
        texts = [_OWN_LETTER.sub("", text, count=1) for text in texts]
    return texts


def _listed(text: str) -> Any:
    """Read a list that stands as text in a column, as MMMU has it; nothing in it is run."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as e:
        raise DataError(f"the choices {text[:40]!r} are no list", "write ['one', 'two']") from e


def _by_index(value: Any, choices: Sequence[str]) -> str:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(choices):
        raise DataError(f"the answer {value!r} is no index of {len(choices)} choices", "count from 0")
    return LETTERS[number]


def _digest(pieces: Sequence[Piece], reference: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(reference, sort_keys=True, default=str).encode())
    for piece in pieces:
        digest.update(f"\0{piece.kind}\0".encode())
        for part in _bytes(piece.value):
            digest.update(part)
    return digest.hexdigest()


def _bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode()
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, Path):
        for file in sorted(value.iterdir()) if value.is_dir() else [value]:
            size = file.stat().st_size
            yield f"{file.name}\0{size}\0".encode()
            with file.open("rb") as stream:
                yield stream.read(_HEAD_BYTES)
                stream.seek(max(_HEAD_BYTES, size - _HEAD_BYTES))
                yield stream.read(_HEAD_BYTES)
    else:  # sampled frames
        yield value.frames.tobytes()
