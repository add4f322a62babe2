"""Quantize a trained model, calibrated and measured on the run's data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from nvila.data.readers.record import CountedStream
    from nvila.quantization.report import QuantizationReport
    from nvila.quantization.run import Measuring


def run(context: StepContext) -> dict[str, float]:
    """Quantize the parts of the model, measure each, and leave wide what loses more than its budget.

    A step that was interrupted goes on behind its last finished block.

    Outputs: `model/`, `quantization.json`, `sizes.json`.
    """
    from nvila.assembly import load_model
    from nvila.checkpoints.documents import carry_documents
    from nvila.quantization.resume import forget
    from nvila.quantization.run import quantize_in_parts
    from nvila.quantization.saved import restore_part
    from nvila_pipelines.quantization.work import STATES_FOLDER, write_result

    folder = context.inputs["model"] / "model"
    model, processor = load_model(folder)
    _, report = quantize_in_parts(
        model,
        processor,
        context.recipe.quantization_config(),
        _measuring(context),
        restore=lambda part: restore_part(model, folder, part),
        reporter=context.reporter,
    )
    for one in report.parts:
        if one.kept:
            context.reporter.notice(f"{one.part} is {one.scheme} ({one.method})")
    # The speed stays out of the files: equal models must give an equal digest.
    metrics = write_result(model, processor, _without_speed(report), context.out_dir)
    carry_documents(folder, context.out_dir / "model")
    forget(context.out_dir / STATES_FOLDER)
    return {**metrics, **_speeds(report)}


def _measuring(context: StepContext) -> Measuring:
    """Calibrate on what was trained on, and measure on what was held out."""
    from nvila.quantization.run import Measuring
    from nvila.quantization.samples import split_samples
    from nvila_pipelines.quantization.work import STATES_FOLDER

    config, data = context.recipe.quantize, context.inputs["data"]
    budget = config.budget
    if not config.calibration_samples:
        return Measuring(budget=budget, speed=False)
    if config.data is not None:
        calibration, evaluation = split_samples(
            _named(config.data, data), calibrate=config.calibration_samples, measure=max(1, config.evaluation_samples)
        )
    elif (data / "train.jsonl").is_file():
        calibration, _ = split_samples(_split(data, "train"), calibrate=config.calibration_samples, measure=1)
        _, evaluation = split_samples(
            _split(data, "validation"), calibrate=1, measure=max(1, config.evaluation_samples)
        )
    else:
        context.reporter.notice("quantize.data names no data set: weights are rounded to nearest, nothing is measured")
        return Measuring(budget=budget, speed=False)
    measured = evaluation if config.evaluation_samples else None
    return Measuring(
        calibration=calibration,
        evaluation=measured,
        budget=budget,
        scratch=context.out_dir,
        states=context.out_dir / STATES_FOLDER,
    )


def _split(data: Path, name: str) -> CountedStream:
    from nvila.data.readers.opening import DatasetSpec, open_dataset

    return open_dataset(DatasetSpec(path=str(data / f"{name}.jsonl")))


def _named(expression: str, data: Path) -> CountedStream:
    """Open a data set of the registry that the run's data are named in."""
    from nvila_pipelines.curation.spec import DataSpec, open_stream
    from nvila_pipelines.training.mixtures import REGISTRY_FILE

    file = data / REGISTRY_FILE
    registry = json.loads(file.read_text(encoding="utf-8"))["registry"] if file.is_file() else None
    return open_stream(DataSpec(data=expression, mixtures=registry))


def _without_speed(report: QuantizationReport) -> QuantizationReport:
    parts = tuple(replace(one, speed_before=None, speed_after=None) for one in report.parts)
    return replace(report, parts=parts, speed_before=None, speed_after=None)


def _speeds(report: QuantizationReport) -> dict[str, float]:
    named = {"wide": report.speed_before, "quantized": report.speed_after}
    named |= {one.part: one.speed_after for one in report.parts}
    found: dict[str, float] = {}
    for name, speed in named.items():
        if speed is not None:
            found[f"ttft_ms_{name}"] = speed.ttft_ms
            found[f"decode_tokens_per_second_{name}"] = speed.decode_tokens_per_s
    return found
