"""What quantizing cost and saved, by part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvila.quantization.calibrated import LayerError
from nvila.quantization.config import Part, QuantizationConfig, Scheme
from nvila.quantization.samples import AnswerMarks
from nvila.quantization.speed import Speed

REPORT_FILE = "quantization.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A model on the evaluation samples, read the right answers.

    Args:
        answers: Share of answers all of whose tokens are the likeliest, so that greedy decoding gives them.
        tokens: Mean share of an answer's tokens that are.
        nll: Negative log-likelihood a token.
        num_samples: Answers.
    """

    answers: float
    tokens: float
    nll: float
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one model loses against another on the same samples, in points, with a 95% interval.

    Args:
        of: `answers` or `tokens`, whichever loses more.
        points: Loss; negative is a gain.
        low: Lower end of the interval.
        high: Upper end.
        p_value: Of a paired test that both are equal.
        better: Samples that the later model does better on.
        worse: Samples that it does worse on.
    """

    of: str
    points: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One part, compared with the model before this part was quantized.

    Args:
        part: Name.
        scheme: What was asked for.
        method: How it was done.
        kept: False if it lost more than its budget and was left wide.
        bytes_before: Size on disk, wide.
        bytes_after: Size on disk, quantized.
        before: Scores without this part quantized.
        after: Scores with it.
        loss: Their difference.
        speed_before: Speed without it.
        speed_after: Speed with it.
        layers: Error of every linear layer.
    """

    part: Part
    scheme: Scheme
    method: str
    kept: bool
    bytes_before: int
    bytes_after: int
    before: Scores | None
    after: Scores | None
    loss: Loss | None
    speed_before: Speed | None
    speed_after: Speed | None
    layers: tuple[LayerError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """All parts, and the whole model before and after.

    Args:
        config: Schemes of the result.
        wanted: Schemes that were asked for.
        budget: Points that a part may lose.
        num_calibration: Samples that were calibrated on; 0 is rounding to nearest.
        parts: Parts in the order in which they were quantized.
        sizes: Bytes on disk by part, `wide` and `quantized`.
        before: Scores of the wide model.
        after: Scores of the result.
        loss: Their difference.
        speed_before: Speed of the wide model.
        speed_after: Speed of the result.
    """

    config: QuantizationConfig
    wanted: QuantizationConfig
    budget: float
    num_calibration: int
    parts: tuple[PartReport, ...]
    sizes: Mapping[str, Mapping[str, int]]
    before: Scores | None
    after: Scores | None
    loss: Loss | None
    speed_before: Speed | None
    speed_after: Speed | None

    @property
    def left_wide(self) -> tuple[Part, ...]:
        """Parts that lost more than their budget."""
        return tuple(one.part for one in self.parts if not one.kept)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "left_wide": list(self.left_wide)}

    def save(self, directory: Path) -> None:
        """Write `quantization.json`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (directory / REPORT_FILE).write_text(text, encoding="utf-8")


def scores_of(marks: Sequence[AnswerMarks]) -> Scores:
    """Sum up marks."""
    return Scores(
        answers=sum(mark.exact for mark in marks) / len(marks),
        tokens=sum(mark.right_tokens / mark.num_tokens for mark in marks) / len(marks),
        nll=sum(mark.nll for mark in marks) / sum(mark.num_tokens for mark in marks),
        num_samples=len(marks),
    )


def methods(scheme: Scheme, *, calibrated: bool) -> str:
    """Return what a scheme is done with."""
    known = {"w8a8": "SmoothQuant", "w4a16": "AWQ"} if calibrated else {}
    return known.get(scheme, "round to nearest")
