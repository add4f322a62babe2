"""`nvila convert`: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.checkpoints import LAYOUTS
from nvila_pipelines.cli import build_parser, convert
from nvila_pipelines.cli.convert import _size


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in our layout."""
    from nvila.assembly import build_model, build_processor, save_model
    from nvila.configuration import NVILAConfig
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    tokenizer = build_word_tokenizer(["what color"], model_max_length=64)
    config = ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_use_head": False,
        },
        language={
            "model_type": "qwen2",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=64,
    )
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    assert isinstance(model.config, NVILAConfig)
    folder = tmp_path_factory.mktemp("models") / "ours"
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


def test_converts_there_and_back(nvila: Callable[..., Any], ours: Path, tmp_path: Path) -> None:
    done = nvila("convert", str(ours), "original", "--to", "vila")
    assert (done.code, done.out.splitlines()[0]) == (0, "original: layout vila, from nvila")
    assert {path.name for path in (tmp_path / "original").iterdir()} >= {"llm", "vision_tower", "mm_projector"}
    back = nvila("convert", "original", "back", "--to", "nvila", "--max-shard-size", "10kB", "--json")
    found = back.last_json
    assert {key: found[key] for key in ("path", "from", "to", "added_tokens")} == {
        "path": "back",
        "from": "vila",
        "to": "nvila",
        "added_tokens": [],
    }
    assert found["files"] == len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_progress_is_reported_to_standard_error(nvila: Callable[..., Any], ours: Path) -> None:
    done = nvila("convert", str(ours), "flat", "--to", "hf", "--log-format", "json")
    events = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    found = [event for event in events if event.get("step") == "convert" and event.get("phase") == "write MiB"]
    # Every tensor is smaller than a MiB; a line is written when the number on it is a new one.
    assert [(event["done"], event["total"]) for event in found] == [(1, 1)]


def test_errors_are_one_line_with_a_fix(nvila: Callable[..., Any], ours: Path, tmp_path: Path) -> None:
    done = nvila("convert", str(ours), "out", "--to", "nvila")
    assert done.code == 2
    assert "has the layout 'nvila' already" in done.err
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{", encoding="utf-8")
    done = nvila("convert", "damaged", "out", "--to", "hf", "--json")
    assert done.code == 1
    assert done.last_json["error"]["code"] == "checkpoint"
    assert "damaged/config.json is not JSON" in done.err.replace("\\", "/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20K", 20_000), ("7", 7)])
def test_sizes_of_shards(text: str, size: int) -> None:
    assert _size(text) == size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "required: --to"),
        (["a", "--to", "hf"], "required: DST"),
        (["a", "b", "--to", "vial"], "did you mean 'vila'?"),
        (["a", "b", "--to", "hf", "--max-shard-size", "5TB"], "'5TB' is not a size"),
        (["a", "b", "--to", "hf", "--max-shard-size", "0GB"], "'0GB' is not a size"),
    ],
)
def test_wrong_usage_of_convert(nvila: Callable[..., Any], words: list[str], message: str) -> None:
    done = nvila("convert", *words)
    assert done.code == 2
    assert message in done.err


def test_layouts_of_the_help_are_those_of_the_model_package() -> None:
    assert convert._LAYOUTS == LAYOUTS
    args = build_parser().parse_args(["convert", "a", "b", "--to", "hf"])
    assert args.max_shard_size == 5_000_000_000
