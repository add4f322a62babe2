"""From a sample to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvila.data.records import Message, Part, Sample
from nvila.data.tokenizers import IMAGE_TOKEN, TURN_END, token_id
from nvila.errors import DataError
from nvila.modeling import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One tokenised sample; every visual token has a placeholder in `ids`, the last of them before `media_end`."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[str, ...]
    media_end: int

    @property
    def num_supervised(self) -> int:
        """How many tokens the loss looks at."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates take."""
    return [
        {"role": message.role, "content": [_template_part(part) for part in message.content]} for message in messages
    ]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, for_answer: bool = False) -> str:
    """Render a conversation as text; `for_answer` opens the assistant's turn at the end."""
    text = tokenizer.apply_chat_template(chat_messages(messages), tokenize=False, add_generation_prompt=for_answer)
    return str(text)


@dataclass(slots=True)
class ConversationEncoder:
    """Tokenises samples with exact label offsets.

    Labels cover the assistant's words and the token that ends its turn, nothing else. Text is tokenised once for
    every distinct conversation, which makes data sets with many images for each question cheap.

    Args:
        tokenizer: Tokenizer with a chat template.
        num_image_tokens: Visual tokens of an image; each image is closed by one line feed.
        max_length: Longest conversation in tokens, visual ones included.
    """

    tokenizer: PreTrainedTokenizerBase
    num_image_tokens: int
    max_length: int
    _cache: dict[tuple[tuple[str, ...], ...], tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            DataError: The sample has no answer, or is longer than `max_length`.
        """
        if not sample.answer:
            raise DataError(f"sample '{sample.id}' has no answer to learn from", "end it with an assistant message")
        key = tuple(
            (message.role, *(part.value if part.type == "text" else f"\0{part.type}" for part in message.content))
            for message in sample.messages
        )
        if key not in self._cache:
            self._cache[key] = self._encode(sample.messages)
        ids, labels = self._cache[key]
        if len(ids) > self.max_length:
            raise DataError(
                f"sample '{sample.id}' has {len(ids)} tokens, more than the limit of {self.max_length}",
                "raise model.max_length or shorten the sample",
            )
        media_end = len(ids) - ids[::-1].index(self._image_id) if self._image_id in ids else 0
        return Encoded(ids=ids, labels=labels, images=sample.images, media_end=media_end)

    @property
    def _image_id(self) -> int:
        return token_id(self.tokenizer, IMAGE_TOKEN)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the opened assistant turn."""
        ids, _ = self._tokenise(render(self.tokenizer, messages, for_answer=True), [])
        return list(ids)

    def _encode(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        text = render(self.tokenizer, messages)
        spans = []
        for number, message in enumerate(messages):
            if message.role == "assistant":
                start = self._answer_start(messages, number)
                end = text.index(TURN_END, start + len(message.text)) + len(TURN_END)
                spans.append((start, end))
        ids, labels = self._tokenise(text, spans)
        # Nothing after the last supervised token can influence the loss.
        while labels and labels[-1] == IGNORE_INDEX:
            ids, labels = ids[:-1], labels[:-1]
        return ids, labels

    def _answer_start(self, messages: Sequence[Message], number: int) -> int:
        """Where the text of an assistant's message begins in the rendered conversation."""
        before = messages[: max(1, number)]
        opened = len(render(self.tokenizer, before, for_answer=True))
        # Templates do not render nothing, so the opening of a first turn is measured behind that turn.
        return opened if number else opened - len(render(self.tokenizer, before))

    def _tokenise(self, text: str, spans: list[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        image_id = self._image_id
        image = [image_id] * self.num_image_tokens + self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token == image_id:
                ids += image
                labels += [IGNORE_INDEX] * len(image)
                continue
            supervised = any(first <= start and end <= last for first, last in spans)
            ids.append(token)
            labels.append(token if supervised else IGNORE_INDEX)
        return tuple(ids), tuple(labels)


def _template_part(part: Part) -> dict[str, str]:
    return {"type": part.type, "text": part.value} if part.type == "text" else {"type": part.type}
