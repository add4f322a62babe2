"""NaN and infinity are refused where they come in: media, loaded weights, converted weights."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nvila.assembly import load_model
from nvila.checkpoints.tensor_file import finite_chunks
from nvila.errors import CheckpointError, DataError
from nvila.finite import all_finite
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import QuantizationConfig
from nvila.quantization.quantize import quantize_model
from nvila.quantization.saved import save_quantized


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_broken_element_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.full((3, 40_000), 60_000.0).to(dtype)  # whose sum is beyond 16 bits
    assert all_finite(values)
    values[2, 7] = value
    assert not all_finite(values)


def test_numbers_whose_sum_is_too_large_are_finite() -> None:
    assert all_finite(torch.full((4,), 3e38))
    assert all_finite(torch.ones(3, dtype=torch.long))
    assert all_finite(torch.full((3,), math.nan, device="meta"))


@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos"])
def test_broken_tiles_are_named_by_their_place(name: str, model: NVILAForConditionalGeneration) -> None:
    ids = {"pixel_values": model.config.image_token_id, "pixel_values_videos": model.config.video_token_id}
    pixels = torch.zeros(4, 3, 32, 32)
    given: dict[str, Any] = {"input_ids": torch.full((1, 16), ids[name]), name: pixels}
    assert model(**given).logits.shape[1] == 16
    pixels[1, 0, 0, 0], pixels[3, 2, 5, 5] = math.inf, math.nan
    with pytest.raises(DataError, match=rf"{name}\[1\] holds NaN or infinity \(2 of 4 do\)"):
        model(**given)


@pytest.mark.parametrize("name", ["image_features", "video_features"])
def test_broken_features_are_named(name: str, model: NVILAForConditionalGeneration) -> None:
    ids = {"image_features": model.config.image_token_id, "video_features": model.config.video_token_id}
    features = torch.zeros(4, 64)
    features[2, 3] = math.nan
    with pytest.raises(DataError, match=rf"{name}\[2\] holds NaN"):
        model(input_ids=torch.full((1, 4), ids[name]), **{name: features})


def test_processor_says_which_image_or_video_is_broken(
    processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    broken = np.full((4, 4, 3), np.nan, np.float32)
    with pytest.raises(DataError, match=r"^image 2 of 3: .* that are no numbers"):
        processor([pictures["a"], broken, pictures["b"]], "<image><image><image>what?")
    with pytest.raises(DataError, match=r"^image 2 of 2: "):
        processor.image_processor([pictures["a"], torch.full((4, 4, 3), math.inf)])
    with pytest.raises(DataError, match=r"^video 2 of 2: frame 0 of .* that are no numbers"):
        processor.video_processor([[pictures["a"]], [broken]])


def test_model_with_a_broken_weight_is_not_loaded(saved_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.mm_projector.layers.2.bias"
    weights[name][3] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weight {name} in .* holds NaN or infinity"):
        load_model(folder)


def test_quantized_model_with_a_broken_scale_is_not_loaded(
    fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path: Path
) -> None:
    config = QuantizationConfig(group_size=32)
    quantize_model(fresh_model, config)
    save_quantized(fresh_model, config, tmp_path)
    processor.save_pretrained(tmp_path)
    load_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "scale" in name)
    weights[name].view(-1)[0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weight {re.escape(name)} in .* holds NaN or infinity"):
        load_model(tmp_path)


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_bytes_are_found_in_every_type(dtype: str, value: float) -> None:
    def raw(*values: float) -> bytes:
        return torch.tensor(values, dtype=DTYPES[dtype]).view(torch.uint8).numpy().tobytes()

    limit = torch.finfo(DTYPES[dtype])
    whole = [raw(0.0, -1.5), raw(limit.max, limit.min, limit.tiny)]
    assert list(finite_chunks(iter(whole), dtype, "x")) == whole
    with pytest.raises(CheckpointError, match="tensor 'x' holds NaN or infinity"):
        list(finite_chunks(iter([raw(1.0), raw(2.0, value)]), dtype, "tensor 'x'"))


def test_bytes_that_are_no_floats_are_passed_on() -> None:
    assert list(finite_chunks(iter([b"\xff" * 8]), "I32", "x")) == [b"\xff" * 8]
