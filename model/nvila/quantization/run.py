"""Quantize a model part by part, measure each part before and after, and leave wide what loses too much."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from nvila.curation.nvila_scorer import NvilaScorer
from nvila.errors import CapabilityError, ConfigError
from nvila.evaluation.statistics import compare_paired
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.quantization.calibrated import LayerError, quantize_blocks
from nvila.quantization.capture import language_inputs, vision_inputs
from nvila.quantization.config import PARTS, Part, QuantizationConfig
from nvila.quantization.quantize import check_widths, part_module
from nvila.quantization.report import Loss, PartReport, QuantizationReport, Scores, methods, scores_of
from nvila.quantization.resume import PartStates
from nvila.quantization.samples import AnswerMarks, SampleSet, mark_answers
from nvila.quantization.saved import tensor_bytes
from nvila.quantization.schemes import quantize_linears
from nvila.quantization.speed import Speed, measure_speed, prompts_of

Restore = Callable[[Part], None]
"""Puts the wide weights of a part back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What to calibrate and measure with.

    Args:
        calibration: Samples that scales and ranges are chosen on; None rounds to nearest.
        evaluation: Other samples, that every part is measured on; None measures no accuracy and keeps every part.
        budget: Points of accuracy that a part may lose.
        speed: Whether to time requests.
        alpha: Strength of SmoothQuant.
        scratch: Folder for hidden states; None is the system's folder for temporary files.
        states: Folder that keeps finished blocks, for a run that goes on where an interrupted one of the same model,
            data and options was; None keeps nothing.
    """

    calibration: SampleSet | None = None
    evaluation: SampleSet | None = None
    budget: float = 1.0
    speed: bool = True
    alpha: float = 0.5
    scratch: Path | None = None
    states: Path | None = None

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ConfigError(f"the budget is {self.budget} points", "use 0 or more")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}", "use 0 to 1; 0.5 is usual")


@torch.no_grad()
def quantize_in_parts(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    config: QuantizationConfig,
    measuring: Measuring,
    *,
    restore: Restore,
    reporter: Reporter = SILENT,
) -> tuple[QuantizationConfig, QuantizationReport]:
    """Quantize the tower, then the decoder behind the quantized tower, in place.

    Args:
        model: Wide model in evaluation mode.
        processor: Its processor.
        config: Schemes that are wanted.
        measuring: Samples, and what a part may lose.
        restore: Puts the wide weights of a part back, for one that loses more.
        reporter: Receives progress and what is left wide.

    Returns:
        The schemes that the model has now, and the report.

    Raises:
        ConfigError: The group size does not fit.
        DataError: No sample can be used.
    """
    check_widths(model, config)
    scorer = NvilaScorer(model, processor)
    state = _State(scorer, measuring, reporter)
    wide = state.measure("wide")
    wide_sizes = part_sizes(model)
    parts: list[PartReport] = []
    now = wide
    for part in PARTS:
        if config.scheme(part) == "none":
            continue
        errors = quantize_part(scorer, part, config, measuring, reporter)
        after = state.measure(part)
        loss = _loss(now, after)
        kept = loss is None or loss.points <= measuring.budget
        size = part_sizes(model)[part]
        if not kept:
            assert loss is not None
            restore(part)
            reporter.notice(
                f"{part} is left wide: {config.scheme(part)} loses {loss.points:.2f} points of {loss.of}, "
                f"the budget is {measuring.budget:g}"
            )
        parts.append(
            PartReport(
                part=part,
                scheme=config.scheme(part),
                method=methods(config.scheme(part), calibrated=measuring.calibration is not None),
                kept=kept,
                bytes_before=wide_sizes[part],
                bytes_after=size,
                before=now.scores,
                after=after.scores,
                loss=loss,
                speed_before=now.speed,
                speed_after=after.speed,
                layers=tuple(errors),
            )
        )
        now = after if kept else now
    result = config.only(*(one.part for one in parts if one.kept))
    report = QuantizationReport(
        config=result,
        wanted=config,
        budget=measuring.budget,
        num_calibration=0 if measuring.calibration is None else len(measuring.calibration),
        parts=tuple(parts),
        sizes={"wide": wide_sizes, "quantized": part_sizes(model)},
        before=wide.scores,
        after=now.scores,
        loss=_loss(wide, now) if parts else None,
        speed_before=wide.speed,
        speed_after=now.speed,
    )
    return result, report


def quantize_part(
    scorer: NvilaScorer, part: Part, config: QuantizationConfig, measuring: Measuring, reporter: Reporter = SILENT
) -> Sequence[LayerError]:
    """Quantize one part in place; without calibration samples by rounding to nearest, and without errors to report."""
    model, scheme = scorer.model, config.scheme(part)
    module = part_module(model, part)
    if measuring.calibration is None:
        quantize_linears(module, scheme, config.group_size)
        return ()
    if part == "language" and len(set(getattr(model.config.text_config, "layer_types", None) or ["all"])) > 1:
        # Their blocks take different masks, and only one is captured.
        reporter.notice("language has layers of several kinds of attention: rounded to nearest, not calibrated")
        quantize_linears(module, scheme, config.group_size)
        return ()
    capture = vision_inputs if part == "vision" else language_inputs
    blocks = cast("Iterable[nn.Module]", module if part == "vision" else model.model.language_model.layers)
    kept = None if measuring.states is None else PartStates(measuring.states, part, scheme, config.group_size)
    with tempfile.TemporaryDirectory(prefix="nvila-quantize-", dir=measuring.scratch) as scratch:
        inputs = capture(model, _told(measuring.calibration, scorer, reporter, part), Path(scratch))
        if not inputs.hidden:
            raise CapabilityError(
                f"none of the calibration samples has media to quantize the {part} part with",
                f"name data with images or videos, or leave it wide: --{part} none",
            )
        return quantize_blocks(
            list(blocks),
            inputs,
            scheme,
            config.group_size,
            reporter=reporter,
            phase=f"quantize {part}",
            alpha=measuring.alpha,
            states=kept,
        )


def part_sizes(model: NVILAForConditionalGeneration) -> dict[str, int]:
    """Return what the weights of each part take on disk, in bytes."""
    parts = {
        "vision": model.model.vision_tower,
        "projector": model.model.mm_projector,
        "language": model.model.language_model,
    }
    return {name: tensor_bytes(part) for name, part in parts.items()} | {"total": tensor_bytes(model)}


def _told(samples: SampleSet, scorer: NvilaScorer, reporter: Reporter, part: Part) -> Iterable[dict[str, torch.Tensor]]:
    for count, inputs in enumerate(samples.inputs(scorer), start=1):
        reporter.progress(f"calibrate {part}", min(count, len(samples)), len(samples))
        yield inputs


@dataclass(frozen=True, slots=True)
class _Measured:
    marks: Sequence[AnswerMarks]
    scores: Scores | None
    speed: Speed | None


class _State:
    """Measures a model as it is, always with the same samples and prompts."""

    def __init__(self, scorer: NvilaScorer, measuring: Measuring, reporter: Reporter) -> None:
        self._scorer, self._measuring, self._reporter = scorer, measuring, reporter
        samples = measuring.evaluation or measuring.calibration
        self._prompts = prompts_of(scorer, samples) if measuring.speed and samples is not None else []

    def measure(self, name: str) -> _Measured:
        marks: Sequence[AnswerMarks] = ()
        if self._measuring.evaluation is not None:
            phase = f"measure {name}"
            marks = mark_answers(self._scorer, self._measuring.evaluation, reporter=self._reporter, phase=phase)
        speed = measure_speed(self._scorer.model, self._prompts) if self._prompts else None
        return _Measured(marks, scores_of(marks) if marks else None, speed)


def _loss(before: _Measured, after: _Measured) -> Loss | None:
    """Compare answers, and their tokens where those lose more."""
    if not before.marks:
        return None
    exact = compare_paired([float(m.exact) for m in before.marks], [float(m.exact) for m in after.marks], seed=0)
    tokens = compare_paired(
        [m.right_tokens / m.num_tokens for m in before.marks],
        [m.right_tokens / m.num_tokens for m in after.marks],
        seed=0,
    )
    of, worse = ("answers", exact) if exact.difference <= tokens.difference else ("tokens", tokens)
    return Loss(
        of=of,
        points=100 * (0.0 - worse.difference),
        low=100 * (0.0 - worse.high),
        high=100 * (0.0 - worse.low),
        p_value=worse.p_value,
        better=worse.better,
        worse=worse.worse,
    )
