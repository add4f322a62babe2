"""The video processor: sampled frames to normalised tiles, one tile a frame.

It does not stand on the video classes of transformers, which cannot be imported without torchvision.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from nvila.image_processing import NVILAImageProcessor, named
from nvila.vision.tiling import cut_levels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nvila.configuration import NVILAConfig
    from nvila.data.video import Video


_MAX_THREADS = 8


class NVILAVideoProcessor(BaseImageProcessor):
    """Samples frames and makes one tile of each.

    Args:
        size: `{"height", "width"}` of a tile in pixels.
        image_aspect_ratio: `pad` keeps the shape of a frame; every other mode warps it to the tile.
        num_frames: Frames taken of a video.
        fps: Frames a second to take instead, up to `num_frames`; 0 spreads the frames evenly.
        image_mean: Mean of each channel.
        image_std: Standard deviation of each channel.
        **kwargs: Kept as attributes.
    """

    model_input_names = ["pixel_values_videos", "video_frames"]  # noqa: RUF012  # declared so by the base class

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_aspect_ratio: str = "resize",
        num_frames: int = 8,
        fps: float = 0.0,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        for key in ("image_processor_type", "video_processor_type"):
            kwargs.pop(key, None)
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 448, "width": 448})
        self.image_aspect_ratio = image_aspect_ratio
        self.num_frames, self.fps = num_frames, fps
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def from_config(cls, config: NVILAConfig) -> NVILAVideoProcessor:
        """Build the video processor that belongs to a model."""
        return cls(
            size={"height": config.tile_size, "width": config.tile_size},
            image_aspect_ratio="pad" if config.image_aspect_ratio == "pad" else "resize",
            num_frames=config.num_video_frames,
            fps=config.fps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        raw: dict[str, Any] = super().to_dict()
        raw.pop("image_processor_type", None)
        return raw | {"video_processor_type": type(self).__name__}

    def load(self, video: Any, *, num_frames: int | None = None, fps: float | None = None) -> Video:
        """Read one video, sampled as this processor or the call says; a `Video` is taken as it is.

        Raises:
            DataError: It cannot be read.
        """
        from nvila.data.video import Video, load_video

        if isinstance(video, Video):
            return video
        return load_video(video, num_frames=num_frames or self.num_frames, fps=self.fps if fps is None else fps)

    def __call__(  # type: ignore[override]  # the base class takes what its backends take
        self, videos: Any, *, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Make the tiles of one or more videos.

        Args:
            videos: A video or a list of videos; see `as_videos`.
            num_frames: Frames of each video, instead of the processor's own setting.
            fps: Frames a second, likewise.
            **kwargs: Ignored, for callers that pass arguments of other video processors.

        Returns:
            `pixel_values_videos` (F, 3, size, size), the frames of all videos, and `video_frames` (videos,).

        Raises:
            DataError: A video cannot be read.
        """
        sources = as_videos(videos)
        read = partial(self.load, num_frames=num_frames, fps=fps)
        loaded = [
            named(partial(read, one), "video", number, len(sources)) for number, one in enumerate(sources, start=1)
        ]
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat([self.pixel_values(video) for video in loaded]),
                "video_frames": torch.tensor([len(video.frames) for video in loaded], dtype=torch.long),
            }
        )

    preprocess = __call__

    def pixel_values(self, video: Video) -> Tensor:
        """Turn the frames of a video into normalised tiles (T, 3, size, size)."""
        return self._tiles.normalise(self.frame_levels(video))

    def frame_levels(self, video: Video) -> Tensor:
        """Turn the frames of a video into tiles of bytes (T, 3, size, size), which `normalise` takes."""
        tiles = self._tiles
        plan = tiles.plan(*video.size)

        def cut(frame: NDArray[np.uint8]) -> Tensor:
            return cut_levels(torch.from_numpy(frame), plan, tiles.tiling)

        # One frame a thread at a time: torch releases the interpreter, and no second copy of all frames is made.
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            return torch.cat(list(pool.map(cut, video.frames)))

    def normalise(self, tiles_T3HW: Tensor) -> Tensor:
        """Scale bytes to what the tower takes."""
        return self._tiles.normalise(tiles_T3HW)

    @property
    def _tiles(self) -> NVILAImageProcessor:
        return NVILAImageProcessor(
            size=self.size,
            image_aspect_ratio=self.image_aspect_ratio,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )


def as_videos(videos: Any) -> list[Any]:
    """Tell one video from a list of videos.

    A path, a `Video`, an array (T, H, W, 3) and a list of frames (images or arrays (H, W, 3)) are one video.
    """
    if not isinstance(videos, list | tuple):
        return [videos]
    return [videos] if videos and _is_frame(videos[0]) else list(videos)


def flat_videos(videos: Any) -> list[Any]:
    """Flatten one video, a list of videos, or a list of videos for every text; frames stay together."""
    if videos is None:
        return []
    flat = []
    for one in as_videos(videos):
        many = isinstance(one, list | tuple) and len(as_videos(one)) == len(one) and as_videos(one) != [one]
        flat += list(one) if many else [one]
    return flat


def _is_frame(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image) or getattr(value, "ndim", None) == 3
