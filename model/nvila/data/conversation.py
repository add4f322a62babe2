"""From a sample to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from nvila.data.labels import Token, greedy_labels, offset_labels
from nvila.data.media_layout import MediaKind, MediaLayout, Placeholders, spelling
from nvila.data.records import Message, Part, Sample
from nvila.data.rendering import Renderer, chat_messages
from nvila.errors import DataError
from nvila.losses import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One tokenised sample; every visual token has a placeholder in `ids`, the last of them before `media_end`.

    `id` is the sample's own, for messages about it.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[str, ...]
    media_end: int
    videos: tuple[str, ...] = ()
    id: str = ""

    @property
    def num_supervised(self) -> int:
        """How many tokens the loss looks at."""
        return sum(label != IGNORE_INDEX for label in self.labels)


Layouts = Callable[[Sequence[Part]], Sequence[MediaLayout]]
"""Gives the layouts of all media of a conversation, in order; it sees all, as several images are tiled unlike one."""


@dataclass(slots=True)
class ConversationEncoder:
    """Tokenises samples with exact label offsets.

    Labels cover the assistant's words and the token that ends its turn, nothing else. What people wrote is text: a
    literal `<image>` or control token in it stays visible and never becomes that token. Text is tokenised once for
    every distinct conversation, which makes data sets with many images for each question cheap.

    Args:
        tokenizer: Tokenizer with a chat template.
        num_image_tokens: Visual tokens of an image; each image is closed by one line feed.
        max_length: Longest conversation in tokens, visual ones included.
        layouts: Layouts of media where they are more than `num_image_tokens` an image: tiles and videos.
        system_prompt: Text of a system turn before conversations that have none, "" for an empty turn; None leaves
            it to the chat template.
        label_quirk: Mask labels as the reference code does (`nvila.data.labels.greedy_labels`), line feeds in answers
            included, to train on exactly what released checkpoints were trained on.
    """

    tokenizer: PreTrainedTokenizerBase
    num_image_tokens: int
    max_length: int
    layouts: Layouts | None = field(default=None, kw_only=True)
    system_prompt: str | None = field(default=None, kw_only=True)
    label_quirk: bool = field(default=False, kw_only=True)
    _renderer: Renderer = field(init=False)
    _placeholders: Placeholders = field(init=False)
    _cache: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.tokenizer, self.system_prompt)
        self._placeholders = Placeholders(self.tokenizer)

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            DataError: The sample has no answer, is longer than `max_length`, or has other media than its rendering.
        """
        if not sample.answer:
            raise DataError(f"sample '{sample.id}' has no answer to learn from", "end it with an assistant message")
        media = _media(sample.messages)
        layouts = self._media_layouts(media)
        key = (
            layouts,
            *(
                (message.role, *(part.value if part.type == "text" else f"\0{part.type}" for part in message.content))
                for message in sample.messages
            ),
        )
        if key not in self._cache:
            self._cache[key] = self._encode(sample.messages, media, layouts)
        ids, labels = self._cache[key]
        if len(ids) > self.max_length:
            raise DataError(
                f"sample '{sample.id}' has {len(ids)} tokens, more than the limit of {self.max_length}",
                "raise model.max_length or shorten the sample",
            )
        return Encoded(
            ids=ids,
            labels=labels,
            images=sample.images,
            media_end=self._media_end(ids) if media else 0,
            videos=tuple(part.value for part in media if part.type == "video"),
            id=sample.id,
        )

    def prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Encode a conversation up to the opened assistant turn.

        Args:
            messages: The conversation; media are placed by their layouts.
            **template: Passed to the chat template.

        Raises:
            DataError: The template renders another number of media than the messages have.
        """
        media = _media(messages)
        layouts = self._media_layouts(media)
        text, cuts = self._renderer.prompt(messages, spelling(_kinds(media), layouts), **template)
        tokens = [token for token, *_ in self._tokenise(text, cuts)]
        return self._placeholders.place(tokens, tokens, layouts)[0]

    def _media_layouts(self, media: Sequence[Part]) -> tuple[MediaLayout, ...]:
        if self.layouts is not None:
            layouts = tuple(self.layouts(media))
            if len(layouts) != len(media):
                raise DataError(f"there are {len(layouts)} layouts for {len(media)} media", "give one for each medium")
            return layouts
        if any(part.type == "video" for part in media):
            raise DataError("this encoder places images only, but the conversation has a video", "give it layouts")
        return (MediaLayout((self.num_image_tokens,)),) * len(media)

    def _encode(
        self, messages: Sequence[Message], media: Sequence[Part], layouts: Sequence[MediaLayout]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rendered = self._renderer.conversation(messages, spelling(_kinds(media), layouts))
        if self.label_quirk:
            tokens = self._tokenise(rendered.text, rendered.cuts)
            frame = [[token for token, *_ in self._tokenise(*piece)] for piece in rendered.frame]
            masked = greedy_labels([token for token, *_ in tokens], frame)
        else:
            # White space of an answer must not merge with the template's: when the model answers, the template's
            # tokens are there already.
            starts = {start for start, _ in rendered.answers if rendered.text[start : start + 1].isspace()}
            tokens = self._tokenise(rendered.text, sorted(starts | set(rendered.cuts)))
            starts_and_ends = zip(rendered.answers, rendered.ends, strict=True)
            masked = offset_labels(tokens, [(start, end) for (start, _), end in starts_and_ends])
        ids, labels = self._placeholders.place([token for token, *_ in tokens], masked, layouts)
        # Nothing after the last supervised token can influence the loss.
        length = max((index + 1 for index, label in enumerate(labels) if label != IGNORE_INDEX), default=len(ids))
        return tuple(ids[:length]), tuple(labels[:length])

    def _tokenise(self, text: str, cuts: Sequence[int]) -> list[Token]:
        bounds = list(pairwise([0, *cuts, len(text)]))
        pieces = self.tokenizer(
            [text[start:end] for start, end in bounds], add_special_tokens=False, return_offsets_mapping=True
        )
        return [
            (token, base + start, base + end)
            for (base, _), ids, offsets in zip(bounds, pieces["input_ids"], pieces["offset_mapping"], strict=True)
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]

    def _media_end(self, ids: Sequence[int]) -> int:
        markers = self._placeholders.marker_ids
        return next(index for index in range(len(ids), 0, -1) if ids[index - 1] in markers)


def _media(messages: Sequence[Message]) -> tuple[Part, ...]:
    return tuple(part for message in messages for part in message.content if part.type != "text")


def _kinds(media: Sequence[Part]) -> list[MediaKind]:
    return [cast("MediaKind", part.type) for part in media]


__all__ = ["ConversationEncoder", "Encoded", "Layouts", "MediaLayout", "chat_messages"]
