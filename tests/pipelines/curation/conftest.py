"""Two tiny models and a LLaVA folder, made once; the command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.cli import main

Curate = Callable[..., int]
QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a red circle?")
ANSWERS = ("red", "blue", "circle", "a red circle", "yes", "no", "green")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a small and a large model with random weights."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    root = tmp_path_factory.mktemp("models")
    tokenizer = build_word_tokenizer([*QUESTIONS, *ANSWERS], model_max_length=64)
    for seed, (name, width) in enumerate((("small", 32), ("large", 64))):
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
                "hidden_size": width,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
                "initializer_range": 0.2,
            },
            projector="mlp_downsample_2x2_fix",
            select_layer=-1,
            max_length=64,
        )
        torch.manual_seed(seed)
        model = build_model(config, tokenizer).eval()
        save_model(model, build_processor(model.config, tokenizer), root / name)
    return {name: root / name for name in ("small", "large")}


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write LLaVA folders: three questions to a picture, sources vqa and shapes; `changed` replaces lines."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(5)

    def make(size: int, changed: dict[int, str] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("llava")
        (folder / "images").mkdir()
        lines = []
        for index in range(size):
            name = f"{index // 3}.png"
            if index % 3 == 0:
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name)
            record: dict[str, Any] = {"id": f"q{index}", "source": ("vqa", "shapes")[index % 2]}
            record["image"] = f"images/{name}"
            record["conversations"] = [
                {"from": "human", "value": f"<image>\n{QUESTIONS[index % len(QUESTIONS)]}"},
                {"from": "gpt", "value": ANSWERS[index % len(ANSWERS)]},
            ]
            lines.append((changed or {}).get(index, json.dumps(record)))
        (folder / "llava.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder / "llava.jsonl"

    return make


@pytest.fixture
def curate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Curate:
    """Run the verb in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # Tracking has tests of its own; starting MLflow would take longer than all of this.
    monkeypatch.setattr("nvila_pipelines.curation.finishing.track", lambda *args, **options: None)
    return lambda *words: main(["curate", *map(str, words)])


@pytest.fixture
def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a model is loaded."""
    monkeypatch.setattr("nvila.curation.scorers.load_scorer", lambda *args, **options: pytest.fail("loads"))


@pytest.fixture
def scored(curate: Curate, models: dict[str, Path], llava: Any, tmp_path: Path) -> Path:
    """Give the output of a run over 24 records."""
    assert curate(llava(24), "--small", models["small"], "--large", models["large"], "--out", "out") == 0
    return tmp_path / "out"
