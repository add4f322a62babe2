"""Samples and images in the form that models take: token ids in groups, tiles as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Sample, group_by_images
from nvila.processing import pixel_levels


class ImageSource(Protocol):
    """Gives images by key."""

    def image(self, key: str) -> Any:
        """Decode one image to RGB."""


def encode_groups(samples: Sequence[Sample], encoder: ConversationEncoder) -> list[list[Encoded]]:
    """Tokenise samples and group those that share their images."""
    encoded = [encoder(sample) for sample in samples]
    return [[encoded[index] for index in group] for group in group_by_images(samples)]


@dataclass(slots=True)
class PixelCache:
    """Decoded tiles of a small data set, kept as bytes and normalised when asked for.

    Args:
        tiles: Key to (3, height, width) tensor of unsigned bytes.
    """

    tiles: Mapping[str, Tensor]

    @classmethod
    def build(cls, images: ImageSource, keys: Sequence[str], image_size: int) -> PixelCache:
        """Decode and resize the images of `keys` once.

        Args:
            images: Where the images are.
            keys: Images to hold; repeated keys count once.
            image_size: Side of a tile in pixels.
        """
        return cls({key: pixel_levels(images.image(key), image_size) for key in dict.fromkeys(keys)})

    def __call__(self, keys: tuple[str, ...]) -> Tensor:
        """Return normalised tiles (T, 3, h, w) in the order of `keys`; a batch of text alone has none."""
        if not keys:
            return torch.empty(0, 3, 1, 1)
        return torch.stack([self.tiles[key] for key in keys]).float().div_(127.5).sub_(1)

    def tensors(self, images: Sequence[str], videos: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs for the images of a batch; it holds no videos."""
        assert not videos
        return {"pixel_values": self(tuple(images))}
