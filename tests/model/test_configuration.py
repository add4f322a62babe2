from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.configuration import NVILAConfig
from nvila.errors import ConfigError
from nvila.modeling import NVILAForConditionalGeneration

TOWER: dict[str, Any] = {"num_hidden_layers": 27, "image_size": 448, "patch_size": 14}


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 27), (-2, 26), (-27, 1), (5, 5), (27, 27)])
def test_blocks_that_run_for_a_selected_hidden_state(layer: int, blocks: int) -> None:
    assert NVILAConfig(vision_config=TOWER, mm_vision_select_layer=layer).num_vision_blocks == blocks


@pytest.mark.parametrize("layer", [0, -28, 28])
def test_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"mm_vision_select_layer {layer} does not exist in a tower of 27"):
        NVILAConfig(vision_config=TOWER, mm_vision_select_layer=layer)


@pytest.mark.parametrize(
    ("projector", "tokens"), [("mlp_downsample_2x2_fix", 256), ("mlp_downsample_3x3_fix", 121), ("mlp2x_gelu", 1024)]
)
def test_visual_tokens_of_a_tile(projector: str, tokens: int) -> None:
    assert NVILAConfig(vision_config=TOWER, mm_projector_type=projector).num_image_tokens == tokens


def test_unknown_projector_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="unknown projector"):
        NVILAConfig(mm_projector_type="mlp9")


def test_configuration_comes_back_from_disk(model: NVILAForConditionalGeneration, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    loaded = NVILAConfig.from_pretrained(tmp_path)
    for name in ("mm_projector_type", "mm_vision_select_layer", "image_token_id", "image_end_token_id"):
        assert getattr(loaded, name) == getattr(model.config, name)
    assert loaded.text_config.to_dict() == model.config.text_config.to_dict()
    assert loaded.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert loaded.tie_word_embeddings is True


@pytest.mark.parametrize("scales", ["448,896,1344", [448, 896, 1344], None])
def test_scales_are_read_from_text_and_multiply_the_channels(scales: Any, tmp_path: Path) -> None:
    config = NVILAConfig(vision_config=TOWER | {"hidden_size": 1152}, image_aspect_ratio="dynamic_s2", s2_scales=scales)
    assert (config.s2_scales, config.mm_channels) == ([448, 896, 1344], 3456)
    assert config.tiling.scales == (448, 896, 1344)
    config.save_pretrained(tmp_path)
    assert NVILAConfig.from_pretrained(tmp_path).s2_scales == config.s2_scales
    plain = NVILAConfig(vision_config=TOWER | {"hidden_size": 1152}, s2_scales=scales)
    assert plain.mm_channels == 1152


def test_new_fields_and_unknown_keys_come_back_from_disk(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "image_aspect_ratio": "dynamic",
        "min_tiles": 2,
        "max_tiles": 6,
        "num_video_frames": 16,
        "fps": 2.0,
        "video_pool_sizes": [[8, 1, 1], [16, 2, 2]],
        "video_token_id": 7,
        "num_time_tokens": 2,
        "time_token_ids": [8, 9],
        "soft_ce_std": 0.5,
        "drop_path_rate": 0.1,
        "ps3": {"kept": ["as", "it", "is"]},
    }
    NVILAConfig(vision_config=TOWER, **fields).save_pretrained(tmp_path)
    loaded = NVILAConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "dynamik"}, "did you mean 'dynamic'"),
        ({"mm_vision_select_feature": "patch"}, "no class token"),
        ({"image_aspect_ratio": "dynamic_s2", "s2_scales": "448,900"}, "900 is no multiple"),
        ({"s2_scales": "448,big"}, "write pixels separated by commas"),
        ({"image_aspect_ratio": "dynamic_s2", "s2_resize_output_to_scale_idx": 3}, "but there are 3 scales"),
        ({"video_pool_sizes": [[8, 1]]}, "no blocks of time and space"),
        ({"min_tiles": 3, "max_tiles": 2}, "leave no grid"),
    ],
)
def test_values_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NVILAConfig(vision_config=TOWER, **fields)


def test_preset_is_a_configuration() -> None:
    config = NVILAConfig.from_preset("nvila-8b")
    assert (config.mm_channels, config.num_image_tokens, config.image_aspect_ratio) == (3456, 256, "dynamic_s2")
