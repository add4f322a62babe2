from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvila.assembly import load_model, save_model
from nvila.configuration import NVILAConfig
from nvila.errors import CheckpointError, ConfigError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import QuantizationConfig
from nvila.quantization.quantize import quantize_model
from nvila.quantization.saved import is_quantized, load_quantized, pack_nibbles, save_quantized, unpack_nibbles

BOTH = QuantizationConfig(group_size=32)


@pytest.fixture(scope="module")
def quantized(model: NVILAForConditionalGeneration) -> NVILAForConditionalGeneration:
    changed = copy.deepcopy(model)
    quantize_model(changed, BOTH)
    return changed


@pytest.fixture(scope="module")
def stored(
    quantized: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("quantized") / "model"
    assert save_quantized(quantized, BOTH, directory) == (directory / "model.safetensors").stat().st_size
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A copy of a quantized model that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture(scope="module")
def inputs(processor: NVILAProcessor, pictures: dict[str, Image.Image]) -> dict[str, Tensor]:
    return dict(processor([pictures["a"], pictures["b"]], "<image><image>what color is the shape?"))


def logits(model: NVILAForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
        return out


@given(rows=st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_packed_nibbles_come_back(rows: list[list[int]]) -> None:
    values = torch.tensor(rows, dtype=torch.int8)
    packed = pack_nibbles(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (len(rows), 3))
    assert torch.equal(unpack_nibbles(packed), values)


def test_low_nibble_comes_first() -> None:
    assert pack_nibbles(torch.tensor([-8, 7, 0, -1], dtype=torch.int8)).tolist() == [0xF0, 0x78]


def test_only_the_linear_layers_of_both_towers_change(model: NVILAForConditionalGeneration) -> None:
    changed = copy.deepcopy(model)
    layers = quantize_model(changed, BOTH)
    assert len(layers.vision) == 2 * 6  # two of three blocks run
    assert len(layers.language) == 2 * 7
    different = {
        name
        for name, parameter in changed.named_parameters()
        if type(parameter) is not type(model.get_parameter(name))
        or not torch.equal(parameter, model.get_parameter(name))
    }
    expected = {f"model.vision_tower.encoder.layers.{name}.weight" for name in layers.vision}
    assert different == expected | {f"model.language_model.{name}.weight" for name in layers.language}


@pytest.mark.parametrize(("vision", "language"), [("none", "none"), ("w8a8", "none"), ("none", "w4a16")])
def test_each_scheme_is_a_choice_of_its_own(vision: str, language: str, model: NVILAForConditionalGeneration) -> None:
    changed = copy.deepcopy(model)
    config = QuantizationConfig.from_dict({**BOTH.to_dict(), "vision": vision, "language": language})
    layers = quantize_model(changed, config)
    assert (bool(layers.vision), bool(layers.language)) == (vision != "none", language != "none")


def test_four_bit_weights_stay_within_a_step_of_their_group(
    model: NVILAForConditionalGeneration, quantized: NVILAForConditionalGeneration
) -> None:
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    wide = model.get_parameter(name).detach()
    narrow = quantized.get_parameter(name).detach().dequantize()
    groups, rounded = (w.unflatten(1, (-1, 32)) for w in (wide, narrow))
    # The range of an asymmetric grid includes zero; sixteen levels leave fifteen steps.
    step = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    # Rounding of the zero point may move the grid by another half step at its ends.
    assert bool(((groups - rounded).abs() <= 1.01 * step.unsqueeze(2)).all())
    assert float(((groups - rounded).abs() / step.unsqueeze(2)).mean()) < 0.3
    assert all(len(set(group.tolist())) <= 16 for row in rounded for group in row)


def test_int8_weights_stay_within_a_step_of_their_channel(
    model: NVILAForConditionalGeneration, quantized: NVILAForConditionalGeneration
) -> None:
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.weight"
    wide, narrow = model.get_parameter(name).detach(), quantized.get_parameter(name).detach().dequantize()
    step = wide.abs().amax(1, keepdim=True) / 127.5
    assert bool(((wide - narrow).abs() <= 1.01 * step).all())


def test_int8_layer_equals_the_product_of_integers(
    model: NVILAForConditionalGeneration, quantized: NVILAForConditionalGeneration
) -> None:
    """Round inputs to one scale a token and weights to one a channel, multiply whole numbers, scale back."""
    layer = quantized.model.vision_tower.encoder.layers[0].mlp.fc1
    original = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.detach()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 5  # the largest value of each token is positive: its -127.5 could round to either side
    whole_w, scale_w = layer.weight.qdata.float(), layer.weight.scale.reshape(-1, 1)
    # 256 levels from -128 to 127 over twice the largest value
    torch.testing.assert_close(scale_w, original.abs().amax(1, keepdim=True) / 127.5)
    scale_x = x.abs().amax(1, keepdim=True) / 127.5
    whole_x = (x / scale_x).round().clamp(-128, 127)
    expected = (whole_x @ whole_w.t()) * scale_x * scale_w.t() + layer.bias
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_quantized_answers_stay_near_the_wide_ones(
    model: NVILAForConditionalGeneration, quantized: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    wide, narrow = logits(model, inputs), logits(quantized, inputs)
    assert not torch.equal(wide, narrow)
    assert float(torch.nn.functional.cosine_similarity(wide, narrow, dim=-1).mean()) > 0.95


def test_saved_and_loaded_gives_the_same_bits(
    stored: Path, quantized: NVILAForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    assert is_quantized(stored)
    loaded, _ = load_model(stored)
    assert not loaded.training
    assert torch.equal(logits(loaded, inputs), logits(quantized, inputs))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_loaded_model_can_be_saved_again(stored: Path, tmp_path: Path) -> None:
    save_quantized(load_quantized(stored), BOTH, tmp_path)
    first, second = (load_file(path / "model.safetensors") for path in (stored, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_values_of_four_bits_take_four_bits_on_disk(stored: Path, saved_model: Path) -> None:
    weights = load_file(stored / "model.safetensors")
    name = "model.language_model.layers.1.mlp.gate_proj.weight.qdata_packed4"
    assert (weights[name].dtype, weights[name].numel()) == (torch.uint8, 128 * 64 // 2)
    assert not [name for name in weights if name.startswith("lm_head")]
    assert (stored / "model.safetensors").stat().st_size < 0.7 * (saved_model / "model.safetensors").stat().st_size


def test_wide_folder_is_not_taken_for_a_quantized_one(saved_model: Path) -> None:
    assert not is_quantized(saved_model)


@pytest.mark.parametrize(
    ("group_size", "layer", "width"), [(48, "q_proj", 64), (96, "q_proj", 64), (128, "q_proj", 64)]
)
def test_group_size_that_does_not_divide_a_layer_is_refused(
    group_size: int, layer: str, width: int, fresh_model: NVILAForConditionalGeneration
) -> None:
    with pytest.raises(ConfigError, match=rf"group_size {group_size} does not divide the {width} inputs of .*{layer}"):
        quantize_model(fresh_model, QuantizationConfig(vision="none", group_size=group_size))


def test_missing_tensor_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.language_model.layers.1.mlp.gate_proj.weight.scale"
    del weights[name]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"the quantized weights lack {name}"):
        load_model(folder)


def test_left_over_tensor_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds unknown tensor model\.extra"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.mm_projector.layers.1.weight", torch.zeros(3)),
        ("model.mm_projector.layers.1.weight", torch.zeros(128, dtype=torch.bfloat16)),
        ("model.language_model.layers.0.mlp.up_proj.weight.qdata_packed4", torch.zeros(2, 2, dtype=torch.uint8)),
    ],
)
def test_tensor_of_another_shape_or_type_is_named(folder: Path, name: str, value: Tensor) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    assert name in weights
    save_file({**weights, name: value}, path)
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('_packed4')} is .*, expected "):
        load_model(folder)


def test_damaged_weights_are_a_checkpoint_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_model(folder)


def test_code_is_refused_in_quantized_folders_too(folder: Path) -> None:
    (folder / "extra.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.pkl"):
        load_model(folder)


def test_unknown_setting_of_a_stored_scheme_is_a_checkpoint_error(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["bits"] = 3
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="bits"):
        load_model(folder)


def test_scheme_comes_back_from_its_dictionary() -> None:
    config = QuantizationConfig(vision="none", group_size=16)
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="quant_method is 'awq'"):
        QuantizationConfig.from_dict({"quant_method": "awq"})


def test_untied_model_is_saved_whole(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    config = cast("NVILAConfig", copy.deepcopy(model.config))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(3)
    untied = NVILAForConditionalGeneration(config).eval()
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    save_model(untied, processor, tmp_path / "wide")
    assert torch.equal(logits(load_model(tmp_path / "wide")[0], inputs), logits(untied, inputs))
    quantize_model(untied, BOTH)
    save_quantized(untied, BOTH, tmp_path / "narrow")
    assert "lm_head.weight" in load_file(tmp_path / "narrow" / "model.safetensors")
    assert torch.equal(logits(load_quantized(tmp_path / "narrow").eval(), inputs), logits(untied, inputs))
