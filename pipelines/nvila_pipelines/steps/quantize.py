"""Quantize a trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from nvila_pipelines.steps.context import StepContext

if TYPE_CHECKING:
    from torch import nn

    from nvila.modeling import NVILAForConditionalGeneration


def run(context: StepContext) -> dict[str, float]:
    """Quantize the towers of the model and measure what each part takes.

    Outputs: `model/`, `sizes.json`.
    """
    from nvila.assembly import load_model
    from nvila.quantization.quantize import quantize_model
    from nvila.quantization.saved import save_quantized, tensor_bytes

    config = context.recipe.quantization_config()
    model, processor = load_model(context.inputs["model"] / "model")
    wide = _sizes(model, tensor_bytes)
    layers = quantize_model(model, config)
    context.reporter.notice(
        f"{len(layers.vision)} vision layers {config.vision}, {len(layers.language)} language layers {config.language}"
    )
    target = context.out_dir / "model"
    shutil.rmtree(target, ignore_errors=True)
    save_quantized(model, config, target)
    processor.save_pretrained(target)
    sizes = {"wide": wide, "quantized": _sizes(model, tensor_bytes)}
    (context.out_dir / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return {
        "wide_bytes": float(wide["total"]),
        "quantized_bytes": float(sizes["quantized"]["total"]),
        "quantized_layers": float(len(layers.vision) + len(layers.language)),
    }


def _sizes(model: NVILAForConditionalGeneration, tensor_bytes: Callable[[nn.Module], int]) -> dict[str, int]:
    parts = {
        "vision": model.model.vision_tower,
        "projector": model.model.mm_projector,
        "language": model.model.language_model,
    }
    sizes = {name: tensor_bytes(part) for name, part in parts.items()}
    return sizes | {"total": tensor_bytes(model)}
