"""Quantized models on disk: one safetensors file, 4-bit values packed two to a byte.

torchao's tensors are made of plain ones (values, scales, zero points); those are stored as `<parameter>.<inner name>`
and put back into the same tensor types on load. Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvila.configuration import NVILAConfig
from nvila.errors import CheckpointError
from nvila.finite import check_weights
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import QUANT_METHOD, QuantizationConfig
from nvila.quantization.quantize import INT4, quantize_model

WEIGHTS_FILE = "model.safetensors"
_PACKED = "_packed4"


def is_quantized(directory: Path) -> bool:
    """Whether a model folder was written by `save_quantized`."""
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return bool(raw.get("quantization_config", {}).get("quant_method") == QUANT_METHOD)


def save_quantized(model: NVILAForConditionalGeneration, config: QuantizationConfig, directory: Path) -> int:
    """Write a quantized model and return the size of its weights in bytes."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensors.update(_flatten(name, tensor))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / WEIGHTS_FILE, {"format": "pt"})
    raw = model.config.to_dict() | {"quantization_config": config.to_dict()}
    (directory / "config.json").write_text(json.dumps(raw, indent=2, default=str) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(directory)
    return (directory / WEIGHTS_FILE).stat().st_size


def load_quantized(directory: Path) -> NVILAForConditionalGeneration:
    """Load what `save_quantized` wrote.

    Raises:
        CheckpointError: Tensors are missing, left over, of another shape, or hold NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    scheme = QuantizationConfig.from_dict(raw.pop("quantization_config"))
    raw.pop("model_type", None)
    model = NVILAForConditionalGeneration(NVILAConfig(**raw))
    quantize_model(model, scheme)
    try:
        stored = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {directory / WEIGHTS_FILE}: {e}", "make the artifact again") from e
    check_weights(stored, str(directory / WEIGHTS_FILE))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            for inner, target in _inner_tensors(tensor).items():
                _copy(target, stored, f"{name}{inner}")
    if stored:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} holds unknown tensor {min(stored)}", "wrong config.json?")
    return model


def pack_nibbles(values: Tensor) -> Tensor:
    """Pack signed 4-bit values (..., n), held as int8, into unsigned bytes (..., n/2), low nibble first."""
    unsigned = (values + 8).to(torch.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return pairs.to(torch.int8) - 8


def tensor_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters take on disk, 4-bit values packed."""
    seen: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters():
        seen.update(_flatten(name, tensor.detach()))
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a parameter is made of, by name suffix."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {f".{name}": getattr(tensor, name) for name in names}


def _flatten(name: str, tensor: Tensor) -> dict[str, Tensor]:
    is_int4 = getattr(tensor, "target_dtype", None) == INT4
    flat: dict[str, Tensor] = {}
    for inner, value in _inner_tensors(tensor).items():
        if is_int4 and inner == ".qdata":
            flat[f"{name}{inner}{_PACKED}"] = pack_nibbles(value)
        else:
            flat[f"{name}{inner}"] = value.detach()
    return flat


def _copy(target: Tensor, stored: dict[str, Any], name: str) -> None:
    packed = stored.pop(f"{name}{_PACKED}", None)
    value = unpack_nibbles(packed) if packed is not None else stored.pop(name, None)
    if value is None:
        raise CheckpointError(f"the quantized weights lack {name}", "make the artifact again")
    if value.shape != target.shape or value.dtype != target.dtype:
        raise CheckpointError(
            f"{name} is {tuple(value.shape)} {value.dtype}, expected {tuple(target.shape)} {target.dtype}",
            "config.json and weights belong to different models",
        )
    target.copy_(value)
