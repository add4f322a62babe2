"""A quantized folder through the doors of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from nvila.assembly import load_model, register_auto_classes
from nvila.backbone import NVILAModel
from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import QuantizationConfig, Scheme
from nvila.quantization.quantize import quantize_model
from nvila.quantization.saved import load_quantized, save_quantized
from nvila.quantization.schemes import is_quantized_layer

BOTH = QuantizationConfig(group_size=32)


@pytest.fixture(scope="module")
def stored(saved_model: Path, processor: NVILAProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = load_model(saved_model)
    quantize_model(model, BOTH)
    folder = tmp_path_factory.mktemp("quantized") / "model"
    save_quantized(model, BOTH, folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [NVILAForConditionalGeneration, AutoModelForImageTextToText])
def test_both_doors_give_quantized_layers(load: Any, stored: Path) -> None:
    register_auto_classes()
    model = load.from_pretrained(stored)
    assert not model.training
    assert is_quantized_layer(model.model.language_model.layers[0].mlp.up_proj)
    assert is_quantized_layer(model.model.vision_tower.encoder.layers[0].mlp.fc1)
    assert not is_quantized_layer(model.lm_head)
    assert model.config.quantization_config["quant_method"] == "nvila-torchao"
    ids = torch.arange(20, 32).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, load_quantized(stored).eval()(input_ids=ids).logits)


def test_generation_settings_come_back(
    fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    fresh_model.generation_config.max_new_tokens = 77
    quantize_model(fresh_model, BOTH)
    save_quantized(fresh_model, BOTH, tmp_path)
    assert load_quantized(tmp_path).generation_config.max_new_tokens == 77


def test_options_that_fit_are_followed(stored: Path) -> None:
    model, info = NVILAForConditionalGeneration.from_pretrained(
        stored, attn_implementation="eager", dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True
    )
    assert model.model.language_model.config._attn_implementation == "eager"
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"was quantized in torch\.float32, not torch\.float16"),
        ({"load_in_8bit": True}, "is quantized, so load_in_8bit cannot be used"),
        ({"device_map": "moon"}, "'moon' is no device"),
        ({"device_map": {"a": "cpu", "b": "cpu"}}, "'several devices' is no device"),
    ],
    ids=["dtype", "unknown", "device", "devices"],
)
def test_options_that_do_not_fit_are_refused(stored: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        NVILAForConditionalGeneration.from_pretrained(stored, **options)


def test_a_part_cannot_be_loaded_alone(stored: Path) -> None:
    with pytest.raises(CapabilityError, match="NVILAModel cannot be loaded alone"):
        NVILAModel.from_pretrained(stored)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_scheme_comes_back_to_the_bit(
    scheme: Scheme, dtype: torch.dtype, saved_model: Path, tmp_path: Path
) -> None:
    config = QuantizationConfig(vision=scheme, language=scheme, group_size=32)
    model, _ = load_model(saved_model, dtype=dtype)
    quantize_model(model, config)
    save_quantized(model, config, tmp_path)
    loaded = load_quantized(tmp_path).eval()
    assert loaded.dtype == dtype
    ids = torch.arange(20, 32).view(1, -1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(loaded.get_image_features(pixels), model.get_image_features(pixels))


def test_loading_makes_nothing_wide(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing while loading sees shapes alone."""
    seen: list[str] = []
    real = quantize_model

    def watched(model: NVILAForConditionalGeneration, config: QuantizationConfig) -> Any:
        seen.extend({parameter.device.type for parameter in model.parameters()})
        return real(model, config)

    monkeypatch.setattr("nvila.quantization.saved.quantize_model", watched)
    model = load_quantized(stored)
    assert seen == ["meta"]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
