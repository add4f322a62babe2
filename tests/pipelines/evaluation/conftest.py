"""A tiny model that answers with words of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

TEXTS = ("what color is the shape? is there a circle? yes no red blue green circle one two three four 1 2 42 A B",)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    tokenizer = build_word_tokenizer(TEXTS, model_max_length=512)
    config = ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        language={
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-1,
        max_length=512,
    )
    torch.manual_seed(3)
    model = build_model(config, tokenizer).eval()
    folder = tmp_path_factory.mktemp("trained") / "tiny" / "model"
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


@pytest.fixture
def short_model_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The same model with room for an image, but not for eight frames."""
    folder = tmp_path / "short"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 48}))
    return folder
