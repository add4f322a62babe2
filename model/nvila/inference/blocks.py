"""Keys and values of all requests, in blocks of one fixed pool.

A block holds the keys and values of `block_size` positions in every layer. Blocks of a prompt that are full carry the
digest of everything up to their end, so that another prompt that begins alike takes them over. A block that nobody
uses keeps its digest until it is needed for something else; the one unused for longest goes first.

Block 0 belongs to nobody: it pads tables of different length, and its values stay zero.

Shape suffixes: S slots (positions of all blocks), K key-value heads, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvila.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Sizes of one position's keys and values."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position in all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize


class BlockPool:
    """The memory, and who has which part of it.

    Args:
        shape: Sizes of the model.
        num_bytes: Memory to use; rounded down to whole blocks.
        block_size: Positions of a block.

    Raises:
        ConfigError: The memory is too small for a single block.
    """

    def __init__(self, shape: CacheShape, num_bytes: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_bytes // (shape.bytes_per_token * block_size)
        if self.num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes is {num_bytes}, one block of {block_size} positions takes "
                f"{shape.bytes_per_token * block_size}",
                "give the cache more memory",
            )
        slots = (self.num_blocks + 1) * block_size
        size = (slots, shape.num_heads, shape.head_dim)
        # Zeros, not whatever was in memory: masked positions are multiplied by zero, and NaN times zero is NaN.
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)]
        # Popped from the end, so that neighbours are handed out in order and a request's blocks tend to be adjacent.
        self._free = list(range(self.num_blocks, 0, -1))
        self._users = [0] * (self.num_blocks + 1)
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # free, but their digest is still known

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._unused)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks this many positions take."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks, or None and nothing when there are not as many."""
        if count > self.num_free:
            return None
        return [self._take_one() for _ in range(count)]

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """Hand out the known blocks of the longest beginning of `digests`; they may be read, not written."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._unused.pop(block, None)
            self._users[block] += 1
            found.append(block)
        return found

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block known under the digest of all that leads up to its end."""
        if digest not in self._block_of and block not in self._digest_of:
            self._digest_of[block] = digest
            self._block_of[digest] = block

    def give_back(self, blocks: Sequence[int], *, spoiled: bool = False) -> None:
        """Return blocks, at once.

        Args:
            blocks: What a request held.
            spoiled: Their values may be NaN or wrong: forget and erase those that nobody else uses.
        """
        # From the end, so that of a prompt the beginning, which more prompts share, is evicted last.
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was returned twice"
            if self._users[block]:
                continue
            if spoiled:
                self._forget(block)
                self._erase(block)
            if block in self._digest_of:
                self._unused[block] = None
            else:
                self._free.append(block)

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def _erase(self, block: int) -> None:
        slots = slice(block * self.block_size, (block + 1) * self.block_size)
        for tensor in (*self.keys, *self.values):
            tensor[slots].zero_()
