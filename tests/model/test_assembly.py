from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from nvila.assembly import build_model, check_model_files, load_model, register_auto_classes
from nvila.configuration import NVILAConfig
from nvila.errors import CheckpointError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.training.config import ModelConfig


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of a saved model that a test may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def test_same_seed_same_weights(model_config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model(model_config, tokenizer).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_token_ids_come_from_the_tokenizer(
    model: NVILAForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = model.config
    assert tokenizer.convert_ids_to_tokens([config.image_token_id, config.image_end_token_id]) == ["<image>", "\n"]
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.pad_token_id == tokenizer.pad_token_id


def test_saved_folder_gives_the_same_logits(
    saved_model: Path, model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    loaded, loaded_processor = load_model(saved_model)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = loaded_processor(pictures["a"], "<image>what color?")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**processor(pictures["a"], "<image>what color?")).logits)


def test_saved_folder_is_an_ordinary_hugging_face_model(saved_model: Path) -> None:
    register_auto_classes()
    register_auto_classes()
    assert isinstance(AutoConfig.from_pretrained(saved_model), NVILAConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(saved_model), NVILAForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(saved_model), NVILAProcessor)
    assert not [path for path in saved_model.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "x.pth", "x.pkl", "x.pickle", "x.ckpt", "A.BIN"])
def test_files_that_can_execute_code_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"holds {name}, .* execute code on load .*safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", r"not a model folder: config\.json is missing"), ("model.safetensors", "no safetensors weights")],
)
def test_incomplete_folder_is_refused(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        check_model_files(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"])
def test_damaged_file_is_a_checkpoint_error(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot load a model from"):
        load_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_folder_without_its_processor_is_a_checkpoint_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError):
        load_model(folder)


@pytest.mark.parametrize(
    ("place", "message"),
    [("../stolen.safetensors", "names the shard '../stolen.safetensors'"), ("absent.safetensors", "is missing")],
)
def test_index_that_leaves_its_folder_is_refused(folder: Path, place: str, message: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "here.safetensors", {"format": "pt"})
    save_file(weights, folder.parent / "stolen.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    names = dict.fromkeys(weights, "here.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    load_model(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | {next(iter(names)): place}}), encoding="utf-8")
    for load in (
        load_model,
        NVILAForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
    ):
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_pickled_weights_are_not_even_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        NVILAForConditionalGeneration.from_pretrained(folder)


def test_missing_and_left_over_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.mm_projector.layers.2.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)
    save_file({**weights, "model.mm_projector.layers.9.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.9\.weight"):
        load_model(folder)
    save_file({**weights, name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_configuration_of_an_unknown_kind_is_a_checkpoint_error(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["vision_config"]["model_type"] = "no_such_tower"
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no_such_tower"):
        load_model(folder)
