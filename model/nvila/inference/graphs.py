"""Decoding steps recorded once as CUDA graphs and replayed, so that launching small operations costs nothing.

A recorded step reads and writes fixed tensors: one row for every request, block tables of one length. There is a
recording for each number of requests and each power of two of blocks, made when it is needed first; those of short
answers are made at the start. Steps with prompt tokens run as before.

Shape suffixes: B requests, H language width, V vocabulary, L positions of a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvila.inference.attention import BlockBatch, Span, attend_padded
from nvila.inference.blocks import BlockPool

if TYPE_CHECKING:
    from nvila.inference.decoders import StepDecoder

logger = logging.getLogger(__name__)

# Blocks that the shortest recording has room for.
_FEWEST_BLOCKS = 8
_TIMED_STEPS = 20
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


class FixedBatch:
    """One new token of each of several requests, in tensors that stay where they are.

    Args:
        pool: The pool.
        rows: Requests.
        blocks: Room of every block table.
    """

    def __init__(self, pool: BlockPool, rows: int, blocks: int) -> None:
        device, size = pool.keys[0].device, pool.block_size
        self._pool = pool
        self.positions_T = torch.zeros(rows, dtype=torch.long, device=device)
        self._slots_T = torch.zeros(rows, dtype=torch.long, device=device)
        self._tables = torch.zeros(rows, blocks, dtype=torch.long, device=device)
        self._mask = torch.zeros(rows, 1, 1, blocks * size, dtype=torch.bool, device=device)
        self._places_L = torch.arange(blocks * size, device=device)

    def load(self, spans: Sequence[Span]) -> None:
        """Put the requests of a step into the tensors; there are exactly as many, and their tables fit."""
        size = self._pool.block_size
        positions_T = torch.tensor([span.start for span in spans])
        tables = torch.zeros(self._tables.shape, dtype=torch.long)
        for row, span in enumerate(spans):
            used = span.blocks[: self._pool.blocks_for(span.end)]
            tables[row, : len(used)] = torch.tensor(used)
        self._tables.copy_(tables)
        self.positions_T.copy_(positions_T)
        self._slots_T.copy_(tables.gather(1, positions_T[:, None] // size)[:, 0] * size + positions_T % size)
        self._mask.copy_((self._places_L[None] <= self.positions_T[:, None])[:, None, None])

    def attend(self, layer: int, query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        """See `BlockBatch.attend`."""
        keys_SKD, values_SKD = self._pool.keys[layer], self._pool.values[layer]
        keys_SKD.index_copy_(0, self._slots_T, key_TKD)
        values_SKD.index_copy_(0, self._slots_T, value_TKD)
        return attend_padded(query_TQD, self._tables, self._mask, keys_SKD, values_SKD, scaling, self._pool.block_size)


class GraphedDecoder:
    """A decoder whose decoding steps are recorded.

    Args:
        decoder: What runs the model.
        pool: Keys and values of all requests.
        hidden: Language width.
        rows: Most requests of a recorded step; larger ones run as before.
        record: Runs a function once for good and returns its result with what runs it again.
    """

    def __init__(self, decoder: StepDecoder, pool: BlockPool, *, hidden: int, rows: int, record: Record) -> None:
        self._decoder = decoder
        self._pool = pool
        self._hidden = hidden
        self._rows = rows
        self._record = record
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._off = False

    @classmethod
    def build(
        cls, decoder: StepDecoder, pool: BlockPool, *, hidden: int, rows: int, unless_slower: bool
    ) -> GraphedDecoder | StepDecoder:
        """Record the first steps and return the graphed decoder, or the decoder itself where that is no gain.

        Args:
            decoder: What runs the model.
            pool: Keys and values of all requests; nobody uses it yet.
            hidden: Language width.
            rows: Most requests of a recorded step.
            unless_slower: Time both ways and keep the recordings only if they are faster.
        """
        graphed = cls(decoder, pool, hidden=hidden, rows=rows, record=cuda_recorder())
        began = time.monotonic()
        if not graphed.warm_up():
            return decoder
        if unless_slower:
            plain_s, graphed_s = _step_seconds(decoder, pool, hidden), _step_seconds(graphed, pool, hidden)
            if graphed_s >= plain_s:
                logger.info("no CUDA graphs: a step takes %.2g s with, %.2g s without", graphed_s, plain_s)
                return decoder
        logger.info("CUDA graphs of %d steps recorded in %.1f s", rows, time.monotonic() - began)
        return graphed

    @torch.inference_mode()
    def warm_up(self) -> bool:
        """Record a short step of every number of requests; returns whether recording works here."""
        for rows in range(1, self._rows + 1):
            spans = [Span([0], 0, 1)] * rows
            self(_zeros(self._pool, rows, self._hidden), BlockBatch(self._pool, spans), _all_rows(self._pool, rows))
        # Block 0 was written to; its values stay zero.
        for tensor in (*self._pool.keys, *self._pool.values):
            tensor[: self._pool.block_size].zero_()
        return not self._off

    def __call__(self, embeds_TH: Tensor, batch: BlockBatch, rows_R: Tensor) -> Tensor:
        """See `Decoder`."""
        spans = batch.spans
        decoding = len(rows_R) == len(spans) <= self._rows and all(span.length == 1 for span in spans)
        if self._off or not decoding:
            return self._decoder(embeds_TH, batch, rows_R)
        longest = max(self._pool.blocks_for(span.end) for span in spans)
        key = len(spans), max(_FEWEST_BLOCKS, 1 << (longest - 1).bit_length())
        if key in self._recordings:
            return self._recordings[key].run(embeds_TH, spans)
        try:
            fixed = FixedBatch(self._pool, *key)
            self._recordings[key] = recording = _Recording(self._decoder, self._record, fixed, embeds_TH, spans)
        except RuntimeError as e:
            logger.warning("decoding is not recorded as CUDA graphs: %s", str(e).partition("\n")[0])
            self._off = True
            return self._decoder(embeds_TH, batch, rows_R)
        return recording.run(embeds_TH, spans)


class _Recording:
    """One recorded step and the tensors that it reads."""

    def __init__(
        self, decoder: StepDecoder, record: Record, batch: FixedBatch, embeds_BH: Tensor, spans: Sequence[Span]
    ) -> None:
        self._batch = batch
        self._embeds_BH = embeds_BH.clone()
        rows_B = torch.arange(len(spans), device=embeds_BH.device)
        batch.load(spans)
        self._logits_BV, self._replay = record(lambda: decoder(self._embeds_BH, batch, rows_B))

    def run(self, embeds_BH: Tensor, spans: Sequence[Span]) -> Tensor:
        """Return logits (B, V)."""
        self._embeds_BH.copy_(embeds_BH)
        self._batch.load(spans)
        self._replay()
        return self._logits_BV.clone()


def cuda_recorder() -> Record:
    """Return what records a function as a CUDA graph; all graphs share memory, as only one runs at a time."""
    memory = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        # First outside, on another stream: libraries allocate and choose kernels on their first calls.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            result = step()
        return result, graph.replay

    return record


@torch.inference_mode()
def _step_seconds(decoder: StepDecoder | GraphedDecoder, pool: BlockPool, hidden: int) -> float:
    """Return how long a step of one request takes."""
    embeds_BH, rows_B = _zeros(pool, 1, hidden), _all_rows(pool, 1)
    began = 0.0
    for number in range(_TIMED_STEPS + 1):  # the first one warms up
        if number == 1:
            torch.cuda.synchronize()
            began = time.perf_counter()
        decoder(embeds_BH, BlockBatch(pool, [Span([0], 0, 1)]), rows_B)
    torch.cuda.synchronize()
    for tensor in (*pool.keys, *pool.values):
        tensor[: pool.block_size].zero_()
    return (time.perf_counter() - began) / _TIMED_STEPS


def _zeros(pool: BlockPool, rows: int, hidden: int) -> Tensor:
    return torch.zeros(rows, hidden, dtype=pool.keys[0].dtype, device=pool.keys[0].device)


def _all_rows(pool: BlockPool, rows: int) -> Tensor:
    return torch.arange(rows, device=pool.keys[0].device)
