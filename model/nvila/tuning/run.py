"""A tuning run: a base, a method and data become an adapter or a model; interrupted, it goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from nvila.assembly import save_model
from nvila.data.feeding import BatchFeed
from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.packed_attention import joins_rows
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.training.checkpoints import Checkpoints
from nvila.training.interrupts import StopRequest
from nvila.training.loop import StageLoop
from nvila.training.metrics import MetricsLog
from nvila.training.observer import StageObserver
from nvila.training.processes import barrier, rank
from nvila.training.run import CHECKPOINTS_FOLDER, SKIPPED_FILE, recompute_activations, set_attention
from nvila.tuning.adapters import AdapterRecord, is_adapter, merge, prepare, save_adapter
from nvila.tuning.applying import parameter_groups
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData
from nvila.tuning.held_out import EarlyStopping, HeldOutLoss, held_out_loss
from nvila.tuning.measuring import PeakMeter, StepClock
from nvila.tuning.parallel import build_tune_engine
from nvila.tuning.resident import give_back

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
RESULT_FILE = "tuned.json"
# Apart from the result, and hidden: the same run on the same machine takes another time.
TIMING_FILE = ".timing.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a run made.

    Args:
        directory: Folder of the model: an adapter that `load_model` takes, or all weights.
        steps: Steps that were taken.
        losses: Held-out losses; the first is that of the base.
        best: The one whose weights were kept; None without a split.
        peak_bytes: Measured peak memory of a step.
        step_seconds: Median time of a step; None where there were too few to measure, or it is not known any more.
    """

    directory: Path
    steps: int
    losses: tuple[HeldOutLoss, ...]
    best: HeldOutLoss | None
    peak_bytes: int | None
    step_seconds: float | None = None


def tune(
    config: TuneConfig,
    base: Path,
    digest: str,
    data: TuneData,
    out_dir: Path,
    *,
    merged: bool = False,
    device: str = "cpu",
    reporter: Reporter = SILENT,
    observers: Sequence[StageObserver] = (),
    on_loss: Callable[[HeldOutLoss], None] = lambda found: None,
    stop: StopRequest | None = None,
) -> Tuned:
    """Tune a model; the same call after an interruption goes on and ends in the same weights.

    Under torchrun every process calls it with the same arguments; batches are dealt to them, the first one writes.

    Args:
        config: What to do.
        base: Folder of the base, with wide weights.
        digest: Its digest (`nvila.tuning.adapters.base_digest`).
        data: The data.
        out_dir: Where `model/`, `metrics.jsonl` and `held-out.jsonl` go.
        merged: Write all weights even where an adapter would do.
        device: Where to run.
        reporter: Receives progress.
        observers: Follow the steps of the first process.
        on_loss: Told every held-out loss by it.
        stop: Ends the run after the step that it comes in, with a checkpoint.

    Raises:
        CapabilityError: The base is quantized already, or lacks what the method needs.
        InfrastructureError: `stop` came; the same call goes on.
        NvilaError: The loss is not finite.
    """
    target = out_dir / MODEL_FOLDER
    if target.is_dir():
        return finished(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model, processor = load_base(base, config, device)
    first = rank() == 0
    if not first:
        # LoRA's matrices are the same in all processes, what dropout leaves out is not.
        torch.manual_seed(config.seed + 1_000_003 * rank())
        reporter, observers, on_loss = SILENT, (), _ignore
    log = MetricsLog(out_dir / "metrics.jsonl" if first else Path(os.devnull), reporter=reporter)
    feed, held_out = data.feed(config, reporter), data.held_out_feed(config, reporter)
    meter, clock = PeakMeter(model, device), StepClock(device)
    observers = (*observers, clock)
    try:
        steps = _train(model, config, feed, held_out, out_dir, log, meter, observers, on_loss, stop or StopRequest())
    finally:
        feed.close()
        if held_out is not None:
            held_out.close()
    if first:
        # Before the folder of the model, which says that all is done.
        result = {"steps": steps, "peak_bytes": meter.peak_bytes}
        (out_dir / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out_dir / TIMING_FILE).write_text(json.dumps({"step_seconds": clock.seconds}) + "\n", encoding="utf-8")
        record = AdapterRecord(method=config.method, base=str(base.absolute()), base_digest=digest)
        if config.method.is_adapter and not merged:
            save_adapter(model, processor, target, record)
        else:
            save_merged(model, processor, target)
    barrier()
    return finished(out_dir)


def finished(out_dir: Path) -> Tuned:
    """Read what a finished run left."""
    from nvila.tuning.held_out import read_losses

    raw = json.loads((out_dir / RESULT_FILE).read_text(encoding="utf-8"))
    losses = tuple(read_losses(out_dir))
    best = min(losses, key=lambda one: (one.loss, one.step)) if losses else None
    timing = out_dir / TIMING_FILE
    return Tuned(
        directory=out_dir / MODEL_FOLDER,
        steps=raw["steps"],
        losses=losses,
        best=best,
        peak_bytes=raw["peak_bytes"],
        step_seconds=json.loads(timing.read_text(encoding="utf-8"))["step_seconds"] if timing.is_file() else None,
    )


def load_base(
    base: Path, config: TuneConfig, device: str = "cpu"
) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Load a base and prepare it for a method.

    Raises:
        CapabilityError: It is an adapter itself, or quantized.
    """
    from nvila.assembly import load_model

    check_base(base)
    model, processor = load_model(base)
    if config.precision.name == "bf16":
        # What learns is kept in fp32 again, below; its gradients are too small for bf16.
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers types `to` as a function
    model.to(device)  # type: ignore[arg-type]  # as above
    prepare(model, config.method, config.seed)
    if config.method.language == "qlora":
        give_back(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    set_attention(model, config.attention)
    if config.gradient_checkpointing:
        recompute_activations(model)
        # Where only layers behind the embedding learn, the recomputed ones would otherwise see no gradient.
        model.enable_input_require_grads()
    return model, processor


def check_base(base: Path) -> None:
    """Refuse bases that cannot be tuned, before weights are read.

    Raises:
        CapabilityError: It is an adapter itself, or quantized.
    """
    from nvila.quantization.saved import is_quantized

    if is_adapter(base):
        raise CapabilityError(
            f"{base} is an adapter", f"merge it first: nvila adapters merge {base} DIR, then tune DIR"
        )
    if is_quantized(base):
        raise CapabilityError(
            f"{base} is quantized, and no gradient passes its vision tower",
            "tune the model that it was made of; language=qlora keeps that in 4 bits",
        )


def save_merged(model: NVILAForConditionalGeneration, processor: NVILAProcessor, directory: Path) -> None:
    """Write the whole model with what was learned in its weights; the folder appears when it is complete."""
    import shutil

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(merge(model), processor, partial)
    partial.rename(directory)


def _train(
    model: NVILAForConditionalGeneration,
    config: TuneConfig,
    feed: BatchFeed,
    held_out: BatchFeed | None,
    out_dir: Path,
    log: MetricsLog,
    meter: PeakMeter,
    observers: Sequence[StageObserver],
    on_loss: Callable[[HeldOutLoss], None],
    stop: StopRequest,
) -> int:
    """Run the training loop and return its steps; the model has the best weights afterwards."""
    text = cast("NVILAConfig", model.config)
    pad = int(text.text_config.pad_token_id or 0)
    train_config = config.train_config(text, str(feed.directory.name))
    stage = train_config.stages[0]
    stage = stage.of_length(stage.steps or feed.steps_in(stage.epochs or 0))
    train_config = train_config.for_stage(stage)
    if not any(p.requires_grad for p in model.parameters()):
        raise CapabilityError(f"nothing learns under {config.method.name}", "choose another method")
    engine = meter.watched(build_tune_engine(model, parameter_groups(model, config.rates), train_config))

    def notice(line: str) -> None:
        for observer in (log, *observers):
            observer.on_notice(line)

    validator = None
    flat = joins_rows(model.model.language_model)
    if held_out is not None:
        side = held_out
        validator = EarlyStopping(
            model=model,
            loss=lambda: held_out_loss(model, side, pad, config.precision, flat=flat),
            directory=out_dir,
            every=config.eval_every or max(1, math.ceil(stage.steps / 10)),
            patience=config.patience,
            reporter=log.reporter,
            on_loss=on_loss,
        )
    checkpoints = Checkpoints(out_dir / CHECKPOINTS_FOLDER, train_config, stage, notice)
    loop = StageLoop(
        engine=engine,
        batches=feed,
        pixels=feed,
        stage=stage,
        config=train_config,
        pad_token_id=pad,
        log=log,
        observers=observers,
        checkpoints=checkpoints,
        stop=stop,
        skipped_path=out_dir / SKIPPED_FILE,
        validator=validator,
        flat=flat,
    )
    try:
        loop.run()
    finally:
        engine.close()
    steps = stage.steps
    if validator is not None:
        steps = validator.found[-1].step
        validator.restore_best()
    model.eval()
    checkpoints.clear()
    return steps


def _ignore(found: HeldOutLoss) -> None:
    """Other processes than the first tell nobody."""
