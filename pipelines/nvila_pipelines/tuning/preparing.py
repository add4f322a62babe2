"""What is known before any weights are read: the data, the plan, and what would learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from nvila.errors import ConfigError, DataError
from nvila.training.config import PrecisionConfig
from nvila.tuning.methods import DEFAULT_RATIO, default_rate, learning_rates
from nvila_pipelines.tuning.request import AUTO, TuneRequest
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig
    from nvila.data.readers.record import CountedStream
    from nvila.progress import Reporter
    from nvila.training.config import PartName
    from nvila.tuning.applying import PartCount
    from nvila.tuning.config import TuneConfig
    from nvila.tuning.data import TuneData
    from nvila.tuning.planner import Option, Planner

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Data and settings of a tuning.

    Args:
        config: The base's configuration.
        data: The data, split and indexed.
        tune: What to do.
        parts: What would learn, by part.
        plan: Its memory and time.
    """

    config: NVILAConfig
    data: TuneData
    tune: TuneConfig
    parts: dict[PartName, PartCount]
    plan: Option | None = None


def prepare(request: TuneRequest, settings: Settings, reporter: Reporter) -> Prepared:
    """Check a request, read its data and plan its memory; weights are not touched.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The data cannot be used.
        CapabilityError: The base cannot be tuned in this way here.
        ResourceError: The memory is too small.
    """
    from nvila.tuning.planner import check_fits

    found = read(request, settings, reporter)
    reporter.progress("plan", 0, 1)
    planner = open_planner(request, found)
    if request.micro_batch_tokens is None:
        option = planner.best(request.method, request.gradient_checkpointing)
    else:
        option = planner.option(
            request.method, request.micro_batch_tokens, checkpointing=bool(request.gradient_checkpointing)
        )
    check_fits(option)
    reporter.progress("plan", 1, 1)
    tune = replace(
        found.tune, micro_batch_tokens=option.micro_batch_tokens, gradient_checkpointing=option.checkpointing
    )
    return replace(found, tune=tune, plan=option)


def open_planner(request: TuneRequest, found: Prepared) -> Planner:
    """Return the planner of a request."""
    from nvila.tuning.planner import Planner, available_memory, device_speed

    # Processes on a CPU share its memory and its cores; on GPUs each has its own.
    sharing = request.processes if request.device == "cpu" else 1
    return Planner(
        config=found.config,
        data=found.data,
        tune=found.tune,
        available=request.memory or available_memory(request.device) // sharing,
        operations_per_second=device_speed(request.device, request.precision) / sharing,
        device=request.device,
        processes=request.processes,
    )


def read(request: TuneRequest, settings: Settings, reporter: Reporter) -> Prepared:
    """Check a request and read its data.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The data cannot be used.
        CapabilityError: The base cannot be tuned in this way here.
    """
    from nvila.configuration import NVILAConfig
    from nvila.evaluation.scorers.table import find_scorer
    from nvila.processing import NVILAProcessor
    from nvila.tuning.data import open_tune_data
    from nvila.tuning.four_bit import check_four_bit
    from nvila.tuning.run import check_base

    check_base(request.model)
    find_scorer(request.scorer, "--scorer")
    config = NVILAConfig.from_pretrained(request.model)
    if request.method.language == "qlora":
        check_four_bit(config.text_config)
    parts = dry_parts(config, request)
    stream = open_data(request)
    held_out: float | CountedStream = (
        request.held_out if isinstance(request.held_out, float) else open_path(request.held_out)
    )
    data = open_tune_data(
        stream,
        NVILAProcessor.from_pretrained(request.model),
        config,
        settings.workspace / "cache" / "tuning",
        held_out=held_out,
        max_length=request.max_length,
        max_bad=request.max_bad,
        seed=request.seed,
        reporter=reporter,
    )
    ratio = DEFAULT_RATIO if request.ratio == AUTO else request.ratio
    return Prepared(config=config, data=data, tune=tune_config(request, config, data, ratio), parts=parts)


def tune_config(request: TuneRequest, config: NVILAConfig, data: TuneData, ratio: float) -> TuneConfig:
    """Return the settings of a run with one ratio of learning rates."""
    from nvila.tuning.config import TuneConfig

    lr = request.lr or default_rate(request.method, int(config.text_config.hidden_size))
    batch = request.batch_tokens or data.batch_tokens()
    return TuneConfig(
        method=request.method,
        rates=learning_rates(request.method, lr, ratio=ratio, vision=request.vision_lr, projector=request.projector_lr),
        batch_tokens=batch,
        micro_batch_tokens=min(batch, request.micro_batch_tokens or batch),
        max_length=data.max_length,
        epochs=request.epochs,
        steps=request.steps,
        samples_per_image=request.samples_per_image,
        max_bad=request.max_bad,
        eval_every=request.eval_every,
        patience=request.patience,
        precision=PrecisionConfig(name=cast("Literal['fp32', 'bf16']", request.precision)),
        attention=request.attention,
        gradient_checkpointing=bool(request.gradient_checkpointing),
        seed=request.seed,
    )


def dry_parts(config: NVILAConfig, request: TuneRequest) -> dict[PartName, PartCount]:
    """Count what would learn, on a model without memory for its weights.

    Raises:
        ConfigError: Nothing would.
    """
    from nvila.training.planning.sizes import meta_model
    from nvila.tuning.applying import apply_method, count_parts

    model = meta_model(config)
    apply_method(model, request.method)
    parts = count_parts(model)
    if not sum(part.num_trained for part in parts.values()):
        only = ",".join(request.method.only)
        raise ConfigError(
            f"--only {only} matches nothing that {request.method.name} tunes",
            "patterns are those of a shell, such as '*.layers.0.*'; see the names with --dry-run and without --only",
        )
    return parts


def open_data(request: TuneRequest) -> CountedStream:
    """Open the data of a request.

    Raises:
        ConfigError: A name is unknown, or the folder holds no records.
        DataError: There is no data.
    """
    from nvila_pipelines.curation.spec import open_stream

    path = Path(request.data.data)
    if request.data.mixtures is None and path.is_dir():
        check_folder(path)
    return open_stream(request.data)


def open_path(place: str) -> CountedStream:
    """Open other data by its path or name."""
    from nvila.data.mixtures import Registry

    return Registry().open(place)


def check_folder(path: Path) -> None:
    """Refuse a folder that has images and nothing that says what they mean.

    Raises:
        DataError: With an example of what is missing.
    """
    names = [one.name for one in path.rglob("*") if one.is_file()]
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if images and len(images) == len(names):
        raise DataError(
            f"{path} holds {len(images):,} images and no texts",
            f"add {path}/data.jsonl with a line for each question: "
            f'{{"image": "{images[0]}", "question": "...", "answer": "..."}}',
        )
