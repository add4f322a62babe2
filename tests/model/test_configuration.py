from __future__ import annotations

from pathlib import Path

import pytest

from nvila.configuration import NVILAConfig
from nvila.errors import ConfigError
from nvila.modeling import NVILAForConditionalGeneration

TOWER = {"num_hidden_layers": 27, "image_size": 448, "patch_size": 14}


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
