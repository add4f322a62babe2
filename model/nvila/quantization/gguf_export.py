"""The language part as a GGUF file, which llama.cpp and its kin load.

4-bit groups become Q4_1 blocks and rows of int8 become Q8_0 blocks: both hold the same whole numbers, with scales in
half precision. What is wide is written in half precision, norms and biases in single.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.language_part import LinearWeight, scheme_of, weights_of

BLOCK = 32
# Families by the name of their architecture there; `llama` has rotary pairs beside each other, the others apart.
_ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}


def export_gguf(model: NVILAForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, path: Path) -> int:
    """Write the decoder and its head as one GGUF file.

    A byte-level BPE tokenizer goes into the file; with another one the file says that it has none, and its reader has
    to be given token ids.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        path: The file.

    Returns:
        Its size in bytes.

    Raises:
        CapabilityError: The family or the group size has no counterpart there, or the package gguf is not installed.
    """
    gguf = _gguf()
    config = model.config.text_config
    if config.model_type not in _ARCHITECTURES:
        raise CapabilityError(
            f"decoders of the family '{config.model_type}' cannot be written as GGUF",
            f"known: {', '.join(_ARCHITECTURES)}; use --export compressed-tensors",
        )
    scheme, group = scheme_of(model)
    if scheme == "w4a16" and group % BLOCK:
        raise CapabilityError(
            f"groups of {group} do not fill GGUF's blocks of {BLOCK}", f"quantize with --group-size {BLOCK} or more"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(path), architecture)
    _add_shape(writer, config, gguf, scheme)
    _add_tokenizer(writer, tokenizer, config, gguf)
    kinds = {arch: kind for kind, arch in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, weight in weights_of(model):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CapabilityError(f"GGUF has no name for {name} of '{architecture}'", "use --export compressed-tensors")
        order = _row_order(name, config) if architecture == "llama" else None
        if isinstance(weight, LinearWeight):
            data, kind = _blocks(weight, order, gguf)
            writer.add_tensor(target, data, raw_dtype=kind)
        else:
            rows = weight if order is None else weight[order]
            wide = torch.float16 if rows.dim() == 2 else torch.float32
            writer.add_tensor(target, rows.to("cpu", wide).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


def q4_1_blocks(weight: LinearWeight) -> NDArray[np.uint8]:
    """Lay 4-bit groups out as Q4_1 blocks: scale and minimum in half precision, then 32 values in 16 bytes."""
    rows, columns = weight.whole.shape
    repeat = weight.group_size // BLOCK
    scale = weight.scale.float().cpu()
    least = -scale * (weight.zero_point.float().cpu() + 8)
    heads = torch.stack((scale, least), -1).half().repeat_interleave(repeat, 1).numpy()
    unsigned = (weight.whole.cpu() + 8).to(torch.uint8).view(rows, columns // BLOCK, 2, BLOCK // 2)
    packed = (unsigned[:, :, 0] | (unsigned[:, :, 1] << 4)).numpy()
    return np.concatenate((heads.view(np.uint8), packed), axis=2).reshape(rows, -1)


def q8_0_blocks(weight: LinearWeight) -> NDArray[np.uint8]:
    """Lay rows of int8 out as Q8_0 blocks: the row's scale in half precision, then 32 values."""
    rows, columns = weight.whole.shape
    scale = weight.scale.float().cpu().half().expand(rows, columns // BLOCK).unsqueeze(-1).contiguous().numpy()
    values = weight.whole.cpu().view(rows, columns // BLOCK, BLOCK).contiguous().numpy()
    return np.concatenate((scale.view(np.uint8), values.view(np.uint8)), axis=2).reshape(rows, -1)


def _blocks(weight: LinearWeight, order: Tensor | None, gguf: Any) -> tuple[NDArray[Any], Any]:
    if order is not None:
        weight = LinearWeight(
            name=weight.name,
            scheme=weight.scheme,
            whole=weight.whole[order],
            scale=weight.scale[order],
            zero_point=weight.zero_point[order],
        )
    kinds = gguf.GGMLQuantizationType
    if weight.scheme == "w4a16":
        return q4_1_blocks(weight), kinds.Q4_1
    if weight.scheme in ("int8", "w8a8") and weight.whole.shape[1] % BLOCK == 0:
        return q8_0_blocks(weight), kinds.Q8_0
    wide = (weight.whole.float() * weight.scale.float()).half().cpu()
    return wide.numpy(), kinds.F16


def _row_order(name: str, config: Any) -> Tensor | None:
    """Return the order of rows that brings the halves of each rotary pair together; None for other weights."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
    if heads is None:
        return None
    size = _head_size(config)
    order: Tensor = torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)
    return order


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: Any, config: Any, gguf: Any, scheme: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise CapabilityError(f"rotary embeddings of type '{rope['rope_type']}' cannot be written as GGUF", "")
    writer.add_name("nvila-language")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.LlamaFileType
    mostly = {"w4a16": kinds.MOSTLY_Q4_1, "int8": kinds.MOSTLY_Q8_0, "w8a8": kinds.MOSTLY_Q8_0}
    writer.add_file_type(mostly.get(scheme, kinds.MOSTLY_F16))


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, config: Any, gguf: Any) -> None:
    """Write a byte-level BPE tokenizer whose way of splitting text is known there."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    kind = _splitting(raw.get("pre_tokenizer") or {}, config.model_type)
    if raw.get("model", {}).get("type") != "BPE" or kind is None:
        writer.add_tokenizer_model("none")
        return
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    added = {entry["id"] for entry in raw.get("added_tokens", [])}
    tokens, types = [], []
    for token_id in range(config.vocab_size):
        tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))
        types.append(
            gguf.TokenType.UNUSED
            if token_id not in by_id
            else gguf.TokenType.CONTROL
            if token_id in special
            else gguf.TokenType.USER_DEFINED
            if token_id in added
            else gguf.TokenType.NORMAL
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = raw["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _splitting(pre_tokenizer: dict[str, Any], family: str) -> str | None:
    """Return llama.cpp's name for how text is split before BPE; None if it is none that is known here."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and family.startswith("qwen"):
        return "qwen2"
    return "gpt-2" if kinds == ["ByteLevel"] else None


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise CapabilityError("gguf is not installed", "pip install 'nvila[quant]', or leave --export out") from e
    return gguf
