"""One call of the language model for the new tokens of several requests, and whose fault it is when that fails.

Shape suffixes: T tokens of a step, M visual tokens, H language width, R rows that want logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvila.errors import NvilaError
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.decoders import Decoder
from nvila.inference.scheduler import Work
from nvila.modeling import NVILAForConditionalGeneration


class ModelRunner:
    """Runs the decoder on a step's work.

    Args:
        model: Embeds tokens.
        decoder: Runs everything behind the embedding.
        pool: Keys and values of all requests.
    """

    def __init__(self, model: NVILAForConditionalGeneration, decoder: Decoder, pool: BlockPool) -> None:
        self._model = model
        self._decoder = decoder
        self._pool = pool

    def run(self, work: Sequence[Work]) -> list[tuple[Work, Tensor | Exception]]:
        """Run the model; a request that it fails on gets its error, the others their logits (V) in fp32 on the CPU."""
        if not work:
            return []
        try:
            logits = self._logits(work)
        except Exception as e:
            if len(work) == 1:
                return [(work[0], e)]
            # Keys and values are written again to the same places, so a second try changes nothing for the others.
            return [outcome for one in work for outcome in self.run([one])]
        return [(one, row if row.isfinite().all() else _not_finite()) for one, row in zip(work, logits, strict=True)]

    def _logits(self, work: Sequence[Work]) -> Tensor:
        """Return logits (R, V), one row for the last new token of every request."""
        spans = [Span(one.request.blocks, one.request.computed, one.length) for one in work]
        rows = torch.tensor([span.length for span in spans]).cumsum(0) - 1
        batch = BlockBatch(self._pool, spans)
        device = batch.positions_T.device
        ids = [token for one, span in zip(work, spans, strict=True) for token in one.request.ids[span.start : span.end]]
        embeds_TH = self._model.get_input_embeddings()(torch.tensor(ids, device=device))
        at = 0
        for one, span in zip(work, spans, strict=True):
            _splice(one, span, embeds_TH[at : at + span.length])
            at += span.length
        return self._decoder(embeds_TH, batch, rows.to(device)).float().cpu()


def _splice(work: Work, span: Span, embeds_TH: Tensor) -> None:
    """Put the visual tokens of a request's new positions into their places."""
    request = work.request
    if request.places is None or request.features is None or span.start >= request.usage.prompt_tokens:
        return
    first, after = torch.searchsorted(request.places, torch.tensor([span.start, span.end])).tolist()
    places = (request.places[first:after] - span.start).to(embeds_TH.device)
    embeds_TH.index_copy_(0, places, request.features[first:after].to(embeds_TH.device, embeds_TH.dtype))


def _not_finite() -> NvilaError:
    return NvilaError("the model's prediction for this request is not finite", "check the weights and the input")
