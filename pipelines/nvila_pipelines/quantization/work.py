"""Quantize a model folder into the workspace: a finished result is found again by what it was made of."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.quantization.request import QuantizationRequest
from nvila_pipelines.verb_run import VerbRun, dataset
from nvila_platform.artifacts import code_version, content_key, storage_errors, utc_now, write_manifest

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor
    from nvila.progress import Reporter
    from nvila.quantization.report import QuantizationReport
    from nvila.quantization.run import Measuring
    from nvila_platform.settings import Settings
    from nvila_platform.store import ArtifactRef
    from nvila_platform.tracking_datasets import DatasetInput

STEP = "quantize"
MODEL_FOLDER = "model"
EXPORT_FOLDER = "exports"
SIZES_FILE = "sizes.json"
# A name with a dot is scratch, no output.
_MERGED = ".merged"
# Finished blocks of a run that was interrupted; the folder is this request's own, and goes when the result is whole.
STATES_FOLDER = "blocks"


def verb_run(request: QuantizationRequest, settings: Settings) -> VerbRun:
    """Return the run in MLflow of a request, for versions that are made of its result."""
    config, inputs, key = _identity(request)
    datasets: tuple[DatasetInput, ...] = ()
    if request.data is not None:
        counts = {"calibrate": float(request.calibrate), "measure": float(request.measure)}
        datasets = (dataset(request.data, inputs["data"], "calibration", counts),)
    return VerbRun(settings, STEP, key, {"model": inputs["model"], **config}, datasets)


def quantize_folder(
    request: QuantizationRequest, settings: Settings, reporter: Reporter, run: VerbRun | None = None
) -> ArtifactRef:
    """Quantize, measure and export a model; work that is finished is reused.

    Args:
        request: What is asked for.
        settings: Of the platform.
        reporter: Receives progress.
        run: Follows the work in MLflow; None follows nothing.

    Returns:
        The artifact: `model/`, `quantization.json`, `sizes.json` and what was exported.

    Raises:
        NvilaError: The model, the data or an option is wrong.
    """
    from nvila_platform.store import open_store, reuse

    store = open_store(settings)
    config, inputs, key = _identity(request)
    with store.lock(STEP, key, reporter):
        ref = reuse(store, STEP, key, reporter)
        if ref is not None:
            reporter.notice("this was done before with the same model, data and options")
            return ref
        out, started_at = store.work_dir(STEP, key), utc_now()
        if run is not None:
            run.open()
        with storage_errors(out):
            metrics = _work(request, out, reporter)
        write_manifest(
            out,
            step=STEP,
            key=key,
            config=config,
            inputs=inputs,
            code_version=code_version(),
            started_at=started_at,
            metrics=metrics,
        )
        return store.publish(out)


def _identity(request: QuantizationRequest) -> tuple[dict[str, Any], dict[str, str], str]:
    """Return configuration, digests of the inputs, and the key that follows from them."""
    config = request.to_config()
    inputs = {"model": request.model_digest} | ({"data": request.data_digest} if request.data_digest else {})
    return config, inputs, content_key(STEP, config, inputs, code_version())


def write_result(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    report: QuantizationReport,
    out: Path,
) -> dict[str, float]:
    """Write the quantized model and the reports into a step's directory; return its metrics."""
    from nvila.assembly import save_model
    from nvila.quantization.saved import save_quantized

    target = out / MODEL_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    if report.config.vision == report.config.language == "none":
        save_model(model, processor, target)
    else:
        save_quantized(model, report.config, target)
        processor.save_pretrained(target)
    report.save(out)
    (out / SIZES_FILE).write_text(json.dumps(report.sizes, indent=2) + "\n", encoding="utf-8")
    return metrics_of(report)


def metrics_of(report: QuantizationReport) -> dict[str, float]:
    """Return the numbers of a report that a manifest and the registry carry."""
    metrics = {
        "wide_bytes": float(report.sizes["wide"]["total"]),
        "quantized_bytes": float(report.sizes["quantized"]["total"]),
        "quantized_layers": float(sum(len(one.layers) for one in report.parts if one.kept)),
        "parts_left_wide": float(len(report.left_wide)),
    }
    for one in report.parts:
        if one.loss is not None:
            metrics[f"{one.part}_loss_points"] = round(one.loss.points, 4)
        if one.layers:
            metrics[f"{one.part}_layer_error"] = round(sum(e.error for e in one.layers) / len(one.layers), 6)
    if report.loss is not None:
        metrics["loss_points"] = round(report.loss.points, 4)
    return metrics


def _work(request: QuantizationRequest, out: Path, reporter: Reporter) -> dict[str, float]:
    from nvila.checkpoints.documents import carry_documents
    from nvila.quantization.resume import forget
    from nvila.quantization.run import quantize_in_parts
    from nvila.quantization.saved import restore_part

    merged = merged_adapter(request, out / _MERGED)
    model, processor = load_wide(merged)
    _, report = quantize_in_parts(
        model,
        processor,
        request.config,
        measuring_of(request, out),
        restore=lambda part: restore_part(model, merged.model, part),
        reporter=reporter,
    )
    metrics = write_result(model, processor, report, out)
    shutil.rmtree(out / _MERGED, ignore_errors=True)
    carry_documents(request.model, out / MODEL_FOLDER)
    shutil.rmtree(out / EXPORT_FOLDER, ignore_errors=True)
    for name in request.exports:
        reporter.progress(f"export {name}", 0, 1)
        metrics |= export_language(model, processor, name, out / EXPORT_FOLDER)
        reporter.progress(f"export {name}", 1, 1)
    forget(out / STATES_FOLDER)
    return metrics


def export_language(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, name: str, folder: Path
) -> dict[str, float]:
    """Write the language part in another form below a folder; return its size as a metric."""
    if name == "gguf":
        from nvila.quantization.gguf_export import export_gguf

        size = export_gguf(model, processor.tokenizer, folder / "language.gguf")
    else:
        from nvila.quantization.compressed_export import export_compressed

        size = export_compressed(model, processor.tokenizer, folder / "language-compressed-tensors")
    return {f"{name.replace('-', '_')}_bytes": float(size)}


def merged_adapter(request: QuantizationRequest, scratch: Path) -> QuantizationRequest:
    """Return a request for the whole weights of a model; those of an adapter over its base are written first.

    Raises:
        CheckpointError: The base of an adapter is gone, or another one.
    """
    from nvila.assembly import load_model
    from nvila.tuning.adapters import is_adapter
    from nvila.tuning.run import save_merged

    if not is_adapter(request.model):
        return request
    shutil.rmtree(scratch, ignore_errors=True)
    save_merged(*load_model(request.model), scratch)
    return replace(request, model=scratch)


def load_wide(request: QuantizationRequest) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Load the wide model of a request.

    Raises:
        ConfigError: It is quantized already.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from nvila.assembly import load_model
    from nvila.quantization.saved import is_quantized
    from nvila.tuning.adapters import is_adapter, merge

    if is_quantized(request.model):
        raise ConfigError(f"{request.model} is quantized already", "name the wide model that it was made of")
    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    options: dict[str, Any] = {} if request.dtype is None else {"dtype": kinds[request.dtype]}
    model, processor = load_model(request.model, **options)
    if is_adapter(request.model):
        model = merge(model)
    model.to(request.device)  # type: ignore[arg-type]  # transformers types `to` as a function
    return model, processor


def measuring_of(request: QuantizationRequest, scratch: Path | None) -> Measuring:
    """Open the data of a request and choose its samples."""
    from nvila.quantization.run import Measuring
    from nvila.quantization.samples import split_samples
    from nvila_pipelines.curation.spec import open_stream

    if request.data is None:
        return Measuring(budget=request.budget, alpha=request.alpha, speed=False)
    stream = open_stream(request.data)
    calibration, evaluation = split_samples(stream, calibrate=request.calibrate, measure=max(1, request.measure))
    return Measuring(
        calibration=calibration,
        evaluation=evaluation if request.measure else None,
        budget=request.budget,
        alpha=request.alpha,
        speed=request.speed,
        scratch=scratch,
        states=None if scratch is None else scratch / STATES_FOLDER,
    )
