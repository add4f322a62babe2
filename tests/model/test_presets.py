from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from nvila.configuration import NVILAConfig
from nvila.errors import ConfigError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.presets import PRESETS, preset

TOWER = 413_327_088
# Language models with the vocabulary rows of their bases, as published.
QWEN_2B, QWEN_7B, QWEN_14B = 1_543_714_304, 7_615_616_512, 14_770_033_664


@cache
def on_meta(name: str) -> NVILAForConditionalGeneration:
    with torch.device("meta"):
        return NVILAForConditionalGeneration(NVILAConfig.from_preset(name))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "projector", "language"),
    [
        ("nvila-lite-2b", 43_533_696, QWEN_2B - (151_936 - 151_670) * 1536),
        ("nvila-lite-8b", 61_101_440, 7_612_656_128),
        ("nvila-8b", 62_425_088, QWEN_7B - (152_064 - 151_670) * 3584 * 2),
        ("nvila-15b", 97_031_168, QWEN_14B - (152_064 - 151_670) * 5120 * 2),
        ("nvila-8b-video", 29_376_512, QWEN_7B - (152_064 - 151_770) * 3584 * 2),
    ],
)
def test_parts_have_the_published_number_of_parameters(name: str, projector: int, language: int) -> None:
    built = on_meta(name)
    tower = built.model.vision_tower
    assert (count(tower), len(list(tower.parameters()))) == (TOWER, 437)
    assert count(built.model.mm_projector) == projector
    assert count(built) - count(tower) - count(built.model.mm_projector) == language


@pytest.mark.parametrize(
    ("name", "rows", "parameters"),
    [
        ("nvila-lite-2b", 151_936, QWEN_2B),
        ("nvila-lite-8b", 152_064, QWEN_7B),
        ("nvila-15b", 152_064, QWEN_14B),
    ],
)
def test_decoders_are_those_of_their_bases(name: str, rows: int, parameters: int) -> None:
    config = NVILAConfig.from_preset(name).text_config
    config.vocab_size = rows
    with torch.device("meta"):
        assert count(AutoModelForCausalLM.from_config(config)) == parameters


@pytest.mark.parametrize(
    ("name", "image", "video", "rows"),
    [
        ("nvila-lite-8b", 151_649, 151_650, 151_651),
        ("nvila-15b", 151_668, 151_669, 151_670),
        ("nvila-8b-video", 151_668, 151_669, 151_770),
    ],
)
def test_token_ids_are_those_of_released_tokenizers(name: str, image: int, video: int, rows: int) -> None:
    config = NVILAConfig.from_preset(name)
    assert (config.image_token_id, config.video_token_id, config.text_config.vocab_size) == (image, video, rows)
    assert (config.image_end_token_id, config.text_config.eos_token_id) == (198, 151_645)
    assert config.text_config.pad_token_id == image - 2


@pytest.mark.parametrize("name", PRESETS)
def test_time_tokens_are_the_last_rows(name: str) -> None:
    config = NVILAConfig.from_preset(name)
    rows = config.text_config.vocab_size
    expected = list(range(rows - 100, rows)) if name.endswith("video") else []
    assert config.time_token_ids == expected
    assert config.num_time_tokens == len(expected)


@pytest.mark.parametrize(
    ("name", "tiling", "tokens", "channels", "max_length"),
    [
        ("nvila-lite-2b", "dynamic", 121, 1152, 4096),
        ("nvila-lite-8b", "dynamic", 121, 1152, 4096),
        ("nvila-8b", "dynamic_s2", 256, 3456, 8192),
        ("nvila-15b", "dynamic_s2", 256, 3456, 8192),
        ("nvila-8b-video", "resize", 256, 1152, 16384),
    ],
)
def test_variants_look_at_images_as_published(
    name: str, tiling: str, tokens: int, channels: int, max_length: int
) -> None:
    config = NVILAConfig.from_preset(name)
    assert (config.image_aspect_ratio, config.num_image_tokens, config.mm_channels) == (tiling, tokens, channels)
    assert (config.num_vision_blocks, config.model_max_length) == (26, max_length)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6


def test_videos_are_pooled_over_eight_frames() -> None:
    config = NVILAConfig.from_preset("nvila-8b-video")
    assert (config.num_video_frames, config.video_pool_sizes) == (256, [[8, 1, 1]])


@pytest.mark.parametrize(
    ("name", "twin_of"),
    [("tiny-nvila-lite", "nvila-lite-8b"), ("tiny-nvila", "nvila-8b"), ("tiny-nvila-video", "nvila-8b-video")],
)
def test_tiny_twin_runs_the_mechanisms_of_its_original(name: str, twin_of: str) -> None:
    tiny, original = NVILAConfig.from_preset(name), NVILAConfig.from_preset(twin_of)
    for field in ("image_aspect_ratio", "mm_projector_type", "video_pool_sizes", "max_tiles", "num_time_tokens"):
        assert getattr(tiny, field) == getattr(original, field)
    assert [scale // tiny.tile_size for scale in tiny.s2_scales] == [scale // 448 for scale in original.s2_scales]
    assert count(on_meta(name)) < 200_000


def test_presets_survive_saving_and_loading() -> None:
    config = NVILAConfig.from_preset("nvila-8b-video")
    again = NVILAConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_preset_is_a_copy() -> None:
    changed = preset("tiny-nvila")
    changed["vision_config"]["hidden_size"] = 1
    changed["s2_scales"].clear()
    assert preset("tiny-nvila")["vision_config"]["hidden_size"] == 32
    assert preset("tiny-nvila")["s2_scales"] == [64, 128, 192]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'nvila-8B'.*did you mean 'nvila-8b'"):
        preset("nvila-8B")
