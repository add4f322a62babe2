"""Chat messages in the Hugging Face form, taken apart: records for the template, and the media in order."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from nvila.data.media_layout import MediaKind, MediaLayout, spelling
from nvila.data.records import Message, Part, Role
from nvila.data.rendering import Renderer
from nvila.errors import DataError

_KEYS = {
    "image": ("image", "path", "url", "base64", "image_url"),
    "video": ("video", "path", "url"),
}
_ROLES = get_args(Role)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation.

    Args:
        messages: Roles and parts; a media part holds its number.
        kinds: Kind of every medium in order.
        sources: What each medium is read from.
    """

    messages: list[Message]
    kinds: list[MediaKind]
    sources: list[Any]

    @classmethod
    def parse(cls, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Take messages apart.

        Raises:
            DataError: There are none, or a part is of an unknown kind or holds no medium.
        """
        if not messages:
            raise DataError("the conversation has no messages", "give at least one user message")
        parsed = cls([], [], [])
        for number, message in enumerate(messages):
            if (role := message.get("role")) not in _ROLES:
                raise DataError(f"message {number} has the role {role!r}", f"use one of {', '.join(_ROLES)}")
            parts = tuple(parsed._parts(message.get("content"), f"of message {number}"))
            parsed.messages.append(Message(role=cast("Role", role), content=parts))
        return parsed

    def _parts(self, content: Any, where: str) -> list[Part]:
        parts = [content or ""] if content is None or isinstance(content, str) else content
        return [self._part(part, f"part {number} {where}") for number, part in enumerate(parts)]

    def _part(self, part: Any, where: str) -> Part:
        if isinstance(part, str):
            return Part(type="text", value=part)
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        kind = "image" if kind == "image_url" else kind
        if kind == "text":
            return Part(type="text", value=str(part.get("text", "")))
        if kind not in _KEYS:
            raise DataError(f"{where} is of kind {kind!r}", "use text, image or video")
        self.kinds.append(cast("MediaKind", kind))
        self.sources.append(_source(part, kind, where))
        return Part(type=cast("MediaKind", kind), value=str(len(self.sources) - 1))


def render(
    renderer: Renderer, conversation: Conversation, layouts: Sequence[MediaLayout], mode: str
) -> tuple[str, Sequence[int]]:
    """Render a conversation: whole, up to the opened turn of an answer, or with its last message left open."""
    spell = spelling(conversation.kinds, layouts)
    if mode == "answer":
        return renderer.prompt(conversation.messages, spell)
    rendered = renderer.conversation(conversation.messages, spell)
    if mode == "whole":
        return rendered.text, rendered.cuts
    if conversation.messages[-1].role != "assistant" or not rendered.answers:
        raise DataError("the last message is not the assistant's", "end with the beginning of an answer")
    end = rendered.answers[-1][1]
    return rendered.text[:end], [cut for cut in rendered.cuts if cut < end]


def _source(part: Mapping[str, Any], kind: str, where: str) -> Any:
    key = next((key for key in _KEYS[kind] if part.get(key) is not None), None)
    if key is None:
        raise DataError(f"{where} holds no {kind}", f'write {{"type": "{kind}", "{kind}": ...}}')
    value = part[key]
    if isinstance(value, Mapping):  # {"image_url": {"url": ...}}
        value = value.get("url")
    if isinstance(value, str) and (key == "base64" or value.startswith("data:")):
        return _decoded(value, where)
    return value


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.partition(";base64,")[2] or text, validate=True)
    except binascii.Error as e:
        raise DataError(f"{where} is no base64: {e}", "encode the file's bytes") from e
