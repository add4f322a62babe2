"""From the fields of one row to a record, or to the reason why there is none."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvila.data.readers.media import BytesMedia, MediaFolder
from nvila.data.readers.placing import place_media
from nvila.data.readers.problems import RecordError, kind_of, one_line, text_of
from nvila.data.readers.record import MediaSource, Record
from nvila.data.readers.rows import Row
from nvila.data.readers.shapes import CONVERSATION_FIELDS, KINDS, MediaKind, Piece, Turn, turns_of
from nvila.data.records import Message, Part, Sample

IDS = ("id", "question_id", "uid")
SOURCES = ("source", "data_source")
KNOWN_FIELDS = (*IDS, *SOURCES, "image", "images", "video", "videos", *CONVERSATION_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordParser:
    """Parses the rows of one data file.

    Args:
        name: The file's name, for messages.
        stem: Begins the ids of records that have none.
        uri: Begins the keys of media that have no file of their own.
        media: Resolves the paths in records.
        source: Source of records that name none.
        force_source: Whether `source` also wins over what records name.
        rename: Fields of the file by the names that they have here: `{"query": "question"}`.
    """

    name: str
    stem: str
    uri: str
    media: MediaFolder
    source: str
    force_source: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a file that mean something."""
        return frozenset((*KNOWN_FIELDS, *self.rename))

    def __call__(self, row: Row, *, index: int, position: int) -> Record:
        """Parse a row.

        Args:
            row: What the file holds.
            index: Its position in the data set.
            position: Its position in the file.
        """
        where = f"{self.name}:{row.place or position + 1}"
        if row.fields is None:
            problem = one_line(row.problem or "unreadable")
            return Record(index=index, where=where, sample=None, problem=problem, source=self.source)
        fields = self._renamed(row.fields)
        sources: dict[str, MediaSource] = {}
        try:
            sample = self._sample(fields, row.id or f"{self.stem}:{position}", f"{self.uri}#{position}", sources)
        except RecordError as e:
            problem = one_line(str(e))
            return Record(index=index, where=where, sample=None, problem=problem, source=self._source_of_bad(fields))
        return Record(index=index, where=where, sample=sample, media=sources)

    def _renamed(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.rename:
            return fields
        renamed = {self.rename[name]: value for name, value in fields.items() if name in self.rename}
        return {name: value for name, value in fields.items() if name not in self.rename} | renamed

    def _sample(self, fields: Mapping[str, Any], id: str, place: str, sources: dict[str, MediaSource]) -> Sample:
        media: dict[MediaKind, Sequence[object]] = {kind: _media_values(fields, kind) for kind in KINDS}
        turns = place_media(turns_of(fields), media)
        _check_answers(turns)

        def part(piece: Piece) -> Part:
            if isinstance(piece, str):
                return Part(type="text", value=piece)
            key, source = self._medium(piece.value, f"{piece.kind} {len(sources) + 1}", f"{place}/{len(sources)}")
            sources[key] = source
            return Part(type=piece.kind, value=key)

        messages = [Message(role=turn.role, content=tuple(map(part, turn.pieces))) for turn in turns]
        return Sample(id=_name(fields, IDS) or id, source=self._source(fields), messages=tuple(messages))

    def _source_of_bad(self, fields: Mapping[str, Any]) -> str:
        try:
            return self._source(fields)
        except RecordError:  # the source itself may be what is wrong
            return self.source

    def _source(self, fields: Mapping[str, Any]) -> str:
        return self.source if self.force_source else _name(fields, SOURCES) or self.source

    def _medium(self, value: Any, what: str, key: str) -> tuple[str, MediaSource]:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
            if not value:
                raise RecordError(f"{what} has neither bytes nor a path")
        if isinstance(value, bytes):
            return key, BytesMedia(value)
        if not isinstance(value, str):
            raise RecordError(f"{what} is {kind_of(value)} instead of a path or bytes")
        if value.startswith("data:"):
            return key, BytesMedia(_decoded(value, what))
        return self.media.find(text_of(value, what))


def _media_values(fields: Mapping[str, Any], kind: MediaKind) -> Sequence[object]:
    """Return what the fields hold of a kind; of `images` and `image` the first that holds anything."""
    for name in (f"{kind}s", kind):
        value = fields.get(name)
        if isinstance(value, (list, tuple)):
            value = [one for one in value if not _is_missing(one)]
            if value:
                return value
        elif not _is_missing(value):
            return [value]
    return []


def _is_missing(value: Any) -> bool:
    """Tell whether a field holds no medium; tables that pandas wrote say so with NaN."""
    return value in (None, "", b"") or (isinstance(value, float) and math.isnan(value))


def _check_answers(turns: Sequence[Turn]) -> None:
    if all(turn.role != "user" for turn in turns):
        raise RecordError("no question: nothing is from a user")
    if turns[-1].role != "assistant":
        raise RecordError("no answer: the last turn is not the assistant's")
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and not any(isinstance(piece, str) and piece.strip() for piece in turn.pieces):
            raise RecordError(f"no answer: turn {number} is empty")


def _name(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return text_of(value, f"'{name}'")
    return None


def _decoded(url: str, what: str) -> bytes:
    head, _, text = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it does not say ;base64")
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise RecordError(f"{what} is no base64: {e}") from None
