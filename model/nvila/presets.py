"""The published variants as configurations, and tiny twins of them; nothing is downloaded.

A preset gives the arguments of `NVILAConfig`: the parts in their real sizes, how images and videos are looked at, and
the token ids that the released tokenizers lead to. `nvila-8b-video` follows the published training script, which feeds
the projector one scale. A tiny twin has every mechanism of its original at widths that run on a CPU in milliseconds;
its ids are those of a tokenizer of bytes.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nvila.errors import ConfigError, nearest

_Config = dict[str, Any]

# The first ids of Qwen's vocabulary are the 256 bytes, the line feed among them; a byte tokenizer has nothing else.
_LINE_FEED = 198
_NUM_BYTES = 256
# Of the 1/100 of a video that a time token stands for.
_NUM_TIME_TOKENS = 100


def preset(name: str) -> dict[str, Any]:
    """Return the arguments of `NVILAConfig` for a preset; the caller may change them.

    Raises:
        ConfigError: There is no such preset.

    Example:
        >>> preset("nvila-lite-8b")["mm_projector_type"]
        'mlp_downsample_3x3_fix'
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'", nearest(name, PRESETS))
    return deepcopy(PRESETS[name])


def _tower() -> _Config:
    """SigLIP-SO400M of 448 pixels, without its pooling head."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def _tiny_tower() -> _Config:
    return _tower() | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    }


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> _Config:
    """A Qwen2 or Qwen2.5 decoder; the two differ in their vocabulary only."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
    }


_QWEN_2B = _qwen(1536, 8960, 28, 12, 2, tied=True)
_QWEN_7B = _qwen(3584, 18944, 28, 28, 4, tied=False)
_QWEN_14B = _qwen(5120, 13824, 48, 40, 8, tied=False)
_QWEN_TINY = _qwen(64, 128, 2, 4, 2, tied=True)


def _variant(
    tower: _Config, decoder: _Config, *, turn_end: int, added: int, max_length: int, num_time_tokens: int = 0
) -> _Config:
    """Join the parts and number the tokens that NVILA adds to a tokenizer.

    Args:
        tower: Configuration of the vision tower.
        decoder: Configuration of the language model.
        turn_end: Id of `<|im_end|>`.
        added: First added id: `[BOS]`, `[PAD]`, the sentinel, `<image>`, `<vila/video>`, and then the time tokens.
        max_length: Longest training sequence.
        num_time_tokens: How many time tokens follow.
    """
    first_time = added + 5
    return {
        "vision_config": tower,
        "text_config": decoder
        | {
            # The released embeddings have a row for every token and no spare ones.
            "vocab_size": first_time + num_time_tokens,
            "eos_token_id": turn_end,
            "pad_token_id": added + 1,
        },
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "image_token_id": added + 3,
        "video_token_id": added + 4,
        "image_end_token_id": _LINE_FEED,
        "num_time_tokens": num_time_tokens,
        "time_token_ids": list(range(first_time, first_time + num_time_tokens)),
        "model_max_length": max_length,
    }


def _qwen2(tower: _Config, decoder: _Config, max_length: int) -> _Config:
    return _variant(tower, decoder, turn_end=151645, added=151646, max_length=max_length)


def _qwen25(tower: _Config, decoder: _Config, max_length: int, num_time_tokens: int = 0) -> _Config:
    # Qwen2.5 has twenty more special tokens of its own.
    return _variant(
        tower, decoder, turn_end=151645, added=151665, max_length=max_length, num_time_tokens=num_time_tokens
    )


def _tiny(num_time_tokens: int = 0) -> _Config:
    # Behind the bytes come <|endoftext|>, <|im_start|> and <|im_end|>, in Qwen's order.
    return _variant(
        _tiny_tower(),
        _QWEN_TINY,
        turn_end=_NUM_BYTES + 2,
        added=_NUM_BYTES + 3,
        max_length=2048,
        num_time_tokens=num_time_tokens,
    )


_LITE: _Config = {"image_aspect_ratio": "dynamic", "mm_projector_type": "mlp_downsample_3x3_fix"}
_FULL: _Config = {
    "image_aspect_ratio": "dynamic_s2",
    "mm_projector_type": "mlp_downsample",
    "s2_resize_output_to_scale_idx": -1,
}
_VIDEO: _Config = {
    "image_aspect_ratio": "resize",
    "mm_projector_type": "mlp_downsample_2x2_fix",
    "video_pool_sizes": [[8, 1, 1]],
}

PRESETS: dict[str, dict[str, Any]] = {
    "nvila-lite-2b": _qwen25(_tower(), _QWEN_2B, 4096) | _LITE,
    "nvila-lite-8b": _qwen2(_tower(), _QWEN_7B, 4096) | _LITE,
    "nvila-8b": _qwen25(_tower(), _QWEN_7B, 8192) | _FULL | {"s2_scales": [448, 896, 1344]},
    "nvila-15b": _qwen25(_tower(), _QWEN_14B, 8192) | _FULL | {"s2_scales": [448, 896, 1344]},
    "nvila-8b-video": _qwen25(_tower(), _QWEN_7B, 16384, _NUM_TIME_TOKENS) | _VIDEO | {"num_video_frames": 256},
    "tiny-nvila-lite": _tiny() | _LITE,
    "tiny-nvila": _tiny() | _FULL | {"s2_scales": [64, 128, 192]},
    "tiny-nvila-video": _tiny(_NUM_TIME_TOKENS) | _VIDEO | {"num_video_frames": 16},
}
