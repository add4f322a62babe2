"""A training run: stages one after the other, each starting from the model that the one before saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nvila.assembly import build_model, build_processor, load_model, save_model
from nvila.configuration import NVILAConfig
from nvila.data.mixtures import Registry
from nvila.data.readers.locations import FileSystems
from nvila.data.records import Sample
from nvila.data.sampling import GroupSampler
from nvila.data.tensors import PixelCache
from nvila.errors import ResourceError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.packed_attention import joins_rows, use_packed_attention
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.training.batches import BatchSource, GroupBatches
from nvila.training.checkpoints import Checkpoints
from nvila.training.config import PARTS, Attention, StageConfig, TrainConfig
from nvila.training.engine import ParameterGroup, build_engine
from nvila.training.interrupts import StopRequest
from nvila.training.loop import StageLoop
from nvila.training.media import Feed, MediaTable, MediaTensors
from nvila.training.metrics import MetricsLog
from nvila.training.observer import StageObserver
from nvila.training.precision import apply_precision
from nvila.training.processes import barrier, from_first, rank, world_size
from nvila.training.stage_feed import DataSources, check_data, token_feed

CHECKPOINTS_FOLDER = ".checkpoints"
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all stages share."""

    config: TrainConfig
    out_dir: Path
    log: MetricsLog
    observers: Sequence[StageObserver] = ()
    stop: StopRequest = field(default_factory=StopRequest)

    def notice(self, text: str) -> None:
        for observer in (self.log, *self.observers):
            observer.on_notice(text)

    def checkpoints(self, number: int, stage: StageConfig) -> Checkpoints:
        directory = self.out_dir / CHECKPOINTS_FOLDER / f"{number}-{stage.name}"
        return Checkpoints(directory, self.config, stage, self.notice)


class _Feeds:
    """Opens the data of stages: image groups in memory, or batches by a token budget from data of any size."""

    def __init__(self, sources: DataSources, pixels: PixelCache | None) -> None:
        self._sources = sources
        self._in_memory = Feed(sources.datasets, sources.images, sources.videos, pixels)

    @contextmanager
    def open(
        self,
        stage: StageConfig,
        number: int,
        model: NVILAForConditionalGeneration,
        processor: NVILAProcessor,
        run: _Run,
    ) -> Iterator[tuple[StageConfig, BatchSource, MediaTensors]]:
        """Give a stage with its length, its batches, and the pixels of their media."""
        config = run.config
        if stage.batch_tokens is not None:
            opened = token_feed(stage, config, number, model, processor, self._sources, run.out_dir, run.log.reporter)
            with opened as feed:
                yield stage.of_length(stage.steps or feed.steps_in(stage.epochs or 0)), feed, feed
            return
        groups, pixels = self._in_memory.stage(stage, config.model, processor)
        sampler = GroupSampler(
            groups,
            images_per_step=stage.images_per_step,
            samples_per_image=stage.samples_per_image,
            seed=config.seed * 1000 + number,
            rank=rank(),
            world=world_size(),
        )
        yield stage.resolved(len(groups)), GroupBatches(sampler), pixels


def train(
    config: TrainConfig,
    datasets: Mapping[str, Sequence[Sample]],
    images: MediaTable,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    reporter: Reporter = SILENT,
    *,
    pixels: PixelCache | None = None,
    videos: MediaTable | None = None,
    observers: Sequence[StageObserver] = (),
    stop: StopRequest | None = None,
    registry: Registry | None = None,
    filesystems: FileSystems | None = None,
) -> Path:
    """Run all stages and return the folder of the final model.

    Every stage leaves a complete model in `out_dir/<number>-<name>`. A stage whose folder exists is finished: an
    interrupted run, started again, goes on with the first unfinished stage, from its newest checkpoint if it has one,
    and ends in the same weights.

    Args:
        config: What to train.
        datasets: Samples by the name that stages use in `data`.
        images: Images of all samples.
        tokenizer: Tokenizer of the language model.
        out_dir: Where stages, `metrics.jsonl` and the samples of skipped steps (`skipped.jsonl`) go.
        reporter: Receives progress.
        pixels: Tiles of all images, for a caller that has decoded them already.
        videos: Videos of all samples, by their keys.
        observers: Follow the stages that train; those of the first process only.
        stop: Ends the run after the step that it comes in, with a checkpoint.
        registry: Names of data sets for stages with a token budget; None knows the built-in ones and paths.
        filesystems: File systems of such data besides local files.

    Raises:
        ConfigError: A stage names data that does not exist, the data is empty, or a checkpoint to go on from was
            written with other settings.
        InfrastructureError: `stop` came; the same call goes on.
        ResourceError: The disk is too full for the model of a stage.
        NvilaError: More steps had no finite loss and gradient than `config.health` bears.
    """
    sources = DataSources(datasets=datasets, images=images, videos=videos, registry=registry, filesystems=filesystems)
    check_data(config, sources)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer)
    processor = build_processor(cast("NVILAConfig", model.config), tokenizer)
    feeds = _Feeds(sources, pixels)
    # One process speaks for all; they run in step and would only repeat it.
    first = rank() == 0
    log = MetricsLog(out_dir / "metrics.jsonl" if first else Path(os.devnull), reporter=reporter if first else SILENT)
    run = _Run(
        config=config,
        out_dir=out_dir,
        log=log,
        observers=observers if first else (),
        stop=StopRequest() if stop is None else stop,
    )
    for number, stage in enumerate(config.stages, start=1):
        directory = out_dir / f"{number}-{stage.name}"
        stopping = False
        if directory.is_dir():
            log.reporter.notice(f"stage {stage.name} is already trained; going on from it")
        else:
            processor = _stage_processor(model, processor, stage)
            set_attention(model, config.for_stage(stage).attention)
            with feeds.open(stage, number, model, processor, run) as (sized, batches, tensors):
                weights, stopping = _train_stage(model, batches, tensors, sized, number, run)
            _save(model, processor, directory, weights)
            run.checkpoints(number, stage).clear()
        if stopping and number < len(config.stages):
            run.stop.end(f"after stage {stage.name}")
        # Also after a stage that just ran: the next one then starts from what was saved, as it would after a restart.
        model, processor = load_model(directory)
    return directory


def set_attention(model: NVILAForConditionalGeneration, attention: Attention) -> None:
    """Set the attention of both towers; with `sdpa`, the decoder takes rows that are joined without padding."""
    model.set_attn_implementation(attention)
    if attention == "sdpa":
        use_packed_attention(model.model.language_model)


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


def recompute_activations(model: PreTrainedModel) -> None:
    """Have tower and decoder keep the inputs of their layers only, and compute the rest again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _train_stage(
    model: NVILAForConditionalGeneration,
    batches: BatchSource,
    pixels: MediaTensors,
    stage: StageConfig,
    number: int,
    run: _Run,
) -> tuple[dict[str, Tensor] | None, bool]:
    """Train one stage; returns its weights where the model does not hold them, and whether to stop behind it."""
    config = run.config.for_stage(stage)
    parameter_groups = trained_parts(model, stage)
    applied = apply_precision(model.model.language_model, config.precision)
    if config.precision.name == "fp8" and not applied.converted:
        run.notice("precision fp8 converted no layer: every layer is below train.fp8.min_features or skipped")
    if config.gradient_checkpointing:
        recompute_activations(model)
    if config.backend == "torch" and torch.cuda.is_available():
        # DeepSpeed does so itself, every process with a device of its own.
        nn.Module.to(model, "cuda")
    engine = build_engine(model, parameter_groups, config)
    loop = StageLoop(
        engine=engine,
        batches=batches,
        pixels=pixels,
        stage=stage,
        config=config,
        pad_token_id=model.config.text_config.pad_token_id,
        log=run.log,
        observers=run.observers,
        checkpoints=run.checkpoints(number, stage),
        stop=run.stop,
        skipped_path=run.out_dir / SKIPPED_FILE,
        flat=joins_rows(model.model.language_model),
    )
    try:
        stopping = loop.run()
        weights = engine.whole_weights()
    finally:
        engine.close()
    model.eval()
    return weights, stopping


def _save(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    directory: Path,
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Write a stage's model under a temporary name and rename it, so that a folder with the name is complete.

    Raises:
        ResourceError: It cannot be written.
    """
    problem: str | None = None
    if rank() == 0:
        partial = directory.with_name(f".{directory.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_model(model, processor, partial, weights)
            partial.rename(directory)
        except (OSError, SafetensorError) as e:
            problem = str(e)
            shutil.rmtree(partial, ignore_errors=True)
    barrier()
    if problem := from_first(problem):
        raise ResourceError(
            f"the model of a finished stage cannot be written to {directory}: {problem}",
            "make room or check permissions, then run the same command again",
        )


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
