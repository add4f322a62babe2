"""Images and videos of a prompt, known by their content, and the visual tokens kept for those that come again.

Shape suffixes: M visual tokens, H language width, T tiles or frames.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvila.vision.tiling import Grid


@dataclass(slots=True, eq=False, kw_only=True)
class Medium:
    """One image or video of a prompt.

    Args:
        digest: Of its pixels and how they are tiled; equal digests mean equal visual tokens.
        cut: Makes its tiles or frames of bytes (T, 3, size, size).
        normalise: Scales such bytes to what the tower takes.
        num_tiles: Tiles or frames.
        block: Grid of the last scale of an image with merged scales.
        is_video: Whether the tiles are frames.
    """

    digest: bytes
    cut: Callable[[], Tensor]
    normalise: Callable[[Tensor], Tensor]
    num_tiles: int
    block: Grid | None
    is_video: bool
    # Where its visual tokens stand in the prompt, ascending.
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _levels: Tensor | None = None

    def prepare(self) -> None:
        """Cut the tiles now, in the caller's thread, so that no step of the model waits for it."""
        self._levels = self.cut()

    def pixels(self, first: int, after: int) -> Tensor:
        """Return some normalised tiles (T, 3, size, size)."""
        if self._levels is None:
            self.prepare()
        assert self._levels is not None
        return self.normalise(self._levels[first:after])

    def release(self) -> None:
        """Forget the tiles; they are cut again if somebody asks."""
        self._levels = None


def digest_of(data: bytes, kind: object) -> bytes:
    """Return the digest of a medium's content, told apart by what it is and how it is tiled."""
    digest = hashlib.sha256(repr(kind).encode())
    digest.update(data)
    return digest.digest()


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

    def __contains__(self, digest: bytes) -> bool:
        """Whether visual tokens are known; counts as no use of them."""
        with self._lock:
            return digest in self._entries

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
