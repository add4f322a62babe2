"""Samples of a data set: some to calibrate on, others to measure on, read anew whenever they are needed.

Only one window of decoded media is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvila.curation.batching import batches
from nvila.curation.nvila_scorer import NvilaScorer
from nvila.curation.scoring import nvila_hidden
from nvila.curation.windows import Window, windows
from nvila.data.collation import collate
from nvila.data.conversation import Encoded
from nvila.data.readers.record import CountedStream, Record
from nvila.errors import DataError
from nvila.losses import IGNORE_INDEX, token_nll
from nvila.progress import SILENT, Reporter

_SPANS = 16
_WINDOW_RECORDS = 64
_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """Some records of a data set, in spans spread over all of it.

    Args:
        stream: The data set.
        spans: First and last position (exclusive) of each span.
    """

    stream: CountedStream
    spans: tuple[tuple[int, int], ...]
    # Text, and where media are; passing by the records in front of a span takes long in some formats.
    _records: list[Record] = field(default_factory=list, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def records(self) -> Iterator[Record]:
        """Read them; their media are read anew each time, when somebody asks."""
        if not self._records:
            for start, stop in self.spans:
                self._records.extend(self.stream.records(start, stop))
        yield from self._records

    def windows(self, scorer: NvilaScorer) -> Iterator[tuple[Window, dict[int, Encoded]]]:
        """Yield windows with the samples of each that fit the model, by their place in the window."""
        sampling = scorer.sampling
        assert sampling is not None
        for window in windows(self.records(), frozenset({sampling}), max_records=_WINDOW_RECORDS):
            outcomes = scorer.encode(window)
            yield window, {index: one for index, one in enumerate(outcomes) if isinstance(one, Encoded)}

    def inputs(self, scorer: NvilaScorer) -> Iterator[dict[str, Tensor]]:
        """Yield the model's inputs for one sample after the other: its whole conversation and its media.

        Raises:
            DataError: No sample can be used.
        """
        count = 0
        for window, encoded in self.windows(scorer):
            for one in encoded.values():
                batch = collate([[one]], 0)
                count += 1
                yield {
                    "input_ids": batch.input_ids.to(scorer.model.device),
                    **scorer.pixels(window, batch),
                }
        if not count:
            raise DataError(
                f"none of {len(self)} samples of {self.stream.name} can be used", "check them with nvila curate"
            )


def split_samples(stream: CountedStream, *, calibrate: int, measure: int) -> tuple[SampleSet, SampleSet]:
    """Choose samples to calibrate on and other ones to measure on, both spread over the whole data set.

    Args:
        stream: The data set.
        calibrate: How many to calibrate on; at most half of the data.
        measure: How many to measure on; at most the other half.

    Raises:
        DataError: The data set has fewer than two records.
    """
    total = stream.count()
    if total < 2:
        raise DataError(f"{stream.name} has {total} records", "name a data set with more")
    most = total // 2
    for spans in range(min(_SPANS, most, max(calibrate, measure)), 0, -1):
        sets = tuple(_spread(stream, total, spans, wanted, second) for wanted, second in ((calibrate, 0), (measure, 1)))
        # Short halves of many spans can hold fewer than half of the data: then longer ones do.
        if len(sets[0]) == min(calibrate, most) and len(sets[1]) == min(measure, most):
            break
    return sets[0], sets[1]


def _spread(stream: CountedStream, total: int, spans: int, wanted: int, second: int) -> SampleSet:
    """Choose samples from the first or the second halves of spans."""
    cuts = [total * index // (2 * spans) for index in range(2 * spans + 1)]
    taken = []
    for index in range(spans):
        start, end = cuts[2 * index + second], cuts[2 * index + second + 1]
        length = wanted * (index + 1) // spans - wanted * index // spans
        taken.append((start, min(start + length, end)))
    return SampleSet(stream=stream, spans=tuple(span for span in taken if span[1] > span[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMarks:
    """How a model does on one answer when the right words are read to it.

    Args:
        exact: Whether every token of the answer is the likeliest one; then greedy decoding gives just this answer.
        right_tokens: How many of them are.
        num_tokens: Tokens of the answer, with the end of the turn.
        nll: Negative log-likelihood, summed.
    """

    exact: bool
    right_tokens: int
    num_tokens: int
    nll: float


@torch.inference_mode()
def mark_answers(
    scorer: NvilaScorer, samples: SampleSet, *, reporter: Reporter = SILENT, phase: str = "measure"
) -> list[AnswerMarks]:
    """Mark the answers of all samples that fit the model, in the same order for every model of one processor.

    Raises:
        DataError: No sample can be used.
    """
    marks: list[AnswerMarks] = []
    for window, encoded in samples.windows(scorer):
        found: dict[int, AnswerMarks] = {}
        for batch in batches(encoded, _BATCH_TOKENS):
            rows = [[encoded[index] for index in row] for row in batch]
            found |= zip([index for row in batch for index in row], _mark(scorer, window, rows), strict=True)
        marks += [found[index] for index in sorted(found)]
        reporter.progress(phase, min(len(marks), len(samples)), len(samples))
    if not marks:
        raise DataError(f"none of {len(samples)} samples of {samples.stream.name} can be used", "check the data set")
    reporter.progress(phase, len(samples), len(samples))
    return marks


def _mark(scorer: NvilaScorer, window: Window, rows: list[list[Encoded]]) -> list[AnswerMarks]:
    pad = scorer.model.config.text_config.pad_token_id or 0
    batch = collate(rows, pad)
    hidden_BLH = nvila_hidden(scorer.model, batch, scorer.pixels(window, batch))
    labels_BL = batch.labels
    mask_BL = labels_BL != IGNORE_INDEX
    mask_BL[:, 0] = False
    logits_MV = scorer.model.lm_head(hidden_BLH[:, :-1][mask_BL[:, 1:].to(hidden_BLH.device)]).float()
    targets_M = labels_BL[mask_BL].to(logits_MV.device)
    right_M = (logits_MV.argmax(-1) == targets_M).cpu()
    nll_M = token_nll(logits_MV, targets_M).cpu()
    sizes = torch.tensor([len(row) for row in rows])
    # Segments count the samples of a row from 1; with the row's offset they number those of the batch from 0.
    sample_M = ((sizes.cumsum(0) - sizes).unsqueeze(1) + batch.segments - 1)[mask_BL]
    total = int(sizes.sum())
    counts = torch.bincount(sample_M, minlength=total)
    right = torch.zeros(total).index_add_(0, sample_M, right_M.float())
    nll = torch.zeros(total).index_add_(0, sample_M, nll_M)
    return [
        AnswerMarks(exact=int(r) == n, right_tokens=int(r), num_tokens=n, nll=loss)
        for r, n, loss in zip(right.tolist(), counts.tolist(), nll.tolist(), strict=True)
    ]
