"""From a sample to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvila.data.labels import Token, greedy_labels, offset_labels
from nvila.data.records import Message, Part, Sample
from nvila.data.rendering import Renderer, chat_messages
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN, token_id
from nvila.errors import DataError
from nvila.losses import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One tokenised sample; every visual token has a placeholder in `ids`, the last of them before `media_end`."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[str, ...]
    media_end: int
    videos: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        """How many tokens the loss looks at."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True, slots=True)
class MediaLayout:
    """What one image or video becomes in a row.

    Args:
        runs: Visual tokens of every tile of an image, or pooled frame of a video; each run is closed by the line feed
            that the model embeds. An image whose tiles are merged into one map is one run.
        text_after: Text behind every run. `dynamic` tiling has a line feed here, which the tokenizer may merge with
            what people wrote behind it.
    """

    runs: tuple[int, ...]
    text_after: str = ""


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
    _image_id: int = field(init=False)
    _video_id: int = field(init=False)
    _line_feed: list[int] = field(init=False)
    _cache: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.tokenizer, self.system_prompt)
        self._image_id = token_id(self.tokenizer, IMAGE_TOKEN)
        self._video_id = token_id(self.tokenizer, VIDEO_TOKEN)
        self._line_feed = list(self.tokenizer("\n", add_special_tokens=False)["input_ids"])

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
        text, cuts = self._renderer.prompt(messages, _spelling(media, layouts), **template)
        tokens = self._tokenise(text, cuts)
        ids, _ = self._place_media(tokens, [IGNORE_INDEX] * len(tokens), layouts)
        return ids

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
        rendered = self._renderer.conversation(messages, _spelling(media, layouts))
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
        ids, labels = self._place_media(tokens, masked, layouts)
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

    def _place_media(
        self, tokens: Sequence[Token], masked: Sequence[int], layouts: Iterable[MediaLayout]
    ) -> tuple[list[int], list[int]]:
        """Put the placeholders of each medium where its markers are."""
        runs = _runs_of_markers(layouts)
        ids: list[int] = []
        labels: list[int] = []
        for (token, *_), label in zip(tokens, masked, strict=True):
            if token not in (self._image_id, self._video_id):
                ids.append(token)
                labels.append(label)
                continue
            for run in next(runs):
                ids += [token] * run
                ids += self._line_feed
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
        return ids, labels

    def _media_end(self, ids: Sequence[int]) -> int:
        last = next(index for index in range(len(ids) - 1, -1, -1) if ids[index] in (self._image_id, self._video_id))
        return last + 1


def _media(messages: Sequence[Message]) -> tuple[Part, ...]:
    return tuple(part for message in messages for part in message.content if part.type != "text")


def _spelling(media: Sequence[Part], layouts: Sequence[MediaLayout]) -> Callable[[int], str]:
    """Return how the marker of the n-th medium is spelled before tokenising."""

    def spell(number: int) -> str:
        if number >= len(media):  # a template wrote a marker of its own; the renderer counts and refuses
            return ""
        marker = IMAGE_TOKEN if media[number].type == "image" else VIDEO_TOKEN
        layout = layouts[number]
        return (marker + layout.text_after) * len(layout.runs) if layout.text_after else marker

    return spell


def _runs_of_markers(layouts: Iterable[MediaLayout]) -> Iterator[Sequence[int]]:
    """Yield the runs that each marker in the text stands for."""
    for layout in layouts:
        if layout.text_after:
            yield from ((run,) for run in layout.runs)
        else:
            yield layout.runs


__all__ = ["ConversationEncoder", "Encoded", "Layouts", "MediaLayout", "chat_messages"]
