"""Visual tokens of a request's media: encoded together with those of other requests, and once for equal media.

Shape suffixes: L positions of a prompt, M visual tokens, H language width, T tiles or frames.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvila.backbone import NVILAModel
from nvila.configuration import NVILAConfig
from nvila.errors import DataError
from nvila.prompts import MediaTokens


@dataclass(frozen=True, slots=True, eq=False)
class Medium:
    """One image, tile or video of a prompt.

    Args:
        digest: Of what the tower sees; equal digests mean equal visual tokens.
        pixels: Normalised tiles or frames (T, 3, height, width).
        block: Grid of an image with merged scales, a row of `image_blocks`.
        is_video: Whether `pixels` are frames.
        places: Where its visual tokens stand in the prompt, ascending.
    """

    digest: bytes
    pixels: Tensor
    block: Tensor | None
    is_video: bool
    places: Tensor


def split_media(inputs: Mapping[str, Tensor], config: NVILAConfig, tokens: MediaTokens) -> list[Medium]:
    """Take the processor's tensors of one prompt apart into its media.

    Args:
        inputs: What the processor returned for a single conversation.
        config: Configuration of the model.
        tokens: How many tokens its media take.

    Raises:
        DataError: Placeholders and media do not fit together.
    """
    ids_L = inputs["input_ids"][0]
    media: list[Medium] = []
    if "pixel_values" in inputs:
        pixels, blocks = inputs["pixel_values"], inputs.get("image_blocks")
        places = (ids_L == config.image_token_id).nonzero().squeeze(1)
        # Merged scales look at an image as a whole; otherwise every tile is encoded on its own, and known on its own.
        count = len(pixels) if blocks is None else len(blocks)
        if len(places) % count or len(pixels) % count:
            raise DataError(f"{len(places)} placeholders and {len(pixels)} tiles are not those of {count} images")
        parts = zip(pixels.chunk(count), places.chunk(count), strict=True)
        media += [
            _medium(one, None if blocks is None else blocks[number], False, place)
            for number, (one, place) in enumerate(parts)
        ]
    if "pixel_values_videos" in inputs:
        frames = inputs["video_frames"].tolist()
        places = (ids_L == config.video_token_id).nonzero().squeeze(1)
        counts = [sum(tokens.video(number).runs) for number in frames]
        if sum(counts) != len(places):
            raise DataError(f"{len(places)} placeholders are not those of {len(frames)} videos")
        parts = zip(inputs["pixel_values_videos"].split(frames), places.split(counts), strict=True)
        media += [_medium(one, None, True, place) for one, place in parts]
    return media


def _medium(pixels: Tensor, block: Tensor | None, is_video: bool, places: Tensor) -> Medium:
    digest = hashlib.sha256(repr((is_video, tuple(pixels.shape), None if block is None else block.tolist())).encode())
    digest.update(pixels.contiguous().numpy().data)
    return Medium(digest.digest(), pixels, block, is_video, places)


class MediaCache:
    """Visual tokens by the digest of their medium; those used longest ago go first.

    Args:
        num_bytes: Most memory; 0 keeps nothing.
    """

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._size = 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._size

    def get(self, digest: bytes) -> Tensor | None:
        """Return visual tokens (M, H) that are known."""
        with self._lock:
            found = self._entries.get(digest)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(digest)
            return found

    def put(self, digest: bytes, features_MH: Tensor) -> None:
        """Keep visual tokens, if they fit at all."""
        size = features_MH.numel() * features_MH.element_size()
        with self._lock:
            if size > self._room or digest in self._entries:
                return
            self._entries[digest] = features_MH
            self._size += size
            while self._size > self._room:
                _, dropped = self._entries.popitem(last=False)
                self._size -= dropped.numel() * dropped.element_size()


class MediaEncoder:
    """Encodes media, several at a time.

    Args:
        model: The model's tower and projector.
        cache: What is known already.
        max_tiles: Most tiles and frames of one call of the tower; a single medium may have more.
    """

    def __init__(self, model: NVILAModel, cache: MediaCache, max_tiles: int) -> None:
        self._model = model
        self._cache = cache
        self._max_tiles = max_tiles

    def encode(self, media: Sequence[Medium]) -> dict[bytes, Tensor | Exception]:
        """Return visual tokens (M, H) by digest; equal media are encoded once, those that are known not at all.

        A medium that the model fails on gets its error, and the others their tokens.
        """
        found: dict[bytes, Tensor | Exception] = {}
        missing: dict[bytes, Medium] = {}
        for medium in media:
            if medium.digest in found or medium.digest in missing:
                continue
            known = self._cache.get(medium.digest)
            if known is None:
                missing[medium.digest] = medium
            else:
                found[medium.digest] = known
        for batch in self._batches(list(missing.values())):
            found |= self._isolated(batch)
        return found

    def _batches(self, media: list[Medium]) -> list[list[Medium]]:
        batches: list[list[Medium]] = []
        room = 0
        for medium in media:
            if not batches or len(medium.pixels) > room:
                batches.append([])
                room = self._max_tiles
            batches[-1].append(medium)
            room -= len(medium.pixels)
        return batches

    def _isolated(self, batch: list[Medium]) -> dict[bytes, Tensor | Exception]:
        try:
            features = self._call(batch)
        except Exception as e:
            if len(batch) == 1:
                return {batch[0].digest: e}
            return {digest: one for medium in batch for digest, one in self._isolated([medium]).items()}
        for digest, tokens_MH in features.items():
            self._cache.put(digest, tokens_MH)
        return dict(features)

    def _call(self, batch: list[Medium]) -> dict[bytes, Tensor]:
        images = [medium for medium in batch if not medium.is_video]
        videos = [medium for medium in batch if medium.is_video]
        blocks = [medium.block for medium in images if medium.block is not None]
        tokens = self._model.encode_media(
            torch.cat([medium.pixels for medium in images]) if images else None,
            torch.stack(blocks) if blocks else None,
            torch.cat([medium.pixels for medium in videos]) if videos else None,
            torch.tensor([len(medium.pixels) for medium in videos]) if videos else None,
        )
        features: dict[bytes, Tensor] = {}
        for media, tokens_MH in zip((images, videos), tokens, strict=True):
            if tokens_MH is not None:
                # Copies: a part of the batch must not keep the whole of it in memory.
                parts = tokens_MH.split([len(medium.places) for medium in media])
                features |= {medium.digest: part.clone() for medium, part in zip(media, parts, strict=True)}
        return features
