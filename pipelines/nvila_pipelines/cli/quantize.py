"""`nvila quantize`: a model of one's own, or the step of a recipe."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import add_recipe_arguments, prepare_workspace, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.quantization.config import Scheme
    from nvila_pipelines.curation.spec import DataSpec
    from nvila_pipelines.quantization.request import QuantizationRequest
    from nvila_pipelines.verb_run import VerbRun
    from nvila_platform.registry import ModelVersion
    from nvila_platform.store import ArtifactRef

SUMMARY = "make a model smaller and faster: W8A8 vision, 4-bit language, measured part by part"
EPILOG = """\
examples:
  nvila quantize MODEL --data mine.jsonl             SmoothQuant W8A8 tower, AWQ 4-bit language model, on your samples
  nvila quantize models:/nvila-tuned@candidate --data easy-vqa --language int8 --budget 0.5
  nvila quantize MODEL --data DATA --export compressed-tensors --export gguf      the language part for vLLM, llama.cpp
  nvila quantize MODEL --vision none --language fp8  without data: rounded to nearest, nothing measured
  nvila quantize fast seed=1                         the quantization step of a recipe

outputs in WORKSPACE/artifacts/quantize/KEY, and in DIR with --out:
  model/              safetensors with quantization_config; from_pretrained, evaluate and serve load it
  quantization.json   by part: size, accuracy, error of every layer, time to the first token, tokens a second
  exports/            what --export asks for

A part that loses more than the budget is left wide, and named.
"""
SCHEMES = ("w8a8", "w4a16", "int8", "fp8", "none")
EXPORTS = ("compressed-tensors", "gguf")
_OPTIONS = (
    "vision",
    "language",
    "group_size",
    "data",
    "media_dir",
    "mixtures",
    "samples",
    "eval_samples",
    "budget",
    "alpha",
    "export",
    "dtype",
    "device",
    "out",
    "register",
    "no_speed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.usage = (
        "%(prog)s MODEL [--data DATA] [options]\n"
        "       %(prog)s [RECIPE] [KEY=VALUE ...] [options]        the step of a recipe"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    words = next(action for action in parser._actions if action.dest == "words")
    words.metavar, words.help = "MODEL", "model folder or models:/NAME@ALIAS; or a recipe and fields of it to change"
    # No defaults here: what was not given must be told from what was, since each use of the verb has its own options.
    schemes = parser.add_argument_group("schemes")
    schemes.add_argument("--vision", choices=SCHEMES, help="of the vision tower (default: w8a8)")
    schemes.add_argument("--language", choices=SCHEMES, help="of the language model (default: w4a16)")
    schemes.add_argument(
        "--group-size", type=whole_number, metavar="N", help="inputs that share a 4-bit scale (default: 128, or less)"
    )
    add_data_arguments(parser)
    result = parser.add_argument_group("result")
    result.add_argument("--budget", type=_points, metavar="POINTS", help="accuracy that a part may lose (default: 1.0)")
    result.add_argument(
        "--alpha", type=_fraction, metavar="A", help="SmoothQuant: 0 scales nothing, 1 moves most (default: 0.5)"
    )
    result.add_argument(
        "--export", action="append", choices=EXPORTS, help="also write the language part in this form; may be repeated"
    )
    result.add_argument("--out", type=Path, metavar="DIR", help="new folder for a copy of the result")
    result.add_argument("--register", metavar="NAME[@ALIAS]", help="register the result, with its report as tags")
    result.add_argument("--no-speed", action="store_true", default=None, help="do not time requests")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare data to calibrate and measure on, and where to do so."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DATA", help="file, folder, s3:// address or mixture of image-text samples")
    data.add_argument("--media-dir", metavar="DIR", help="folder that the paths of images and videos start from")
    data.add_argument("--mixtures", metavar="FILE", help="YAML file that names data sets; DATA is then names: a + b")
    data.add_argument("--samples", type=whole_number, metavar="N", help="to calibrate on (default: 128)")
    data.add_argument("--eval-samples", type=_count, metavar="N", help="others, to measure on; 0: none (default: 512)")
    data.add_argument("--dtype", choices=("fp32", "bf16"), help="of what stays wide (default: as stored)")
    data.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to work (default: a GPU if any)")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    given = [f"--{name.replace('_', '-')}" for name in _OPTIONS if getattr(args, name) is not None]
    if not given and not is_model(args.words):
        return run_to("quantize", args, settings)
    if args.fast:
        raise ConfigError("--fast is a recipe, but a model is meant", "leave it out")
    if not args.words or "=" in args.words[0]:
        raise ConfigError(f"{given[0]} is about a model, but none is named", "nvila quantize MODEL --data DATA")
    if len(args.words) > 1:
        problem = f"{args.words[1]} follows the model {args.words[0]}"
        raise ConfigError(problem, "only recipes take fields; leave it out")
    if args.out is not None and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} exists", "name a folder that does not")
    name, alias = _registration(args.register)
    prepare_workspace(settings)
    request = make_request(args, settings)
    from nvila_pipelines.quantization.work import quantize_folder, verb_run
    from nvila_platform.store import open_store
    from nvila_platform.telemetry import ProgressView

    with verb_run(request, settings) as tracked:
        with ProgressView(format=settings.log_format) as view:
            reporter = view.reporter("quantize")
            if request.data is None:
                reporter.notice("no --data: weights are rounded to nearest, and nothing is measured")
            ref = quantize_folder(request, settings, reporter, tracked if name is not None else None)
        folder = open_store(settings).fetch(ref)
        if args.out is not None:
            shutil.copytree(folder, args.out, dirs_exist_ok=True)
            folder = args.out.absolute()
        version = register(settings, tracked, name, alias, ref, folder) if name is not None else None
    show(folder, ref, version, alias, as_json=args.json)
    return 0


def is_model(words: list[str]) -> bool:
    """Whether the words name a model rather than a recipe."""
    if len(words) != 1:
        return False
    folders = (Path(words[0]), Path(words[0]) / "model")
    return words[0].startswith("models:/") or any((folder / "config.json").is_file() for folder in folders)


def make_request(args: argparse.Namespace, settings: Settings) -> QuantizationRequest:
    """Return what the arguments ask for.

    Raises:
        ConfigError: There is no such model, or options contradict each other.
    """
    from nvila.quantization.config import QuantizationConfig
    from nvila_pipelines.cli.serve import find_model
    from nvila_pipelines.curation.spec import data_digest
    from nvila_pipelines.evaluation.run import model_digest
    from nvila_pipelines.quantization.request import QuantizationRequest, fitting_group

    about_data = [name for name in ("media_dir", "mixtures", "samples", "eval_samples") if getattr(args, name)]
    if args.data is None and about_data:
        raise ConfigError(f"--{about_data[0].replace('_', '-')} is about data, but none is named", "add --data DATA")
    source = find_model(args.words[0], settings)
    data = data_spec(args) if args.data is not None else None
    vision: Scheme = getattr(args, "vision", None) or "w8a8"
    language: Scheme = getattr(args, "language", None) or "w4a16"
    group = getattr(args, "group_size", None) or fitting_group(source.directory, vision, language)
    named = {"samples": "calibrate", "eval_samples": "measure", "budget": "budget", "alpha": "alpha", "dtype": "dtype"}
    options: dict[str, Any] = {
        field: value for name, field in named.items() if (value := getattr(args, name, None)) is not None
    }
    return QuantizationRequest(
        model=source.directory,
        model_digest=source.digest if re.fullmatch("[0-9a-f]{64}", source.digest) else model_digest(source.directory),
        config=QuantizationConfig(vision=vision, language=language, group_size=group),
        data=data,
        data_digest=data_digest(data) if data is not None else None,
        exports=tuple(dict.fromkeys(getattr(args, "export", None) or ())),
        device=chosen_device(args.device or "auto"),
        speed=not getattr(args, "no_speed", None),
        **options,
    )


def data_spec(args: argparse.Namespace) -> DataSpec:
    """Return the data set that the arguments name; places on this machine are made to last."""
    from nvila_pipelines.curation.spec import DataSpec

    places = {name: _lasting(place) for name in ("media_dir", "mixtures") if (place := getattr(args, name))}
    return DataSpec(data=_lasting(args.data), **places)


def register(
    settings: Settings, tracked: VerbRun, name: str, alias: str | None, ref: ArtifactRef, folder: Path
) -> ModelVersion:
    """Register an artifact with the figures of its report, and set its alias."""
    from nvila.checkpoints.documents import read_origin
    from nvila_pipelines.quantization.work import MODEL_FOLDER, STEP
    from nvila_platform.lineage import trace
    from nvila_platform.model_card import make_card
    from nvila_platform.registry import set_alias
    from nvila_platform.store import open_store

    store = open_store(settings)
    manifest = store.manifest(ref)
    tags = {"nvila.code_version": manifest.code_version, "nvila.step": STEP}
    tags |= {f"nvila.quantization.{key}": f"{value:.6g}" for key, value in manifest.metrics.items()}
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    tags |= {f"nvila.quantization.{part}": report["config"][part] for part in ("vision", "language")}
    tags |= {f"nvila.lineage.{key}": digest for key, digest in manifest.inputs.items()}
    weights = read_origin(folder / MODEL_FOLDER)
    card = make_card(name, trace(store, ref.digest), weights, figures=manifest.metrics)
    version = tracked.register(name, ref, manifest.metrics, tags, card)
    if alias is not None:
        set_alias(settings, name, alias, version.version)
    return version


def show(folder: Path, ref: ArtifactRef, version: ModelVersion | None, alias: str | None, *, as_json: bool) -> None:
    """Print the report."""
    from nvila_pipelines.quantization.table import HEAD, aligned, report_rows

    number = None if version is None else version.model_uri
    address = f"models:/{version.name}@{alias}" if version is not None and alias is not None else number

    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    if as_json:
        said = {"path": str(folder), "key": ref.key, "digest": ref.digest, "model": address, "version": number}
        emit_json(said | {"report": report})
        return
    for line in aligned(HEAD, report_rows(report)):
        emit(line)
    for part in report["left_wide"]:
        emit(f"{part} is left wide: it lost more than the budget of {report['budget']:g} points")
    emit(f"model: {folder / 'model'}")
    exports = folder / "exports"
    for path in sorted(exports.iterdir()) if exports.is_dir() else ():
        emit(f"export: {path}")
    if address is not None:
        emit(f"registered: {address}")


def _registration(text: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    name, separator, alias = text.partition("@")
    if not name or (separator and not alias):
        raise ConfigError(f"--register {text!r} names no model", "write NAME or NAME@ALIAS")
    from nvila_platform.registration import check_name
    from nvila_platform.registry import check_alias

    check_name(name)
    if alias:
        check_alias(alias)
    return name, alias or None


def _lasting(place: str) -> str:
    """Return a local path as one that means the same in another folder; names and addresses stay."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def chosen_device(wanted: str) -> str:
    """Return the device to work on; `auto` is a GPU if there is any."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _points(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of points, write 0.5")
    return value


def _fraction(text: str) -> float:
    value = _points(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else whole_number(text)
