"""Schemes side by side on one's own model and data: what `nvila bench quantize` measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from nvila_pipelines.quantization.request import QuantizationRequest

if TYPE_CHECKING:
    from torch import Tensor

    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.progress import Reporter
    from nvila.quantization.config import QuantizationConfig, Scheme

HEAD = ("form", "size", "answers", "loss, points", "layer error", "first token", "x wide", "tokens/s", "x wide")
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A speed against that of the wide model, measured in turns.

    Args:
        value: Median of the form's own speed: milliseconds, or tokens a second.
        ratio: Median of how many times faster than the wide model it is.
        low: Smallest ratio of a repeat.
        high: Largest.
    """

    value: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of the model.

    Args:
        name: Schemes and how they were applied.
        num_bytes: Size on disk.
        answers: Share of answers that greedy decoding gives exactly.
        loss_points: Points lost against the wide model on the same samples.
        loss_low: Lower end of its interval.
        loss_high: Upper end.
        p_value: Of the paired test.
        layer_error: Mean error of the linear layers; None where they were not looked at.
        ttft: Time to the first token.
        decode: Speed behind it.
    """

    name: str
    num_bytes: int
    answers: float
    loss_points: float
    loss_low: float
    loss_high: float
    p_value: float
    layer_error: float | None
    ttft: Ratio
    decode: Ratio

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare_schemes(request: QuantizationRequest, reporter: Reporter) -> Iterator[Form]:
    """Measure the wide model, then every scheme rounded to nearest and, where that means something, calibrated.

    Every form is made of the wide weights and timed in turns with the wide model, which stays in memory.

    Args:
        request: Model, data and samples; its schemes are compared as a pair, and each alone.
        reporter: Receives progress.

    Raises:
        NvilaError: The model or the data cannot be used.
    """
    from nvila.curation.nvila_scorer import NvilaScorer
    from nvila.evaluation.statistics import compare_paired
    from nvila.quantization.quantize import quantize_model
    from nvila.quantization.run import part_sizes, quantize_part
    from nvila.quantization.samples import mark_answers
    from nvila.quantization.speed import prompts_of
    from nvila_pipelines.quantization.work import load_wide, measuring_of

    measuring = measuring_of(request, None)
    assert measuring.evaluation is not None
    wide, processor = load_wide(request)
    scorer = NvilaScorer(wide, processor)
    prompts = prompts_of(scorer, measuring.evaluation)
    right = [float(mark.exact) for mark in mark_answers(scorer, measuring.evaluation, reporter=reporter)]
    forms = list(forms_of(request.config))
    for number, (name, config, calibrated) in enumerate(forms):
        reporter.progress("forms", number, len(forms))
        model, _ = load_wide(request)
        own = NvilaScorer(model, processor)
        errors: list[float] = []
        if calibrated:
            for part in ("vision", "language"):
                if config.scheme(part) != "none":
                    errors += [layer.error for layer in quantize_part(own, part, config, measuring, reporter)]
        else:
            quantize_model(model, config)
        marks = mark_answers(own, measuring.evaluation, reporter=reporter, phase=name)
        paired = compare_paired(right, [float(mark.exact) for mark in marks], seed=0)
        ttft, decode = _speeds(wide, model, prompts)
        yield Form(
            name=name,
            num_bytes=part_sizes(model)["total"],
            answers=sum(mark.exact for mark in marks) / len(marks),
            loss_points=100 * (0.0 - paired.difference),
            loss_low=100 * (0.0 - paired.high),
            loss_high=100 * (0.0 - paired.low),
            p_value=paired.p_value,
            layer_error=sum(errors) / len(errors) if errors else None,
            ttft=ttft,
            decode=decode,
        )
    reporter.progress("forms", len(forms), len(forms))


def forms_of(wanted: QuantizationConfig) -> Iterator[tuple[str, QuantizationConfig, bool]]:
    """Yield name, schemes and whether to calibrate: wide, each part alone, both parts, and both with 8 bits."""
    from nvila.quantization.config import QuantizationConfig

    def config(vision: Scheme, language: Scheme) -> QuantizationConfig:
        return QuantizationConfig(vision=vision, language=language, group_size=wanted.group_size)

    yield "wide", config("none", "none"), False
    pairs = [(wanted.vision, "none"), ("none", wanted.language), (wanted.vision, wanted.language)]
    pairs += [("int8", "int8"), ("fp8", "fp8")]
    for vision, language in dict.fromkeys(pairs):
        if (vision, language) == ("none", "none"):
            continue
        one = config(vision, language)
        name = " + ".join(f"{part} {one.scheme(part)}" for part in ("vision", "language") if one.scheme(part) != "none")
        yield f"{name}, rounded", one, False
        if {vision, language} & {"w8a8", "w4a16"}:
            yield f"{name}, calibrated", one, True


def form_row(form: Form) -> tuple[str, ...]:
    """Return the row of a form under `HEAD`."""
    from nvila_pipelines.report.formats import size

    return (
        form.name,
        size(form.num_bytes),
        f"{100 * form.answers:.2f}%",
        f"{form.loss_points:.2f} ({form.loss_low:.2f} to {form.loss_high:.2f})",
        "-" if form.layer_error is None else f"{form.layer_error:.4f}",
        f"{form.ttft.value:.1f} ms",
        f"{form.ttft.ratio:.2f} ({form.ttft.low:.2f} to {form.ttft.high:.2f})",
        f"{form.decode.value:.1f}",
        f"{form.decode.ratio:.2f} ({form.decode.low:.2f} to {form.decode.high:.2f})",
    )


def _speeds(
    wide: NVILAForConditionalGeneration, model: NVILAForConditionalGeneration, prompts: Sequence[dict[str, Tensor]]
) -> tuple[Ratio, Ratio]:
    """Time all prompts with both models in turns, after one turn that does not count."""
    first: list[tuple[float, float]] = []
    rates: list[tuple[float, float]] = []
    for repeat in range(_REPEATS + 1):
        turn = [_turn(one, prompts) for one in (wide, model)]
        if repeat:
            first.append((turn[0][0], turn[1][0]))
            rates.append((turn[0][1], turn[1][1]))
    faster = [before / after for before, after in first]
    decode = [after / before for before, after in rates]
    return (
        Ratio(value=1000 * median(t for _, t in first), ratio=median(faster), low=min(faster), high=max(faster)),
        Ratio(value=median(r for _, r in rates), ratio=median(decode), low=min(decode), high=max(decode)),
    )


def _turn(model: NVILAForConditionalGeneration, prompts: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    from nvila.quantization.speed import time_prompt

    times = [time_prompt(model, prompt) for prompt in prompts]
    return sum(ttft for ttft, _ in times) / len(times), sum(rate for _, rate in times) / len(times)
