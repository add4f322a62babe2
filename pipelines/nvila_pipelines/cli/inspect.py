"""`nvila inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.inspection import ModelReport, PromptReport
    from nvila.processing import NVILAProcessor

SUMMARY = "show the parts of a model, and where every token of a prompt comes from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="model folder, or a preset such as nvila-lite-8b")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="put an image into the prompt")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="put a video into the prompt")
    parser.add_argument("--text", metavar="TEXT", help="put a text behind them")
    parser.add_argument("--tiling-png", type=Path, metavar="FILE", help="draw how the images are tiled")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.tiling_png and not args.image:
        raise ConfigError("--tiling-png has no image to draw", "name one with --image")
    from nvila.inspection import DEFAULT_TEXT, inspect_model, inspect_prompt, load_processor
    from nvila.presets import PRESETS

    model = inspect_model(args.model)
    prompt = None
    if args.image or args.video or args.text is not None:
        processor = load_processor(args.model)
        text = DEFAULT_TEXT if args.text is None else args.text
        prompt = inspect_prompt(processor, args.image, args.video, text)
        if args.tiling_png:
            _draw(processor, args.image, args.tiling_png)
    if args.json:
        png = str(args.tiling_png) if args.tiling_png else None
        emit_json({"model": model.to_dict(), "prompt": prompt and prompt.to_dict(), "tiling_png": png})
        return 0
    for line in _model_lines(model):
        emit(line)
    if prompt:
        for line in _prompt_lines(prompt):
            emit(line)
        if args.model in PRESETS:
            emit("  (text is counted in bytes: a preset has no vocabulary)")
    if args.tiling_png:
        emit(f"\ntiling drawn to {args.tiling_png}")
    return 0


def _draw(processor: NVILAProcessor, images: list[str], path: Path) -> None:
    from nvila.inspection import prompt_plans
    from nvila.vision.drawing import draw_tilings

    pictures = [processor.image_processor.load(image) for image in images]
    sheet = draw_tilings(pictures, prompt_plans(processor, pictures), processor.image_processor.tiling)
    try:
        sheet.save(path, "PNG")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e}", "name a file in a folder that exists") from e


def _model_lines(model: ModelReport) -> Iterator[str]:
    counts = [f"{part.parameters:,}" for part in model.parts] + [f"{model.parameters:,}"]
    width = max(map(len, counts))
    yield model.source
    for part, count in zip(model.parts, counts, strict=False):
        yield f"  {part.name:<14}  {count:>{width}}  {part.detail}"
    yield f"  {'parameters':<14}  {counts[-1]:>{width}}  {model.parameters * 2 / 1e9:,.2f} GB in bfloat16"
    yield f"  {'images':<14}  {model.images}"
    yield f"  {'videos':<14}  {model.videos}"


def _prompt_lines(prompt: PromptReport) -> Iterator[str]:
    last = prompt.runs[-1].stop - 1
    digits = len(str(last))
    yield f"\nprompt: {last + 1:,} positions, {prompt.visual:,} visual and {prompt.text:,} text"
    for run in prompt.runs:
        count = f"{run.visual} + {run.text}" if run.visual else str(run.text)
        source = run.source if run.visual else repr(run.source)
        yield f"  {run.start:>{digits}}-{run.stop - 1:<{digits}}  {count:>8}  {run.kind:<5}  {source}"
