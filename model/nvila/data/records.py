"""The record type that every reader produces and every consumer takes.

A `Sample` is one conversation about zero or more media in the Hugging Face chat-message shape. Media are references
(keys into a `MediaStore`), so that a sample stays a few hundred bytes and several samples can share one image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvila.errors import DataError

Role = Literal["system", "user", "assistant"]
PartType = Literal["text", "image", "video"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a message: literal text, or the key of an image or video."""

    type: PartType
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The message's text parts joined."""
        return "".join(part.value for part in self.content if part.type == "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training or evaluation record.

    Args:
        id: Unique within its data set.
        source: Name of the data set or sub-set the record came from; curation works per source.
        messages: The conversation; the last message is the assistant's answer.
    """

    id: str
    source: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Keys of the images in the order in which they appear."""
        return tuple(part.value for message in self.messages for part in message.content if part.type == "image")

    @property
    def question(self) -> str:
        """Text of all user turns, joined by line feeds."""
        return "\n".join(message.text for message in self.messages if message.role == "user")

    @property
    def answer(self) -> str:
        """Text of the last message when the assistant wrote it, else the empty string."""
        last = self.messages[-1] if self.messages else None
        return last.text if last is not None and last.role == "assistant" else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: `{"id", "source", "messages": [{"role", "content": [{"type", ...}]}]}`."""
        return {
            "id": self.id,
            "source": self.source,
            "messages": [
                {
                    "role": message.role,
                    "content": [
                        {"type": part.type, ("text" if part.type == "text" else "path"): part.value}
                        for part in message.content
                    ],
                }
                for message in self.messages
            ],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str) -> Sample:
        """Parse one JSON record.

        Args:
            raw: The decoded JSON object.
            where: File and line, for the error message.

        Raises:
            DataError: A field is missing or of the wrong type.
        """
        try:
            messages = tuple(
                Message(role=_role(message["role"]), content=tuple(_part(part) for part in message["content"]))
                for message in raw["messages"]
            )
            sample = cls(id=str(raw["id"]), source=str(raw.get("source", "default")), messages=messages)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(
                f"{where}: not a sample record: {e!r}",
                'expected {"id", "source", "messages": [{"role", "content": [{"type": "text", "text": ...}]}]}',
            ) from e
        if not sample.messages:
            raise DataError(f"{where}: sample '{sample.id}' has no messages", "give it a question and an answer")
        return sample


def vqa_sample(*, id: str, source: str, image: str | None, question: str, answer: str | None) -> Sample:
    """Build the common case: one image, one question, one answer (None leaves the answer open)."""
    content = [Part(type="text", value=question)]
    if image is not None:
        content.insert(0, Part(type="image", value=image))
    messages = [Message(role="user", content=tuple(content))]
    if answer is not None:
        messages.append(Message(role="assistant", content=(Part(type="text", value=answer),)))
    return Sample(id=id, source=source, messages=tuple(messages))


def read_jsonl(path: Path) -> Iterator[Sample]:
    """Stream the samples of a JSON-lines file.

    Raises:
        DataError: The file is missing or a line is not a sample; the message names file and line.
    """
    try:
        lines = path.open("rb")
    except OSError as e:
        raise DataError(f"cannot read samples from {path}: {e.strerror}", "check the path") from e
    with lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name}:{number}"
            try:
                raw = json.loads(line)
            except ValueError as e:  # no JSON, or no UTF-8
                raise DataError(f"{where}: broken JSON: {e}", "repair or remove the line") from e
            if not isinstance(raw, dict):
                raise DataError(f"{where}: a record must be a JSON object, got {type(raw).__name__}", "")
            yield Sample.from_dict(raw, where=where)


def write_jsonl(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples as JSON lines and return how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for sample in samples:
            out.write(json.dumps(sample.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
    return count


def group_by_images(samples: Sequence[Sample]) -> list[list[int]]:
    """Group sample positions by their images, in order of first appearance, so that one encoding serves a group.

    A sample without images shares nothing and is a group of its own.
    """
    groups: dict[tuple[str, ...] | int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.images or index, []).append(index)
    return list(groups.values())


def _role(value: object) -> Role:
    if value not in ("system", "user", "assistant"):
        raise ValueError(f"role must be system, user or assistant, got {value!r}")
    return value


def _part(raw: Mapping[str, Any]) -> Part:
    kind = raw["type"]
    if kind == "text":
        return Part(type="text", value=str(raw["text"]))
    if kind in ("image", "video"):
        return Part(type=kind, value=str(raw["path"]))
    raise ValueError(f"content type must be text, image or video, got {kind!r}")
