"""The shapes in which data sets write conversations: each becomes the same list of turns.

| fields | known from |
|---|---|
| `conversations` of `{from, value}` | LLaVA |
| `messages` of `{role, content}`, content a text or parts | chat data, our own samples |
| `texts` of `{user, assistant}` | The Cauldron, FineVision |
| `question` and `answer` or `answers` | VQA |
| `caption`, or `text` beside an image | captions |

Which one it is, every record says for itself, so a file may mix them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from nvila.data.readers.problems import RecordError, kind_of, text_of
from nvila.data.records import Role

MediaKind = Literal["image", "video"]
KINDS: tuple[MediaKind, ...] = ("image", "video")

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Medium:
    """A medium named in a message; `value` is None when the record has it in a field of its own."""

    kind: MediaKind
    value: Any


Piece: TypeAlias = "str | Medium"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as it was written, markers included.

    Args:
        role: Who speaks.
        pieces: Texts and media in order.
        in_parts: Whether it was written as parts, whose texts mean what they say.
    """

    role: Role
    pieces: tuple[Piece, ...]
    in_parts: bool = False


def turns_of(fields: Mapping[str, Any]) -> list[Turn]:
    """Return the conversation of a record.

    Raises:
        RecordError: It has none, or one that cannot be read.
    """
    for name, read in _SHAPES.items():
        value = fields.get(name)
        if value is not None:
            return read(fields, value, name)
    raise RecordError("no conversation: expected conversations, messages, texts, question and answer, or caption")


def _messages(fields: Mapping[str, Any], value: Any, name: str) -> list[Turn]:
    turns = _list(value, name)
    if not turns:
        raise RecordError(f"no conversation: '{name}' is empty")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"turn {number} is {kind_of(turn)} instead of an object")
    sender = _first(turn, ("from", "role"))
    if sender is None:
        raise RecordError(f"turn {number} has no sender ('from' or 'role')")
    role = ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise RecordError(f"turn {number} has the unknown sender {sender!r}; known: {', '.join(ROLES)}")
    content = _first(turn, ("value", "content"))
    if content is None:
        raise RecordError(f"turn {number} has no text ('value' or 'content')")
    in_parts = isinstance(content, list)
    parts = content if in_parts else [content]
    return Turn(role, tuple(_part(part, f"turn {number}") for part in parts), in_parts)


def _part(part: Any, where: str) -> Piece:
    if not isinstance(part, dict):
        return text_of(part, where)
    kind = "image" if part.get("type") == "image_url" else part.get("type")
    if kind == "text":
        return text_of(part.get("text"), where)
    if kind not in KINDS:
        raise RecordError(f"{where} has a part of the unknown type {kind!r}; known: text, image, video")
    value = _first(part, ("path", kind, "url", f"{kind}_url", "base64", "bytes"))
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    if isinstance(value, str) and part.get("base64") == value:
        value = f"data:;base64,{value}"
    return Medium(kind, value)


def _pairs(fields: Mapping[str, Any], value: Any, name: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(_list(value, name), start=1):
        if not isinstance(pair, dict):
            raise RecordError(f"pair {number} of '{name}' is {kind_of(pair)} instead of an object")
        for role in ("user", "assistant"):
            turns.append(Turn(ROLES[role], (text_of(pair.get(role), f"'{role}' of pair {number}"),)))
    if not turns:
        raise RecordError(f"no conversation: '{name}' is empty")
    return turns


def _question(fields: Mapping[str, Any], value: Any, name: str) -> list[Turn]:
    answer = _first(fields, ("answer", "answers"))
    if answer is None:
        raise RecordError("no answer: 'answer' and 'answers' are missing")
    return [_user(text_of(value, "'question'")), _assistant(text_of(_most_frequent(answer), "the answer"))]


def _caption(fields: Mapping[str, Any], value: Any, name: str) -> list[Turn]:
    if not any(fields.get(field) for kind in KINDS for field in (kind, f"{kind}s")):
        raise RecordError(f"no conversation: '{name}' stands beside no image")
    return [_user(), _assistant(text_of(value, f"'{name}'"))]


_SHAPES: dict[str, Callable[[Mapping[str, Any], Any, str], list[Turn]]] = {
    "conversations": _messages,
    "messages": _messages,
    "texts": _pairs,
    "question": _question,
    "caption": _caption,
    "text": _caption,
}
ANSWERS = ("answer", "answers")
CONVERSATION_FIELDS = (*_SHAPES, *ANSWERS)


def _user(*texts: str) -> Turn:
    return Turn("user", texts)


def _assistant(text: str) -> Turn:
    return Turn("assistant", (text,))


def _most_frequent(answer: Any) -> Any:
    """Of several people's answers the most frequent one, of equally frequent ones the first."""
    if isinstance(answer, dict):  # SQuAD's {"text": [...]}
        answer = answer.get("text")
    if not isinstance(answer, list):
        return answer
    texts = [one.get("answer") if isinstance(one, dict) else one for one in answer]
    if not texts:
        raise RecordError("no answer: 'answers' is empty")
    return Counter(text_of(text, "an answer") for text in texts).most_common(1)[0][0]


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # tables often hold JSON in a text column
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RecordError(f"'{name}' is a text and no JSON") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = _transposed(value, name)
    if not isinstance(value, list):
        raise RecordError(f"'{name}' is {kind_of(value)} instead of an array")
    return value


def _transposed(columns: Mapping[str, list[Any]], name: str) -> list[dict[str, Any]]:
    """Arrow tables of `datasets` keep a list of objects as an object of lists."""
    if len({len(column) for column in columns.values()}) > 1:
        raise RecordError(f"'{name}' has columns of different lengths")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the first of these fields that is not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
