"""From a text with media markers to ids: a placeholder for every visual token, a line feed behind every item."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvila.data.media_layout import MediaKind, MediaLayout, Placeholders, spelling
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN
from nvila.errors import DataError
from nvila.vision.temporal import checked_pool_sizes, num_video_tokens
from nvila.vision.tiling import Grid, TilePlan

_MARKER = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Positions of a prompt.

    Args:
        visual: Positions that visual tokens fill.
        text: All others, the line feeds behind media included.
        tiles: For every image its grids of tiles as (columns, rows).
    """

    visual: int
    text: int
    tiles: tuple[tuple[Grid, ...], ...]

    @property
    def total(self) -> int:
        """Length of the prompt."""
        return self.visual + self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaTokens:
    """Counts the visual tokens of media without looking at pixels.

    Args:
        num_image_tokens: Visual tokens of a tile.
        video_pool_sizes: Pooling of video tokens.
    """

    num_image_tokens: int
    video_pool_sizes: Sequence[Sequence[int]]

    def image(self, plan: TilePlan, *, tiled: bool) -> MediaLayout:
        """Lay out an image.

        A tile of `dynamic` is an item of its own, with a line feed in the text behind it; the last scale of
        `dynamic_s2` is one item. An image that was not tiled has no line feed in the text.
        """
        if plan.block is not None:
            return MediaLayout((self.num_image_tokens * plan.block.num_tiles,))
        if tiled:
            return MediaLayout((self.num_image_tokens,) * plan.num_tiles, text_after="\n")
        return MediaLayout((self.num_image_tokens,))

    def video(self, num_frames: int) -> MediaLayout:
        """Lay out a video: the pooled frames of each level, one run each.

        Raises:
            ConfigError: A pool size does not divide the frames or their grid.
        """
        side = isqrt(self.num_image_tokens)
        num_video_tokens(num_frames, side, self.video_pool_sizes)  # checks that everything divides
        levels = [
            ((side // h) * (side // w),) * (num_frames // t) for t, h, w in checked_pool_sizes(self.video_pool_sizes)
        ]
        return MediaLayout(tuple(run for level in levels for run in level))


def media_kinds(text: str) -> list[MediaKind]:
    """Return the kinds of the markers of a text in order."""
    return ["image" if marker == IMAGE_TOKEN else "video" for marker in _MARKER.findall(text)]


def spell_markers(text: str, layouts: Sequence[MediaLayout]) -> str:
    """Spell every marker of a text as its layout wants it."""
    spell = spelling(media_kinds(text), layouts)
    numbers = iter(range(len(layouts)))
    return _MARKER.sub(lambda _: spell(next(numbers)), text)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, layouts: Sequence[MediaLayout], cuts: Sequence[int] = ()
) -> list[int]:
    """Tokenise a text whose markers are spelled, and put in the placeholders of its media.

    Args:
        tokenizer: Tokenizer with the media tokens.
        text: Text with spelled markers.
        layouts: Layouts of all media in order.
        cuts: Offsets that no token may cross, so that what people wrote never reads as a special token.
    """
    bounds = pairwise([0, *cuts, len(text)])
    pieces = tokenizer([text[start:end] for start, end in bounds], add_special_tokens=False)["input_ids"]
    ids = [token for piece in pieces for token in piece]
    return Placeholders(tokenizer).place(ids, ids, layouts)[0]


def check_counts(markers: int, given: int, kind: str) -> None:
    """Refuse a text whose markers are more or fewer than its media.

    Raises:
        DataError: With both counts.
    """
    if markers != given:
        raise DataError(
            f"the text has {markers} {kind} markers but {given} {kind}s were given",
            f"write one {IMAGE_TOKEN if kind == 'image' else VIDEO_TOKEN} for every {kind}",
        )


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, side: str, length: int | None = None, multiple: int = 1
) -> Mapping[str, list[list[int]]]:
    """Pad rows of ids to the longest, or to `length`, and make the mask of what is not padding."""
    width = max([length or 0, *(len(row) for row in rows)])
    width += -width % multiple
    ids, masks = [], []
    for row in rows:
        gap, ones = [pad_token_id] * (width - len(row)), [1] * len(row)
        blank = [0] * len(gap)
        ids.append([*gap, *row] if side == "left" else [*row, *gap])
        masks.append([*blank, *ones] if side == "left" else [*ones, *blank])
    return {"input_ids": ids, "attention_mask": masks}


class BoundTemplate:
    """A tokenizer whose chat template is called with fixed arguments.

    Args:
        tokenizer: The tokenizer.
        **template: A `chat_template`, `tools`, and variables of the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **template: Any) -> None:
        self._tokenizer = tokenizer
        self._template = {name: value for name, value in template.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render messages."""
        return self._tokenizer.apply_chat_template(*args, **{**self._template, **kwargs})
