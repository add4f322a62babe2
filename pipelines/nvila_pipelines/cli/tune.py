"""`nvila tune`: a model on one's own data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import prepare_workspace, share, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.tuning.preparing import Prepared
    from nvila_pipelines.tuning.request import TuneRequest
    from nvila_pipelines.tuning.run import TuneOutcome

SUMMARY = "tune a model on your own data, and register it"
EPILOG = """\
examples:
  nvila tune MODEL my-data/                         a folder of images with a JSONL file; good defaults
  nvila tune MODEL data.jsonl --method ln+qlora     the least memory
  nvila tune MODEL data.jsonl --lr-ratio auto       try learning-rate ratios first, keep the best
  nvila tune MODEL data.jsonl --guard easy_vqa      register only if general answers stay good
  nvila tune MODEL data.jsonl --dry-run             what would learn, part by part

methods, VISION+LANGUAGE or VISION+PROJECTOR+LANGUAGE:
  vision     frozen, ln (layer norms), lora, full
  projector  frozen, full (default)
  language   frozen, lora, qlora (base in 4 bits), dora, full

what is made, in WORKSPACE/artifacts/tune/KEY:
  model/                an adapter beside its base, or all weights with --merge; `nvila serve` and `evaluate` take both
  report.html           scores before and after, held-out loss, answers
  held-out-tuned.jsonl  every held-out sample with its answer
"""
_NAMES = ("lr", "vision_lr", "projector_lr", "max_length", "batch_tokens", "samples_per_image", "epochs", "steps")
_OTHERS = (
    "eval_every", "seed", "scorer", "max_drop", "guard_limit", "max_bad", "precision", "name", "processes",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL DATA [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_model_and_data(parser)
    parser.add_argument(
        "--recipe", metavar="NAME", help="defaults of an application: temporal, navigation, medical, or a YAML file"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would learn by part, and end")
    learning = parser.add_argument_group("learning")
    learning.add_argument("--lr", type=positive, metavar="RATE", help="of the language model (default: by its width)")
    learning.add_argument(
        "--lr-ratio",
        type=ratio,
        metavar="N",
        help="the vision tower learns N times as slowly; auto tries 1, 5, 10 and 50 (default: 10)",
    )
    learning.add_argument("--vision-lr", type=positive, metavar="RATE", help="of the vision tower, instead of a ratio")
    learning.add_argument("--projector-lr", type=positive, metavar="RATE", help="of the projector (default: --lr)")
    learning.add_argument("--epochs", type=positive, metavar="N", help="passes over the data (default: 3)")
    learning.add_argument("--steps", type=whole_number, metavar="N", help="steps instead of epochs")
    learning.add_argument("--seed", type=int, metavar="N", help="of everything that is drawn (default: 0)")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--held-out", metavar="SHARE|DATA", help="share of DATA to measure by, or data of its own (default: 10%%)"
    )
    measuring.add_argument(
        "--eval-every", type=whole_number, metavar="N", help="steps between looks at it (default: a tenth of the run)"
    )
    measuring.add_argument(
        "--patience", type=int, metavar="N", help="looks without gain that end tuning; 0 never does (default: 3)"
    )
    measuring.add_argument("--scorer", metavar="NAME", help="of held-out answers (default: exact_match)")
    measuring.add_argument("--tasks", metavar="NAMES", help="evaluation tasks to ask before and after, with commas")
    measuring.add_argument("--task-data", action="append", metavar="TASK=PLACE", help="where a task's data is")
    measuring.add_argument("--guard", metavar="NAMES", help="general tasks whose score must not fall")
    measuring.add_argument("--guard-limit", type=whole_number, metavar="N", help="samples of each (default: 200)")
    measuring.add_argument("--max-drop", type=share, metavar="SHARE", help="how much they may fall (default: 5%%)")
    result = parser.add_argument_group("result")
    result.add_argument("--name", help="name in the registry (default: nvila-tuned)")
    result.add_argument("--no-register", action="store_true", help="register nothing")
    result.add_argument("--merge", action="store_true", help="write all weights, not only an adapter")


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Declare what a plan needs, too: model, data, method and batches."""
    parser.add_argument("model", metavar="MODEL", help="folder, models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("data", metavar="DATA", help="folder, file, address, built-in name or mixture")
    parser.add_argument("--mixtures", metavar="FILE", help="YAML file that defines names in DATA")
    parser.add_argument("--media-dir", metavar="DIR", help="folder that paths of images and videos start from")
    parser.add_argument(
        "--max-bad", type=share, metavar="SHARE", help="most samples that may be unusable (default: 1%%)"
    )
    parser.add_argument("--max-length", type=whole_number, metavar="N", help="longest sample in positions")
    how = parser.add_argument_group("method")
    how.add_argument("--method", metavar="A+B", help="VISION+LANGUAGE, such as ln+qlora (default: ln+lora)")
    how.add_argument("--vision", metavar="HOW", help="frozen, ln, lora or full")
    how.add_argument("--projector", metavar="HOW", help="frozen or full")
    how.add_argument("--language", metavar="HOW", help="frozen, lora, qlora, dora or full")
    how.add_argument("--rank", type=whole_number, metavar="N", help="of LoRA (default: 64)")
    how.add_argument("--alpha", type=positive, metavar="X", help="scale of LoRA times its rank (default: 16)")
    how.add_argument("--dropout", type=share, metavar="SHARE", help="of LoRA's inputs (default: 5%%)")
    how.add_argument("--only", action="append", metavar="PATTERN", help="tune only what matches, '*.layers.[0-3].*'")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--memory", metavar="AMOUNT", help="what a step of a process may take, 24GiB (default: what is there)"
    )
    running.add_argument(
        "--batch-tokens", type=whole_number, metavar="N", help="positions of a step (default: ~16 samples)"
    )
    running.add_argument("--samples-per-image", type=whole_number, metavar="N", help="that share a row (default: 1)")
    running.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    running.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    running.add_argument(
        "--processes", type=whole_number, metavar="N", help="local processes that share the batches (default: 1)"
    )
    running.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.recipe is not None:
        from nvila_pipelines.tuning.recipes import apply_recipe

        apply_recipe(args, args.recipe)
    method_of(args)  # says what is wrong before torch is imported
    prepare_workspace(settings)
    request = request_of(args, settings)
    from nvila_platform.telemetry import ProgressView

    quiet_libraries()
    with ProgressView(format=settings.log_format) as view:
        if args.dry_run:
            from nvila_pipelines.tuning.preparing import prepare

            prepared = prepare(request, settings, view.reporter("tune"))
        else:
            from nvila_pipelines.tuning.run import tune_model

            outcome = tune_model(request, settings, view)
    if args.dry_run:
        _show_dry_run(prepared, as_json=args.json)
    elif args.json:
        emit_json(outcome.to_dict())
    else:
        _show(outcome)
    return 0


def request_of(args: argparse.Namespace, settings: Settings) -> TuneRequest:
    """Return what the arguments ask for.

    Raises:
        ConfigError: The model does not exist, or arguments contradict each other.
    """
    from nvila.training.planning.devices import parse_memory
    from nvila_pipelines.cli.serve import find_model
    from nvila_pipelines.curation.spec import DataSpec
    from nvila_pipelines.tuning.request import TuneRequest
    from nvila_pipelines.tuning.wide import wide_of

    device = _device(args.device)
    options: dict[str, Any] = {
        name: value for name in (*_NAMES, *_OTHERS) if (value := getattr(args, name, None)) is not None
    }
    options.setdefault("precision", "bf16" if device == "cuda" else "fp32")
    if getattr(args, "no_register", False):
        options["name"] = None
    if getattr(args, "lr_ratio", None) is not None:
        options["ratio"] = args.lr_ratio
    if getattr(args, "patience", None) is not None:
        options["patience"] = args.patience or None
    if getattr(args, "held_out", None) is not None:
        options["held_out"] = held_out(args.held_out)
    for name in ("tasks", "guard"):
        if getattr(args, name, None):
            options[name] = tuple(word.strip() for word in getattr(args, name).split(","))
    source = find_model(args.model, settings)
    return TuneRequest(
        model=wide_of(source.directory, source.digest, settings),
        data=DataSpec(data=args.data, mixtures=args.mixtures, media_dir=args.media_dir),
        method=method_of(args),
        task_data=_places(getattr(args, "task_data", None) or []),
        merge=getattr(args, "merge", False),
        memory=None if args.memory is None else parse_memory(args.memory),
        device=device,
        gradient_checkpointing=args.gradient_checkpointing or None,
        **options,
    )


def method_of(args: argparse.Namespace) -> Any:
    """Return the method that the arguments name.

    Raises:
        ConfigError: Names are unknown, or a part is named twice.
    """
    from nvila.tuning.methods import TuneMethod, parse_method

    own = {name: value for name in ("vision", "projector", "language") if (value := getattr(args, name)) is not None}
    options = {name: value for name in ("rank", "alpha", "dropout") if (value := getattr(args, name)) is not None}
    if args.only:
        options["only"] = tuple(args.only)
    if args.method is None:
        return TuneMethod(**own, **options)
    if own:
        name = next(iter(own))
        raise ConfigError(f"--method and --{name} both say how {name} is tuned", "leave one of them out")
    return parse_method(args.method, **options)


def held_out(text: str) -> float | str:
    """Return a share, or the text of a place."""
    try:
        return share(text)
    except argparse.ArgumentTypeError:
        if text.replace(".", "").replace("%", "").isdigit():
            raise ConfigError(f"--held-out {text} is no share", "write 0.1 or 10%, or a path") from None
        return str(Path(text).absolute()) if Path(text).exists() else text


def positive(text: str) -> float:
    """Return a number above 0; for `type=` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def ratio(text: str) -> float | str:
    """Return a ratio, or `auto`; for `type=` of an argument."""
    return text if text == "auto" else positive(text)


def quiet_libraries() -> None:
    """Silence progress bars and notes of libraries, which would break ours."""
    import logging
    import warnings

    from transformers.utils.logging import disable_progress_bar

    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="peft")
    disable_progress_bar()


def _places(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, separator, place = word.partition("=")
        if not separator or not place:
            raise ConfigError(f"--task-data {word!r} names no place", "write TASK=FOLDER")
        found[name] = str(Path(place).absolute()) if Path(place).exists() else place
    return found


def _device(word: str) -> str:
    import torch

    if word == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but there is no GPU here", "leave it out, or use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if word == "auto" else word


def _show_dry_run(prepared: Prepared, *, as_json: bool) -> None:
    parts, rates = prepared.parts, prepared.tune.rates
    if as_json:
        emit_json(
            {
                "method": prepared.tune.method.to_dict(),
                "rates": dict(rates),
                "parts": {
                    part: {"total": one.total, "trained": one.num_trained, "names": list(one.trained)}
                    for part, one in parts.items()
                },
                "samples": {"train": len(prepared.data.store), "held_out": _num_held_out(prepared)},
            }
        )
        return
    for part, one in parts.items():
        rate = f"learning rate {rates[part]:.3g}" if part in rates else "frozen"
        emit(f"{part}: {one.num_trained:,} of {one.total:,} parameters learn, {rate}")
        for name, size in one.trained.items():
            emit(f"  {size:>12,}  {name}")
    total, learns = sum(p.total for p in parts.values()), sum(p.num_trained for p in parts.values())
    emit(f"in all: {learns:,} ({learns / total:.2%} of {total:,})")
    emit(f"samples: {len(prepared.data.store):,} to learn from, {_num_held_out(prepared):,} held out")


def _num_held_out(prepared: Prepared) -> int:
    return 0 if prepared.data.held_out is None else prepared.data.held_out.count()


def _show(outcome: TuneOutcome) -> None:
    summary = outcome.summary
    scores = summary["scores"]
    width = max((len(name) for name in scores["after"]), default=0)
    for name, after in scores["after"].items():
        before = scores["before"].get(name)
        emit(f"{name:<{width}}  {'' if before is None else f'{before:.3f} -> '}{after:.3f}")
    if summary["losses"]:
        best = next(one["loss"] for one in summary["losses"] if one["step"] == summary["best_step"])
        first = summary["losses"][0]["loss"]
        emit(f"held-out loss  {first:.4f} -> {best:.4f} (step {summary['best_step']})")
    for one in summary["ratios"]:
        emit(f"ratio {one['ratio']:>3g}  held-out loss {one['loss']:.4f}")
    emit(f"model: {outcome.directory / 'model'}")
    emit(f"report: {outcome.directory / 'report.html'}")
    if outcome.registered is not None:
        emit(f"registered: {outcome.registered}; try it: nvila serve {outcome.registered}")
