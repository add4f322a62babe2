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
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import GenerationConfig

from nvila.configuration import NVILAConfig
from nvila.errors import CheckpointError
from nvila.finite import check_weights
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import QUANT_METHOD, Part, QuantizationConfig
from nvila.quantization.quantize import quantize_model
from nvila.quantization.schemes import INT4, inner_names, rebuilt

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
    raw = model.config.to_dict() | {"quantization_config": config.to_dict(), "dtype": str(model.dtype).split(".")[-1]}
    (directory / "config.json").write_text(json.dumps(raw, indent=2, default=str) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(directory)
    return (directory / WEIGHTS_FILE).stat().st_size


def load_quantized(directory: Path) -> NVILAForConditionalGeneration:
    """Load what `save_quantized` wrote; nothing wide is made on the way.

    Raises:
        CheckpointError: Tensors are missing, left over, of another shape, or hold NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    scheme = QuantizationConfig.from_dict(raw.pop("quantization_config"))
    raw.pop("model_type", None)
    model = _empty_model(NVILAConfig(**raw), getattr(torch, str(raw.get("dtype") or "float32")))
    quantize_model(model, scheme)
    try:
        stored = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {directory / WEIGHTS_FILE}: {e}", "make the artifact again") from e
    check_weights(stored, str(directory / WEIGHTS_FILE))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        _assign(model, name, _filled(tensor, stored, name))
    if stored:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} holds unknown tensor {min(stored)}", "wrong config.json?")
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config.quantization_config = scheme.to_dict()
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


def flat_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights as plain tensors, 4-bit values packed."""
    flat: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        flat.update(_flatten(name, tensor))
    return flat


def fill_state(module: nn.Module, stored: dict[str, Tensor]) -> None:
    """Put weights of `flat_state` into a module of the same schemes.

    Raises:
        CheckpointError: Some are missing or of another shape.
    """
    for name, tensor in module.state_dict().items():
        _assign(module, name, _filled(tensor, stored, name).to(tensor.device))


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a parameter's values: itself, or those that a quantized one is made of."""
    return list(_inner_tensors(tensor).values())


def _inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a parameter is made of, by name suffix."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    return {f".{name}": getattr(tensor, name) for name in inner_names(tensor)}


def _flatten(name: str, tensor: Tensor) -> dict[str, Tensor]:
    is_int4 = getattr(tensor, "target_dtype", None) == INT4
    flat: dict[str, Tensor] = {}
    for inner, value in _inner_tensors(tensor).items():
        if is_int4 and inner == ".qdata":
            flat[f"{name}{inner}{_PACKED}"] = pack_nibbles(value)
        else:
            flat[f"{name}{inner}"] = value.detach()
    return flat


def _filled(like: Tensor, stored: dict[str, Tensor], name: str) -> Tensor:
    """Take a tensor's parts out of `stored` and make one of the same type of them."""
    inner = {suffix: _taken(part, stored, f"{name}{suffix}") for suffix, part in _inner_tensors(like).items()}
    if "" in inner:
        return inner[""]
    return rebuilt(like, {suffix.removeprefix("."): value for suffix, value in inner.items()})


def _taken(like: Tensor, stored: dict[str, Tensor], name: str) -> Tensor:
    packed = stored.pop(f"{name}{_PACKED}", None)
    value = unpack_nibbles(packed) if packed is not None else stored.pop(name, None)
    if value is None:
        raise CheckpointError(f"the quantized weights lack {name}", "make the artifact again")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise CheckpointError(
            f"{name} is {tuple(value.shape)} {value.dtype}, expected {tuple(like.shape)} {like.dtype}",
            "config.json and weights belong to different models",
        )
    return value


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(
            value, requires_grad=type(value) is Tensor and value.is_floating_point()
        )
    else:
        module._buffers[leaf] = value


def _empty_model(config: NVILAConfig, dtype: torch.dtype) -> NVILAForConditionalGeneration:
    """Build a model whose parameters have shapes but no values; buffers, such as rotary tables, have theirs."""

    # torch's stubs let such a hook return nothing, its documentation a parameter that takes the place of the given one.
    def without_values(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_values)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return NVILAForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
        handle.remove()


def restore_part(model: NVILAForConditionalGeneration, directory: Path, part: Part) -> None:
    """Put the wide weights of a part back, from the folder that the model was loaded from.

    Raises:
        CheckpointError: The folder lacks some of them.
    """
    from safetensors import safe_open

    prefix = "model.language_model." if part == "language" else "model.vision_tower."
    wanted = {name: value.dtype for name, value in model.state_dict().items() if name.startswith(prefix)}
    device = model.device
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in wanted.keys() & weights.keys():
                _assign(model, name, weights.get_tensor(name).to(device, wanted.pop(name)))
    if wanted:
        raise CheckpointError(f"the weights in {directory} lack {min(wanted)}", "make the model artifact again")
    model.tie_weights()
