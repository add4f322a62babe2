"""The language part as a compressed-tensors checkpoint, which vLLM, SGLang and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerBase

from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import Scheme
from nvila.quantization.language_part import LinearWeight, scheme_of, weights_of

_INT8_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
_FORMATS: dict[Scheme, str] = {
    "w4a16": "pack-quantized",
    "int8": "pack-quantized",
    "w8a8": "int-quantized",
    "fp8": "float-quantized",
}


def export_compressed(model: NVILAForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, directory: Path) -> int:
    """Write the decoder and its head as a causal language model of its own family.

    Values are those of the quantized model, only laid out differently; a decoder that was left wide is written wide.

    Args:
        model: The model.
        tokenizer: Its tokenizer, written beside it.
        directory: The folder.

    Returns:
        Bytes of the weights.

    Raises:
        CapabilityError: The package compressed-tensors is not installed.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weight in weights_of(model):
        if isinstance(weight, LinearWeight):
            base = name.removesuffix(".weight")
            tensors |= {f"{base}.{part}": value for part, value in _parts(weight, model.dtype).items()}
        else:
            tensors[name] = weight
    path = directory / "model.safetensors"
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
    config = model.config.text_config.__class__.from_dict(model.config.text_config.to_dict())
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [family.__name__]
    config.dtype = model.dtype
    config.tie_word_embeddings = bool(model.config.tie_word_embeddings)
    scheme, group_size = scheme_of(model)
    if scheme != "none":
        config.quantization_config = quantization_config(scheme, group_size)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    return path.stat().st_size


def quantization_config(scheme: Scheme, group_size: int) -> dict[str, Any]:
    """Return the `quantization_config` that the format's readers expect."""
    weights: dict[str, Any] = {
        "num_bits": 4 if scheme == "w4a16" else 8,
        "type": "float" if scheme == "fp8" else "int",
        "symmetric": scheme != "w4a16",
        "strategy": "group" if scheme == "w4a16" else "channel",
        "dynamic": False,
    }
    if scheme == "w4a16":
        weights["group_size"] = group_size
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": _INT8_ACTIVATIONS if scheme == "w8a8" else None,
        "output_activations": None,
        "format": _FORMATS[scheme],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[scheme],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _parts(weight: LinearWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that stand for one weight."""
    scale = weight.scale.to(dtype)
    if weight.scheme in ("w8a8", "fp8"):
        return {"weight": weight.whole, "weight_scale": scale}
    bits = 4 if weight.scheme == "w4a16" else 8
    parts = {
        "weight_packed": _packed(weight.whole, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.whole.shape),
    }
    if weight.scheme == "w4a16":
        parts["weight_zero_point"] = _packed(weight.zero_point, bits, 0)
    return parts


def _packed(values: Tensor, bits: int, dim: int) -> Tensor:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as e:
        raise CapabilityError(
            "compressed-tensors is not installed", "pip install 'nvila[quant]', or leave --export out"
        ) from e
    packed: Tensor = pack_to_int32(values.to(torch.int8), bits, packed_dim=dim)
    return packed
