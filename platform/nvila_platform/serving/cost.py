"""What a request will cost, estimated before anything of it is decoded: the measure of admission and of scaling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nvila_platform.serving.media import MediaSource

_CHARACTERS_PER_TOKEN = 4
_DEFAULT_ANSWER = 64
# An image that is certainly cut into as many tiles as there may be.
_LARGE = (4096, 3072)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualRates:
    """Tokens that media become in a model.

    Args:
        single_image: The only image of a prompt, which may be cut into tiles.
        image: Each of several images.
        frame: One frame of a video.
        num_frames: Frames sampled of a video unless the request says otherwise.
    """

    single_image: int = 256
    image: int = 256
    frame: int = 64
    num_frames: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Tokens of one request, by where they come from.

    Args:
        text: Of the messages.
        visual: Of images and videos.
        answer: Most that may be generated.
    """

    text: int = 0
    visual: int = 0
    answer: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.visual + self.answer


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up."""
    listed = list(costs)
    return Cost(
        text=sum(one.text for one in listed),
        visual=sum(one.visual for one in listed),
        answer=sum(one.answer for one in listed),
    )


def rates_of(engine: object) -> VisualRates:
    """Ask an engine's processor what media cost; one that has none costs the defaults."""
    processor: Any = getattr(engine, "processor", None)
    if processor is None:
        return VisualRates()
    num_frames = int(processor.video_processor.num_frames)
    return VisualRates(
        single_image=processor.count_tokens(image_sizes=[_LARGE]).visual,
        image=-(-processor.count_tokens(image_sizes=[_LARGE, _LARGE]).visual // 2),
        frame=-(-processor.count_tokens(video_frames=[num_frames]).visual // num_frames),
        num_frames=num_frames,
    )


def estimate(
    rates: VisualRates, texts: Iterable[str], sources: Sequence[MediaSource], *, answers: int, limit: int | None
) -> Cost:
    """Estimate the cost of one request.

    Args:
        rates: What media cost.
        texts: All texts of the messages.
        sources: Its media.
        answers: How many answers are asked for.
        limit: Most tokens of each; None for the engine's default.
    """
    images = sum(one.kind == "image" for one in sources)
    frames = sum(one.num_frames for one in sources if one.kind != "image")
    return Cost(
        text=sum(len(text) // _CHARACTERS_PER_TOKEN + 1 for text in texts),
        visual=(rates.single_image if images == 1 else images * rates.image) + frames * rates.frame,
        answer=answers * (limit or _DEFAULT_ANSWER),
    )
