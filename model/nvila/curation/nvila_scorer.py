"""An NVILA model as a scorer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nvila.curation.encoding import Outcome, context_of, encode_all, score_all
from nvila.curation.problems import Problem
from nvila.curation.scoring import nvila_hidden, score_rows
from nvila.curation.windows import FrameSampling, Window
from nvila.data.collation import Batch
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.media_layout import MediaLayout
from nvila.data.records import Part, Sample
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

_FEATURE_TILES = 64


@dataclass(slots=True)
class NvilaScorer:
    """An NVILA model. Every image is tiled as in training, also where a sample has several."""

    model: NVILAForConditionalGeneration
    processor: NVILAProcessor

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: str) -> NvilaScorer:
        """Load a folder that `save_model` wrote."""
        from nvila.assembly import load_model
        from nvila.inspection import load_config

        load_config(str(folder))  # a released layout is named as such
        model, processor = load_model(folder, dtype=dtype)
        cast("nn.Module", model).to(device)
        return cls(model, processor)

    @property
    def sampling(self) -> FrameSampling | None:
        """As the model's video processor samples."""
        video = self.processor.video_processor
        return FrameSampling(video.num_frames, video.fps)

    def score(self, window: Window, max_tokens: int) -> list[Outcome]:
        """See `Scorer.score`."""
        outcomes = self.encode(window)

        def hidden(batch: Batch) -> Tensor:
            return nvila_hidden(self.model, batch, self.pixels(window, batch))

        pad = self.model.config.text_config.pad_token_id
        return score_all(outcomes, max_tokens, lambda rows: score_rows(rows, hidden, self.model.lm_head, pad))

    def encode(self, window: Window) -> list[Encoded | Problem]:
        """Tokenise the samples of a window with the layouts of their media."""
        tokenizer = self.processor.tokenizer
        encoder = ConversationEncoder(
            tokenizer,
            self.processor.num_image_tokens,
            sys.maxsize,  # what is too long is counted behind it, with its length
            layouts=lambda media: self._layouts(window, media),
        )
        return encode_all(window, encoder, context_of(self.model.config.text_config, tokenizer))

    def features(self, window: Window) -> list[Tensor | None]:
        """Mean vision features of each record over its media, one tile an image or frame; None without media.

        Returns:
            Vectors (C,) in fp32, C the width of the tower.
        """
        media = [[] if isinstance(sample, Problem) else _media(sample) for sample in window.samples]
        wanted = dict.fromkeys(part for parts in media for part in parts)
        images = [part for part in wanted if part.type == "image"]
        means: dict[Part, Tensor] = {}
        for start in range(0, len(images), _FEATURE_TILES):
            some = images[start : start + _FEATURE_TILES]
            pictures = [window.images[part.value] for part in some]
            tiles = self.processor.image_processor(pictures, tile=False)["pixel_values"]
            means |= zip(some, self._tower(tiles).mean(1), strict=True)
        sampling = cast("FrameSampling", self.sampling)
        for part in (part for part in wanted if part.type == "video"):
            frames = self.processor.video_processor.pixel_values(window.videos[part.value, sampling])
            means[part] = self._tower(frames).mean((0, 1))
        return [torch.stack([means[part] for part in parts]).mean(0) if parts else None for parts in media]

    @torch.inference_mode()
    def _tower(self, pixels_TCHW: Tensor) -> Tensor:
        features_TNC: Tensor = self.model.model.tower_features(pixels_TCHW)
        return features_TNC.float().cpu()

    def _layouts(self, window: Window, media: Sequence[Part]) -> list[MediaLayout]:
        tokens, images = self.processor.media_tokens, self.processor.image_processor
        tiled, sampling = images.tiles_images, cast("FrameSampling", self.sampling)
        return [
            tokens.image(images.plan(*window.images[part.value].size), tiled=tiled)
            if part.type == "image"
            else tokens.video(len(window.videos[part.value, sampling]))
            for part in media
        ]

    def pixels(self, window: Window, batch: Batch) -> dict[str, Tensor]:
        """Make the pixel arguments of a batch."""
        device, dtype = self.model.device, self.model.dtype
        pixels: dict[str, Tensor] = {}
        if batch.images:
            pictures = [window.images[key] for key in batch.images]
            plans = [self.processor.image_processor.plan(*picture.size) for picture in pictures]
            pixels |= self.processor.image_processor.tensors(pictures, plans)
        if batch.videos:
            sampling = cast("FrameSampling", self.sampling)
            pixels |= self.processor.video_processor([window.videos[key, sampling] for key in batch.videos])
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in pixels.items()}


def _media(sample: Sample) -> list[Part]:
    return [part for message in sample.messages for part in message.content if part.type != "text"]
