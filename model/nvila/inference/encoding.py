"""The tower's work in pieces: some tiles in every step, so that no video holds up the answers of others.

Shape suffixes: M visual tokens, H language width, T tiles or frames, N patches or tokens of a tile, C tower width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvila.backbone import NVILAModel
from nvila.finite import check_finite
from nvila.inference.media import MediaCache, Medium
from nvila.vision.tiling import Grid


@dataclass(slots=True, eq=False)
class _Job:
    """A medium whose tiles are on their way through the tower."""

    medium: Medium
    done: int = 0
    parts: list[Tensor] = field(default_factory=list)
    outcome: Tensor | Exception | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring tiles of one medium."""

    job: _Job
    first: int
    after: int


class MediaEncoder:
    """Encodes media, some tiles at a time; equal media once, those that are known not at all.

    Args:
        model: The model's tower and projector.
        cache: What is known already.
        max_tiles: Most tiles and frames of one call of the tower.
    """

    def __init__(self, model: NVILAModel, cache: MediaCache, max_tiles: int) -> None:
        self._model = model
        self._cache = cache
        self._max_tiles = max_tiles
        self._jobs: dict[bytes, _Job] = {}

    @property
    def busy(self) -> bool:
        """Whether it holds tiles of media that may have been given up since."""
        return bool(self._jobs)

    def advance(self, media: Sequence[Medium]) -> dict[bytes, Tensor | Exception]:
        """Call the tower once for those that still have tiles to be seen, the first ones first.

        Args:
            media: Everything that is waited for; work for media that are no longer among them is dropped.

        Returns:
            Visual tokens (M, H) by digest of the media that are complete. One that the model fails on has its error,
            and the others their tokens.
        """
        jobs: dict[bytes, _Job] = {}
        for medium in media:
            digest = medium.digest
            if digest not in jobs:
                jobs[digest] = self._jobs.get(digest) or _Job(medium, outcome=self._cache.get(digest))
        self._jobs = jobs
        if pieces := list(self._pieces()):
            self._isolated(pieces)
        return {digest: job.outcome for digest, job in jobs.items() if job.outcome is not None}

    def _pieces(self) -> Iterator[_Piece]:
        """Choose the tiles of the next call."""
        room = self._max_tiles
        for job in self._jobs.values():
            if job.outcome is None and room:
                count = min(room, job.medium.num_tiles - job.done)
                room -= count
                yield _Piece(job, job.done, job.done + count)

    def _isolated(self, pieces: Sequence[_Piece]) -> None:
        try:
            self._call(pieces)
        except Exception as e:
            if len(pieces) == 1:
                pieces[0].job.outcome = e
                return
            for piece in pieces:
                self._isolated([piece])

    def _call(self, pieces: Sequence[_Piece]) -> None:
        pixels = [piece.job.medium.pixels(piece.first, piece.after) for piece in pieces]
        for one in pixels:
            check_finite(one, "pixels")
        codes = self._codes(torch.cat(pixels) if len(pixels) > 1 else pixels[0])
        # Copies: a part of the batch must not keep the whole of it in memory.
        parts = [part.clone() for part in codes.split([piece.after - piece.first for piece in pieces])]
        # Nothing of a job changes before everything that can fail for all of them is done.
        for piece, part in zip(pieces, parts, strict=True):
            job = piece.job
            job.parts.append(part)
            job.done = piece.after
            if job.done == job.medium.num_tiles:
                self._finish(job)

    def _codes(self, pixels_T3HW: Tensor) -> Tensor:
        """Return what is kept of each tile: its tokens, or its features where scales are merged before projecting."""
        features_TNC = self._model.tower_features(pixels_T3HW)
        if self._model.config.uses_s2:
            return features_TNC
        tokens_MH = self._model.project(features_TNC, [None] * len(features_TNC))
        return tokens_MH.view(len(features_TNC), -1, tokens_MH.shape[-1])

    def _finish(self, job: _Job) -> None:
        try:
            job.outcome = self._tokens(job.medium, torch.cat(job.parts))
        except Exception as e:
            job.outcome = e
        else:
            self._cache.put(job.medium.digest, job.outcome)
        job.parts.clear()
        job.medium.release()

    def _tokens(self, medium: Medium, codes: Tensor) -> Tensor:
        if self._model.config.uses_s2:
            blocks: list[Grid | None] = [None] * medium.num_tiles if medium.is_video else [medium.block]
            codes = self._model.project(codes, blocks)
        tokens_MH = codes.flatten(0, -2)
        return self._model.pool_videos(tokens_MH, medium.num_tiles) if medium.is_video else tokens_MH
