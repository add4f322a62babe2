"""What a stage reads: its samples as token ids, and the pixels of their media as the stage tiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.media_layout import MediaLayout
from nvila.data.records import Part, Sample
from nvila.data.tensors import PixelCache, encode_groups
from nvila.processing import NVILAProcessor
from nvila.training.config import SINGLE_TILE, ModelConfig, StageConfig

ImageSource = Callable[[str], Any]


class MediaTable(Protocol):
    """Media by key, as `nvila.data.media.ImageTable` has them."""

    def image(self, key: str) -> Any:
        """Decode one image to RGB."""

    def encoded(self, key: str) -> bytes:
        """Return the bytes of one medium."""


class MediaTensors(Protocol):
    """Gives the model's inputs for the media of a batch."""

    def tensors(self, images: Sequence[str], videos: Sequence[str]) -> dict[str, Tensor]:
        """Return pixels, and what belongs to them, in the order of the keys."""


# A step of a small model takes less time than decoding its videos; this holds some thousand short ones.
KEPT_VIDEO_BYTES = 2**29


@dataclass(slots=True)
class FrameCache:
    """Tiles of videos as bytes, kept while they fit.

    Args:
        budget: Bytes to keep at most; what comes later is decoded each time.
    """

    budget: int = KEPT_VIDEO_BYTES
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the tiles of a video, (T, 3, size, size), made when they are not kept."""
        found = self._kept.get(key)
        if found is None:
            found = make()
            if self._bytes + found.nbytes <= self.budget:
                self._kept[key] = found
                self._bytes += found.nbytes
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMedia:
    """How a stage looks at media, by the model's own processor: training and answering see the same pixels.

    Args:
        processor: The processor of the model as the stage trains it.
        tile: Cut images as the model does; False gives one tile an image.
        image: Reads an image by its key.
        video: Reads the bytes of a video by its key.
        frames: Keeps decoded videos.
        sizes: Keeps the sizes of images: many samples ask about one.
    """

    processor: NVILAProcessor
    tile: bool
    image: ImageSource
    video: Callable[[str], bytes]
    frames: FrameCache = field(default_factory=FrameCache)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stage: StageConfig, processor: NVILAProcessor, image: ImageSource, video: Callable[[str], bytes]
    ) -> StageMedia:
        """Return how a stage looks at media."""
        tile = processor.image_processor.tiles_images and stage.tiling != SINGLE_TILE
        return cls(processor=processor, tile=tile, image=image, video=video)

    def layouts(self, media: Sequence[Part]) -> list[MediaLayout]:
        """Return what each medium of a conversation becomes in its row; every image is tiled, as in the reference."""
        return [self._video_layout(part.value) if part.type == "video" else self._layout(part.value) for part in media]

    def tensors(self, images: Sequence[str], videos: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs for the media of a batch, in the order of their placeholders."""
        inputs: dict[str, Tensor] = {}
        if images:
            loaded = [self.image(key) for key in images]
            plans = [self.processor.image_processor.plan(*one.size, tile=self.tile) for one in loaded]
            inputs |= self.processor.image_processor.tensors(loaded, plans)
        if videos:
            levels = [self._levels(key) for key in videos]
            inputs["pixel_values_videos"] = self.processor.video_processor.normalise(torch.cat(levels))
            inputs["video_frames"] = torch.tensor([len(one) for one in levels], dtype=torch.long)
        return inputs

    def _layout(self, key: str) -> MediaLayout:
        if key not in self.sizes:
            self.sizes[key] = self.image(key).size
        plan = self.processor.image_processor.plan(*self.sizes[key], tile=self.tile)
        return self.processor.media_tokens.image(plan, tiled=self.tile)

    def _video_layout(self, key: str) -> MediaLayout:
        videos = self.processor.video_processor
        # Evenly sampled videos need not be read to know how many frames they give.
        return self.processor.media_tokens.video(len(self._levels(key)) if videos.fps else videos.num_frames)

    def _levels(self, key: str) -> Tensor:
        videos = self.processor.video_processor
        levels: Tensor = self.frames.get(key, lambda: videos.frame_levels(videos.load(self.video(key))))
        return levels


class Feed:
    """Gives every stage its samples and its pixels; for data that fit into memory.

    Args:
        datasets: Samples by the name that stages use.
        images: Images of all samples.
        videos: Videos of all samples, under their keys.
        pixels: Tiles of all images, for models of one tile an image; made when needed.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Sample]],
        images: MediaTable,
        videos: MediaTable | None = None,
        pixels: PixelCache | None = None,
    ) -> None:
        self._datasets = datasets
        self._images, self._videos = images, videos
        self._pixels = pixels
        self._groups: dict[str, list[list[Encoded]]] = {}

    def stage(
        self, stage: StageConfig, model: ModelConfig, processor: NVILAProcessor
    ) -> tuple[list[list[Encoded]], MediaTensors]:
        """Return the groups of a stage's samples, and the source of their pixels."""
        length = stage.max_length or model.max_length
        samples = self._datasets[stage.data]
        # The pixels of whole images are kept decoded, which is what makes small models fast.
        if model.tiling == SINGLE_TILE and self._videos is None and stage.max_length is None:
            if stage.data not in self._groups:
                encoder = ConversationEncoder(processor.tokenizer, processor.num_image_tokens, length)
                self._groups[stage.data] = encode_groups(samples, encoder)
            keys = [key for every in self._datasets.values() for sample in every for key in sample.images]
            self._pixels = self._pixels or PixelCache.build(self._images, keys, model.vision["image_size"])
            return self._groups[stage.data], self._pixels
        media = StageMedia.of(stage, processor, self._images.image, self._video)
        encoder = ConversationEncoder(processor.tokenizer, processor.num_image_tokens, length, layouts=media.layouts)
        return encode_groups(samples, encoder), media

    def _video(self, key: str) -> bytes:
        assert self._videos is not None
        return self._videos.encoded(key)
