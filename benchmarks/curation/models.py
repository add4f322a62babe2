"""Untrained models to time scoring with: what they answer does not matter, what they cost does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nvila.assembly import build_model, build_processor, save_model
from nvila.data import easy_vqa
from nvila.data.tokenizers import build_word_tokenizer
from nvila.training.config import ModelConfig

MAX_LENGTH = 512


def save_untrained(folder: Path, *, width: int, layers: int, image_size: int = 64, texts: list[str]) -> Path:
    """Write a model of random weights whose tower and decoder have the same width and depth."""
    torch.manual_seed(0)
    config = ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 32),
            "image_size": image_size,
            "patch_size": 8,
            "vision_use_head": False,
        },
        language={
            "model_type": "qwen2",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 32),
            "num_key_value_heads": max(1, width // 64),
            "tie_word_embeddings": True,
            "max_position_embeddings": MAX_LENGTH,
        },
        projector="mlp_downsample_2x2_fix" if image_size >= 16 else "linear",
        select_layer=-1,
        max_length=MAX_LENGTH,
    )
    tokenizer = build_word_tokenizer(texts, model_max_length=MAX_LENGTH)
    model: Any = build_model(config, tokenizer)
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


def easy_vqa_texts() -> list[str]:
    """Every word that easy-VQA uses."""
    samples = list(easy_vqa.text_only(list(easy_vqa.questions("train"))))
    return [message.text for sample in samples for message in sample.messages]
