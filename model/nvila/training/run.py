"""A training run: stages one after the other, each starting from the model that the one before saved."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from nvila.assembly import build_model, build_processor, load_model, save_model
from nvila.configuration import NVILAConfig
from nvila.data.conversation import Encoded
from nvila.data.media import ImageTable
from nvila.data.records import Sample
from nvila.data.sampling import GroupSampler
from nvila.data.tensors import PixelCache
from nvila.errors import ConfigError, nearest
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.training.config import PARTS, StageConfig, TrainConfig
from nvila.training.engine import ParameterGroup, build_engine
from nvila.training.loop import MetricsLog, run_stage
from nvila.training.media import Feed, MediaTensors
from nvila.training.observer import StageObserver, StageStart
from nvila.training.precision import apply_precision

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    datasets: Mapping[str, Sequence[Sample]],
    images: ImageTable,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    reporter: Reporter = SILENT,
    *,
    pixels: PixelCache | None = None,
    videos: ImageTable | None = None,
    observers: Sequence[StageObserver] = (),
) -> Path:
    """Run all stages and return the folder of the final model.

    Every stage leaves a complete model in `out_dir/<number>-<name>`. A stage whose folder exists is finished: an
    interrupted run, started again, goes on with the first unfinished stage and ends in the same weights.

    Args:
        config: What to train.
        datasets: Samples by the name that stages use in `data`.
        images: Images of all samples.
        tokenizer: Tokenizer of the language model.
        out_dir: Where stages and `metrics.jsonl` go.
        reporter: Receives progress.
        pixels: Tiles of all images, for a caller that has decoded them already.
        videos: Videos of all samples, by their keys.
        observers: Follow the stages that train; usually of the first process only.

    Raises:
        ConfigError: A stage names data that does not exist, or the data is empty.
    """
    for stage in config.stages:
        if stage.data not in datasets:
            raise ConfigError(f"stages.{stage.name}.data is '{stage.data}'", nearest(stage.data, datasets))
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer)
    processor = build_processor(cast("NVILAConfig", model.config), tokenizer)
    feed = Feed(datasets, images, videos, pixels)
    # One process speaks for all; they run in step and would only repeat it.
    log = MetricsLog(out_dir / "metrics.jsonl" if _rank() == 0 else Path(os.devnull))
    reporter = reporter if _rank() == 0 else SILENT
    for number, stage in enumerate(config.stages, start=1):
        directory = out_dir / f"{number}-{stage.name}"
        if directory.is_dir():
            reporter.notice(f"stage {stage.name} is already trained; going on from it")
        else:
            _drop_lines(log.path, stage.name)
            processor = _stage_processor(model, processor, stage)
            fed = feed.stage(stage, config.model, processor)
            _train_stage(model, fed, stage, config, number, log, reporter, observers)
            if _rank() == 0:
                _save(model, processor, directory)
        # Also after a stage that just ran: the next one then starts from what was saved, as it would after a restart.
        model, processor = load_model(_wait_for(directory))
    return directory


def trained_parts(model: NVILAForConditionalGeneration, stage: StageConfig) -> list[ParameterGroup]:
    """Freeze the model except for the parts of a stage and return their parameters.

    The tower's blocks behind the selected layer never receive a gradient, so they stay frozen always.
    """
    model.requires_grad_(False)
    tower = model.model.vision_tower
    modules = {
        "vision": [tower.embeddings, *tower.encoder.layers[: model.config.num_vision_blocks]],
        "projector": [model.model.mm_projector],
        "language": [model.model.language_model, model.lm_head],
    }
    groups = []
    for part in PARTS:
        if part in stage.lr:
            parameters = list(dict.fromkeys(p for module in modules[part] for p in module.parameters()))
            for parameter in parameters:
                parameter.requires_grad_(True)
            groups.append(ParameterGroup(name=part, parameters=parameters, lr=stage.lr[part]))
    return groups


def _train_stage(
    model: NVILAForConditionalGeneration,
    fed: tuple[list[list[Encoded]], MediaTensors],
    stage: StageConfig,
    config: TrainConfig,
    number: int,
    log: MetricsLog,
    reporter: Reporter,
    observers: Sequence[StageObserver],
) -> None:
    groups, pixels = fed
    stage, config = stage.resolved(len(groups)), config.for_stage(stage)
    model.set_attn_implementation(config.attention)
    parameter_groups = trained_parts(model, stage)
    applied = apply_precision(model.model.language_model, config.precision)
    if config.precision.name == "fp8" and not applied.converted:
        reporter.notice("precision fp8 converted no layer: every layer is below train.fp8.min_features or skipped")
    sampler = GroupSampler(
        groups,
        images_per_step=stage.images_per_step,
        samples_per_image=stage.samples_per_image,
        seed=config.seed * 1000 + number,
        rank=_rank(),
        world=int(os.environ.get("WORLD_SIZE", "1")),
    )
    start = StageStart(
        stage=stage.name,
        steps=stage.steps,
        first_step=0,
        parameters=sum(parameter.numel() for group in parameter_groups for parameter in group.parameters),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    for observer in observers:
        observer.on_stage_start(start)
    engine = build_engine(model, parameter_groups, config)
    try:
        run_stage(
            engine,
            iter(sampler),
            pixels,
            stage,
            config,
            pad_token_id=model.config.text_config.pad_token_id,
            log=log,
            reporter=reporter,
            observers=observers,
        )
    finally:
        engine.close()
    for observer in observers:
        observer.on_stage_end(stage.name)
    model.eval()


def _save(model: NVILAForConditionalGeneration, processor: NVILAProcessor, directory: Path) -> None:
    """Write a stage's model under a temporary name and rename it, so that a folder with the name is complete."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, processor, partial)
    partial.rename(directory)


def _wait_for(directory: Path) -> Path:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return directory


def _drop_lines(path: Path, stage: str) -> None:
    """Remove what an interrupted attempt at this stage had logged."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if f'"stage": "{stage}"' not in line]
        path.write_text("".join(kept), encoding="utf-8")


def _stage_processor(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, stage: StageConfig
) -> NVILAProcessor:
    """Let the model look at videos as a stage says, from there on, and return the processor that belongs to it."""
    if stage.frames is None and stage.pool_sizes is None:
        return processor
    if stage.frames is not None:
        model.config.num_video_frames = stage.frames
    if stage.pool_sizes is not None:
        model.config.video_pool_sizes = [list(size) for size in stage.pool_sizes]
    return build_processor(cast("NVILAConfig", model.config), processor.tokenizer)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
