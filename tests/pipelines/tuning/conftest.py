"""A tiny model on disk and a folder of pictures, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

COLORS = ("red", "blue", "green")
WORDS = "what color is the shape ? red blue green yes no is there a circle rectangle triangle in image black teal"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def base_with_times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("times") / "model", time_tokens=100)


def build_base(folder: Path, time_tokens: int = 0) -> Path:
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    torch.set_num_threads(1)
    torch.manual_seed(1)
    tokenizer = build_word_tokenizer((WORDS,), model_max_length=128)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    language = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    config = ModelConfig(
        vision=vision,
        language=language,
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=128,
        time_tokens=time_tokens,
    )
    model = build_model(config, tokenizer).eval()
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with thirty pictures and a JSONL file about them."""
    from PIL import Image

    folder = tmp_path / "my data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(30):
        Image.new("RGB", (40, 32), COLORS[number % 3]).save(folder / "images" / f"{number}.png")
        line = {"image": f"images/{number}.png", "question": "what color is the shape?", "answer": COLORS[number % 3]}
        lines.append(json.dumps(line))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder
