"""A model to quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose tokenizer knows the words of easy-VQA."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.builtin import open_builtin
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    records = open_builtin("easy-vqa").records(0, 400)
    texts = [
        part.value
        for record in records
        if record.sample is not None
        for message in record.sample.messages
        for part in message.content
        if part.type == "text"
    ]
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ModelConfig(
        vision={"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16, "vision_use_head": False}
        | vision,
        language={"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True} | language,
        projector="mlp_downsample_2x2_fix",
        select_layer=-1,
        max_length=128,
    )
    tokenizer = build_word_tokenizer(texts, model_max_length=128)
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    folder = tmp_path_factory.mktemp("wide") / "model"
    save_model(model, build_processor(cast("NVILAConfig", model.config), tokenizer), folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions of easy-VQA as a file of one's own."""
    from nvila.data.builtin import open_builtin

    folder, lines = tmp_path_factory.mktemp("data"), []
    for record in open_builtin("easy-vqa").records(0, 40):
        assert record.sample is not None
        (key,) = record.sample.images
        name = f"{key.replace('/', '-')}.png"
        (folder / name).write_bytes(record.media[key].read())
        turns = [{"from": "human", "value": f"<image>\n{record.sample.question}"}]
        turns.append({"from": "gpt", "value": record.sample.answer})
        lines.append({"id": record.sample.id, "image": name, "conversations": turns})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path
