"""From chat messages to the text that is tokenised, knowing where every answer and every literal marker is.

A chat template joins control tokens of its own with whatever people wrote. What they wrote is text, also when it is
spelled like a control token or a media marker: it is cut behind its first character, and pieces are tokenised one by
one, so that no tokenizer sees the whole spelling. While the template runs, the cuts are characters that occur nowhere
else; answers are found by rendering the conversation once more with characters of that kind in their place.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvila.data.records import Message, Part
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN
from nvila.errors import DataError

_MARKERS = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")
Expand = Callable[[int], str]
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that Unicode assigns to nobody


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Args:
        text: What the template made, literal markers included.
        cuts: Offsets in `text` that no token may cross.
        answers: Start and end in `text` of every text that the assistant wrote, without the end of its turn.
        ends: End in `text` of the token that closes each answer; its own end where nothing closes it.
        frame: The rendered text between the answers, each piece with its cuts; one more than answers.
    """

    text: str
    cuts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]
    frame: tuple[tuple[str, tuple[int, ...]], ...]


class Renderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: Has a chat template and the media tokens.
        system_prompt: Text of a system turn before conversations that have none, "" for an empty turn; None leaves
            it to the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {IMAGE_TOKEN, VIDEO_TOKEN}
        self._specials = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))

    def prompt(self, messages: Sequence[Message], expand: Expand, **template: Any) -> tuple[str, tuple[int, ...]]:
        """Render a conversation up to the opened turn of the assistant.

        Args:
            messages: The conversation.
            expand: Spelling of the n-th medium's marker in the text.
            **template: Passed to the template.

        Returns:
            The text and the offsets that no token may cross.

        Raises:
            DataError: The template rendered another number of media than there are.
        """
        messages = self._with_system(_joined(messages))
        cut, _ = _unused_characters(messages)
        text = self._apply(self._guarded(messages, cut), for_answer=True, **template)
        edits = _Edits(text, cut, expand)
        _check_media(messages, edits.num_media)
        return edits.text, edits.cuts

    def conversation(self, messages: Sequence[Message], expand: Expand) -> Rendered:
        """Render a whole conversation.

        Args:
            messages: The conversation.
            expand: Spelling of the n-th medium's marker in the text.

        Raises:
            DataError: The template lost an answer, or rendered another number of media than there are.
        """
        messages = self._with_system(_joined(messages))
        cut, hole = _unused_characters(messages)
        guarded = self._guarded(messages, cut)
        answers = [part.value for _, part in _answer_parts(guarded)]
        frame = re.split(f"{hole}\\d+{hole}", self._apply(_with_holes(guarded, hole)))
        if len(frame) != len(answers) + 1:
            raise DataError(
                f"the chat template renders {len(frame) - 1} of {len(answers)} answers",
                "train with a template that renders every turn",
            )
        text, spans = _align(frame, answers, lambda: self._apply(guarded))
        edits = _Edits(text, cut, expand)
        _check_media(messages, edits.num_media)
        ends = [end + self._closing(piece) for (_, end), piece in zip(spans, frame[1:], strict=True)]
        return Rendered(
            text=edits.text,
            cuts=edits.cuts,
            answers=tuple((edits.moved(start), edits.moved(end)) for start, end in spans),
            ends=tuple(map(edits.moved, ends)),
            frame=tuple(_frame_pieces(frame, cut, expand)),
        )

    def _apply(self, messages: Sequence[Message], *, for_answer: bool = False, **template: Any) -> str:
        text = self._tokenizer.apply_chat_template(
            chat_messages(messages), tokenize=False, add_generation_prompt=for_answer, **template
        )
        return str(text)

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self._system_prompt is None or (messages and messages[0].role == "system"):
            return messages
        return [Message(role="system", content=(Part(type="text", value=self._system_prompt),)), *messages]

    def _guarded(self, messages: Sequence[Message], cut: str) -> list[Message]:
        """Cut everything in texts that is spelled like a special token."""

        def guard(part: Part) -> Part:
            if part.type != "text" or not self._specials.search(part.value):
                return part
            return Part(type="text", value=self._cut(part.value, cut))

        return [Message(role=message.role, content=tuple(map(guard, message.content))) for message in messages]

    def _cut(self, text: str, cut: str) -> str:
        done: list[str] = []
        while found := self._specials.search(text):
            # Only the first character goes, because what remains can begin another special token.
            split = found.start() + 1
            done.append(text[:split])
            text = text[split:]
        return cut.join([*done, text])

    def _closing(self, behind: str) -> int:
        """Length of the token that closes a turn, at the beginning of what follows the answer."""
        found = self._specials.search(behind)
        # Behind a line feed it would be the next turn's first token.
        closes = found is not None and not behind[: found.start()].strip(" ") and not _MARKERS.fullmatch(found[0])
        return found.end() if found is not None and closes else 0


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates take."""
    return [
        {"role": message.role, "content": [_template_part(part) for part in message.content]} for message in messages
    ]


class _Edits:
    """Takes the cuts out of a rendered text and spells its media markers as wanted; keeps track of offsets."""

    def __init__(self, text: str, cut: str, expand: Expand, first_medium: int = 0) -> None:
        pieces: list[str] = []
        self._ends: list[int] = []  # of what is replaced, in the given text
        growth: list[int] = []
        medium, position = first_medium, 0
        for found in re.finditer(f"{cut}|{_MARKERS.pattern}", text):
            spelling = ""
            if found[0] != cut:
                spelling = expand(medium)
                medium += 1
            pieces += [text[position : found.start()], spelling]
            self._ends.append(found.end())
            growth.append(len(spelling) - len(found[0]))
            position = found.end()
        self._growth = [0, *accumulate(growth)]
        self.num_media = medium - first_medium
        self.text = "".join([*pieces, text[position:]])
        self.cuts = tuple(self.moved(end) for end in self._ends if text[end - 1] == cut)

    def moved(self, offset: int) -> int:
        """Where an offset of the given text is in the new one."""
        return offset + self._growth[bisect_right(self._ends, offset)]


def _frame_pieces(frame: Iterable[str], cut: str, expand: Expand) -> Iterator[tuple[str, tuple[int, ...]]]:
    media = 0
    for piece in frame:
        edits = _Edits(piece, cut, expand, media)
        media += edits.num_media
        yield edits.text, edits.cuts


def _align(
    frame: Sequence[str], answers: Sequence[str], render: Callable[[], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Put the answers back into the frame and find their spans."""
    text = render()
    pieces = [frame[0]]
    for answer, piece in zip(answers, frame[1:], strict=True):
        pieces += [answer, piece]
    if "".join(pieces) != text:
        # The template changed an answer, by trimming it or by dropping a part; what stands between the frame is it.
        found = re.fullmatch("(.*?)".join(map(re.escape, frame)), text, re.DOTALL)
        if found is None:
            raise DataError("the chat template changes the turns around an answer", "use a simpler chat template")
        return text, [found.span(number + 1) for number in range(len(answers))]
    ends = list(accumulate(map(len, pieces)))
    return text, [(ends[index - 1], ends[index]) for index in range(1, len(pieces), 2)]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Join neighbouring texts of a message, so that a marker spelled across two of them is seen."""
    joined = []
    for message in messages:
        parts: list[Part] = []
        for part in message.content:
            if part.type == "text" and parts and parts[-1].type == "text":
                parts[-1] = Part(type="text", value=parts[-1].value + part.value)
            else:
                parts.append(part)
        joined.append(Message(role=message.role, content=tuple(parts)))
    return joined


def _answer_parts(messages: Sequence[Message]) -> Iterator[tuple[int, Part]]:
    for number, message in enumerate(messages):
        if message.role == "assistant":
            yield from ((number, part) for part in message.content if part.type == "text")


def _with_holes(messages: Sequence[Message], hole: str) -> list[Message]:
    """Put a numbered hole in the place of every text of the assistant."""
    holed, number = [], 0
    for message in messages:
        parts = []
        for part in message.content:
            if message.role == "assistant" and part.type == "text":
                part, number = Part(type="text", value=f"{hole}{number}{hole}"), number + 1
            parts.append(part)
        holed.append(Message(role=message.role, content=tuple(parts)))
    return holed


def _unused_characters(messages: Sequence[Message]) -> tuple[str, str]:
    used = {character for message in messages for character in message.text}
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return next(free), next(free)


def _check_media(messages: Sequence[Message], rendered: int) -> None:
    given = sum(part.type != "text" for message in messages for part in message.content)
    if rendered != given:
        raise DataError(
            f"the chat template renders {rendered} media markers but the conversation has {given} images and videos",
            f"use a template that writes {IMAGE_TOKEN} for every image and {VIDEO_TOKEN} for every video",
        )


def _template_part(part: Part) -> dict[str, str]:
    return {"type": part.type, "text": part.value} if part.type == "text" else {"type": part.type}
