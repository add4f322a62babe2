"""`nvila quantize MODEL`: the real work on an untrained model of small widths, and every way to ask for it wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from nvila_platform.artifacts import read_manifest

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

FEW = ("--samples", "6", "--eval-samples", "12", "--budget", "100")


@pytest.fixture(scope="module")
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


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "ws"


def test_a_model_is_quantized_measured_and_found_again(nvila: Callable[..., Any], model_folder: Path) -> None:
    done = nvila("quantize", model_folder, "--data", "easy-vqa", *FEW, "--json")
    assert done.code == 0, done.err
    found = done.last_json
    folder = Path(found["path"])
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    assert report == found["report"]
    assert [(part["part"], part["method"]) for part in report["parts"]] == [
        ("vision", "SmoothQuant"),
        ("language", "AWQ"),
    ]
    # 96 inputs: no 64 divides them.
    assert report["config"]["group_size"] == 32
    assert (report["num_calibration"], report["after"]["num_samples"]) == (6, 12)
    assert report["parts"][0]["speed_after"]["ttft_ms"] > 0
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.metrics["quantized_bytes"] == report["sizes"]["quantized"]["total"]
    assert set(manifest.inputs) == {"model", "data"}

    from nvila.modeling import NVILAForConditionalGeneration

    loaded = NVILAForConditionalGeneration.from_pretrained(folder / "model")
    assert hasattr(loaded.model.language_model.layers[0].mlp.up_proj.weight, "qdata")

    again = nvila("quantize", model_folder, "--data", "easy-vqa", *FEW)
    assert "this was done before" in again.err
    lines = again.out.splitlines()
    assert lines[0].split()[:3] == ["part", "scheme", "how"]
    assert [line.split()[0] for line in lines[1:4]] == ["vision", "language", "whole"]
    assert lines[-1] == f"model: {folder / 'model'}"
    other = nvila("quantize", model_folder, "--data", "easy-vqa", *FEW, "--alpha", "0.3", "--no-speed", "--json")
    assert other.last_json["key"] != found["key"]
    assert other.last_json["report"]["speed_after"] is None

    refused = nvila("quantize", folder / "model", "--vision", "none")
    assert refused.code == 2
    assert "is quantized already" in refused.err


def test_a_result_is_copied_registered_and_evaluated(
    nvila: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    exports = ("--export", "gguf", "--export", "compressed-tensors")
    words = (
        *exports,
        "--vision",
        "none",
        "--language",
        "fp8",
        "--out",
        tmp_path / "small",
        "--register",
        "tiny@candidate",
    )
    done = nvila("quantize", model_folder, *words, "--json")
    assert done.code == 0, done.err
    assert done.last_json["model"] == "models:/tiny@candidate"
    assert done.last_json["path"] == str(tmp_path / "small")
    assert "rounded to nearest" in done.err
    assert (tmp_path / "small" / "model" / "config.json").is_file()
    assert (tmp_path / "small" / "exports" / "language.gguf").is_file()
    assert (tmp_path / "small" / "exports" / "language-compressed-tensors" / "model.safetensors").is_file()

    from nvila_platform.registry import resolve
    from nvila_platform.settings import Settings

    version = resolve(Settings.load(None), "models:/tiny@candidate")
    assert version.digest == done.last_json["digest"]
    from mlflow import MlflowClient

    from nvila_platform.mlflow_backend import connect

    client: MlflowClient = connect(Settings.load(None))
    tags = client.get_model_version("tiny", str(version.version)).tags
    assert tags["nvila.quantization.language"] == "fp8"
    assert float(tags["nvila.quantization.quantized_bytes"]) > 0
    chained = nvila("quantize", "models:/tiny@candidate")
    assert chained.code == 2  # what the registry has is quantized
    assert "is quantized already" in chained.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vision", "none", "--language", "none"), "neither part is to be quantized"),
        (("--vision", "w9a9"), "did you mean"),
        (("--samples", "4"), "--samples is about data, but none is named"),
        (("--budget", "-1"), "'-1' is no number of points"),
        (("--alpha", "2"), "'2' is not between 0 and 1"),
        (("--fast",), "--fast is a recipe, but a model is meant"),
        (("--register", "@best"), "--register '@best' names no model"),
        (("--group-size", "48", "--vision", "none"), "group_size 48 does not divide the 64 inputs of"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("seed=1", "--vision", "int8"), "seed=1 follows the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_one_line(
    nvila: Callable[..., Any], model_folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = nvila("quantize", model_folder, *words)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err


def test_options_of_a_model_need_one(nvila: Callable[..., Any]) -> None:
    done = nvila("quantize", "--language", "int8")
    assert done.code == 2
    assert "--language is about a model, but none is named" in done.err


def test_an_existing_folder_is_not_written_over(nvila: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "there")
    done = nvila("quantize", model_folder, "--out", tmp_path / "there")
    assert done.code == 2
    assert "there exists" in done.err
