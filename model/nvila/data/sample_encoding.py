"""Samples of a training stage: tokenised with the layouts that their media get, and what they cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.media_layout import MediaKind, MediaLayout
from nvila.data.media_tiles import MediaReader, MediaSize
from nvila.data.records import Part, Sample
from nvila.errors import DataError
from nvila.losses import IGNORE_INDEX

Medium = tuple[MediaKind, str]
"""Kind and key of an image or video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCost:
    """What a sample costs; the columns of `nvila.data.token_budget.SampleSizes`."""

    length: int
    tiles: int
    prefix: int
    group: int


class SampleEncoder:
    """Tokenises samples whose media were measured. For one thread at a time.

    Args:
        tokenizer: Tokenizer with a chat template and the media tokens.
        reader: Knows the layouts of media.
        max_length: Longest sample in positions.
        label_quirk: Labels as the reference code masks them, see `ConversationEncoder`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, reader: MediaReader, max_length: int, *, label_quirk: bool = False
    ) -> None:
        self._reader = reader
        self._sizes: Mapping[Medium, MediaSize] = {}
        self._encoder = ConversationEncoder(tokenizer, 0, max_length, layouts=self._layouts, label_quirk=label_quirk)

    def __call__(self, sample: Sample, sizes: Mapping[Medium, MediaSize]) -> Encoded:
        """Tokenise a sample.

        A sample that is too long is refused and not cut: half an answer teaches to stop in the middle, and half an
        image is none.

        Args:
            sample: The sample.
            sizes: Sizes of its media.

        Raises:
            DataError: It has no answer that could be learned, or is too long.
            ConfigError: The model cannot pool the frames of one of its videos.
        """
        self._sizes = sizes
        encoded = self._encoder(sample)
        if all(label == IGNORE_INDEX for label in encoded.labels[1:]):
            raise DataError(f"sample '{sample.id}' has an answer without tokens", "give it an answer")
        return encoded

    def cost(self, encoded: Encoded, sizes: Mapping[Medium, MediaSize]) -> SampleCost:
        """Measure a tokenised sample."""
        shown: list[Medium] = [("image", key) for key in encoded.images] + [("video", key) for key in encoded.videos]
        first_label = next(index for index, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        # What `nvila.data.collation.shared_prefix_length` finds for a group, or less.
        prefix = encoded.media_end if shown and encoded.media_end < first_label else 0
        alike = repr((shown, encoded.ids[:prefix])) if prefix else None
        return SampleCost(
            length=len(encoded.ids),
            tiles=sum(self._reader.num_tiles(kind, sizes[kind, key]) for kind, key in shown),
            prefix=prefix,
            group=0 if alike is None else _number(alike),
        )

    def _layouts(self, media: Sequence[Part]) -> list[MediaLayout]:
        return [self._reader.layout(kind, self._sizes[kind, key]) for kind, key in map(medium_of, media)]


def medium_of(part: Part) -> Medium:
    """Return what a part of a message shows."""
    assert part.type != "text"
    return part.type, part.value


def media_of(sample: Sample) -> list[Medium]:
    """Return the media of a sample in order."""
    return [medium_of(part) for message in sample.messages for part in message.content if part.type != "text"]


def _number(text: str) -> int:
    """Return a number that other texts do not have, so that no table of all of them is needed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
