"""Where media stand in a row of tokens: how their markers are spelled, and the placeholders that replace them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN, token_id
from nvila.losses import IGNORE_INDEX

MediaKind = Literal["image", "video"]
_MARKERS: dict[MediaKind, str] = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}


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


def spelling(kinds: Sequence[MediaKind], layouts: Sequence[MediaLayout]) -> Callable[[int], str]:
    """Return how the marker of the n-th medium is spelled before tokenising: `dynamic` has one for every tile."""

    def spell(number: int) -> str:
        if number >= len(kinds):  # a template wrote a marker of its own; the renderer counts and refuses
            return ""
        marker, layout = _MARKERS[kinds[number]], layouts[number]
        return (marker + layout.text_after) * len(layout.runs) if layout.text_after else marker

    return spell


class Placeholders:
    """Puts the placeholders of media where their markers are.

    Args:
        tokenizer: Tokenizer with the media tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.marker_ids = frozenset(token_id(tokenizer, marker) for marker in _MARKERS.values())
        self._line_feed: list[int] = list(tokenizer("\n", add_special_tokens=False)["input_ids"])

    def place(
        self, ids: Sequence[int], labels: Sequence[int], layouts: Sequence[MediaLayout]
    ) -> tuple[list[int], list[int]]:
        """Replace every marker by the runs it stands for; none of them is a label.

        Args:
            ids: Tokens of a text whose markers are spelled as `spelling` says.
            labels: Their labels.
            layouts: Layouts of all media in order.
        """
        runs = _runs_of_markers(layouts)
        placed: list[int] = []
        placed_labels: list[int] = []
        for token, label in zip(ids, labels, strict=True):
            if token not in self.marker_ids:
                placed.append(token)
                placed_labels.append(label)
                continue
            for run in next(runs):
                placed += [token] * run + self._line_feed
            placed_labels += [IGNORE_INDEX] * (len(placed) - len(placed_labels))
        return placed, placed_labels


def _runs_of_markers(layouts: Sequence[MediaLayout]) -> Iterator[Sequence[int]]:
    """Yield the runs that each marker in the text stands for."""
    for layout in layouts:
        if layout.text_after:
            yield from ((run,) for run in layout.runs)
        else:
            yield layout.runs
