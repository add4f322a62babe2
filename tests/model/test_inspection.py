from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nvila.configuration import NVILAConfig
from nvila.errors import CheckpointError, ConfigError
from nvila.inspection import PromptReport, inspect_model, inspect_prompt, load_config, load_processor, prompt_plans
from nvila.vision.drawing import draw_tilings
from nvila.vision.tiling import PAD_COLOR, Grid, TilePlan, TilingConfig


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 40, 40))


def trace(preset: str, images: list[Image.Image] | None = None, videos: list[object] | None = None) -> PromptReport:
    return inspect_prompt(load_processor(preset), images or [], videos or [], "what is this?")


def sources(report: PromptReport) -> list[str]:
    return [run.source for run in report.runs if run.visual]


def test_parts_of_a_large_model_are_counted_without_building_it() -> None:
    report = inspect_model("nvila-8b")
    tower, projector, language = report.parts
    assert (tower.parameters, projector.parameters, report.parameters) == (413_327_088, 62_425_088, 8_088_544_496)
    assert "27 blocks of width 1152, 26 of them used" in tower.detail
    assert "3456 channels (3 scales) -> 3584, 256 tokens a tile" in projector.detail
    assert "28 layers of width 3584, 151,670 tokens, head of its own" in language.detail
    assert report.to_dict()["parameters"] == report.parameters


def test_tied_head_is_counted_once() -> None:
    language = inspect_model("tiny-nvila-lite").parts[2]
    config = NVILAConfig.from_preset("tiny-nvila-lite").text_config
    blocks = 64 * 64 * 2 + 64 + 64 * 32 * 2 + 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert language.parameters == config.vocab_size * 64 + 2 * blocks + 64
    assert "tied head" in language.detail


@pytest.mark.parametrize(
    ("preset", "images", "videos"),
    [
        ("nvila-lite-8b", "dynamic: 1 to 12 tiles and a thumbnail, 121 tokens", "8 frames of 11x11 tokens"),
        ("nvila-15b", "dynamic_s2: scales 448, 896, 1344; 9 to 12 tiles of 256", "8 frames of 16x16 tokens"),
        (
            "nvila-8b-video",
            "resize: one tile, 256 tokens",
            "256 frames of 16x16 tokens, averaged over 8 frames x 1 x 1 tokens, 100 time",
        ),
    ],
)
def test_media_are_described_in_words(preset: str, images: str, videos: str) -> None:
    report = inspect_model(preset)
    assert report.images.startswith(images)
    assert report.videos.startswith(videos)


def test_every_position_has_one_origin_and_the_processor_agrees() -> None:
    report = trace("tiny-nvila-lite", [picture(192, 108)])
    assert report.runs[0].start == 0
    assert all(one.stop == other.start for one, other in pairwise(report.runs))
    counted = load_processor("tiny-nvila-lite").count_tokens(image_sizes=[(192, 108)])
    assert (report.visual, counted.tiles) == (counted.visual, ((Grid(4, 2), Grid(1, 1)),))
    assert report.to_dict()["total"] == report.runs[-1].stop == report.visual + report.text


def test_tiles_are_named_in_reading_order_with_the_thumbnail_last() -> None:
    report = trace("tiny-nvila-lite", [picture(192, 108)])
    assert sources(report)[:2] == [
        "image 1: tile 1 of 8, column 1, row 1",
        "image 1: tile 2 of 8, column 2, row 1",
    ]
    assert sources(report)[-2:] == ["image 1: tile 8 of 8, column 4, row 2", "image 1: thumbnail"]
    assert {(run.visual, run.text) for run in report.runs if run.visual} == {(9, 1)}


def test_merged_scales_are_one_run() -> None:
    report = trace("tiny-nvila", [picture(200, 100)])
    assert sources(report) == ["image 1: 5x2 tiles row by row, merged from 15 of 3 scales"]
    assert report.visual == 160


def test_several_images_have_one_tile_each() -> None:
    report = trace("tiny-nvila", [picture(200, 100), picture(10, 10)])
    assert sources(report) == ["image 1: one tile", "image 2: one tile"]


def test_frames_of_a_video_are_named_by_what_is_averaged() -> None:
    frames = [np.full((8, 8, 3), level, dtype=np.uint8) for level in range(16)]
    report = trace("tiny-nvila-video", videos=[frames])
    assert sources(report) == ["video 1: mean of frames 1-8 of 16", "video 1: mean of frames 9-16 of 16"]
    assert {run.kind for run in report.runs} == {"text", "video"}


def test_levels_of_a_pyramid_are_told_apart() -> None:
    processor = load_processor("tiny-nvila-video")
    processor.video_pool_sizes = [[1, 4, 4], [2, 2, 2]]
    frames = [np.zeros((8, 8, 3), dtype=np.uint8)] * 2
    processor.video_processor.num_frames = 2
    report = inspect_prompt(processor, videos=[frames])
    assert sources(report) == [
        "video 1: frame 1 of 2, level [1, 4, 4]",
        "video 1: frame 2 of 2, level [1, 4, 4]",
        "video 1: mean of frames 1-2 of 2, level [2, 2, 2]",
    ]


def test_text_is_shown_as_it_was_written() -> None:
    texts = [run.source for run in trace("tiny-nvila", [picture(9, 9)]).runs if run.kind == "text"]
    assert texts[0].startswith("<|im_start|>")
    assert "what is this?<|im_end|>" in texts[-1]


def test_saved_folder_is_read_like_a_preset(tmp_path: Path) -> None:
    NVILAConfig.from_preset("tiny-nvila").save_pretrained(tmp_path)
    load_processor("tiny-nvila").save_pretrained(tmp_path)
    from_folder, from_preset = inspect_model(str(tmp_path)), inspect_model("tiny-nvila")
    assert (from_folder.parts, from_folder.images) == (from_preset.parts, from_preset.images)
    assert load_processor(str(tmp_path)).num_image_tokens == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json"),
        ("{", "config.json"),
        (json.dumps({"model_type": "llama"}), "model_type 'llama' is not an NVILA model"),
        (json.dumps({"model_type": "llava_llama"}), r"layout 'vila'.*nvila convert .* --to nvila"),
    ],
)
def test_folder_without_our_model_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_config(str(tmp_path))


def test_flat_checkpoint_is_not_taken_for_ours(tmp_path: Path) -> None:
    NVILAConfig.from_preset("tiny-nvila").save_pretrained(tmp_path)
    save_file({"llm.model.norm.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layout 'hf'.*nvila convert"):
        load_config(str(tmp_path))


def test_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="processor"):
        load_processor(str(tmp_path))


def test_unknown_model_names_the_nearest_preset() -> None:
    with pytest.raises(ConfigError, match=r"'nvila-lite-8' is no folder and no preset.*did you mean 'nvila-lite-8b'"):
        inspect_model("nvila-lite-8")


def test_picture_shows_every_grid_with_its_colours() -> None:
    left_red = Image.new("RGB", (400, 200), (255, 0, 0))
    left_red.paste((0, 0, 255), (200, 0, 400, 200))
    sheet = draw_tilings([left_red], [TilePlan((Grid(4, 2), Grid(1, 1)))], TilingConfig("dynamic", 64))
    pixels = np.asarray(sheet)
    red, blue, line = ((pixels == color).all(axis=2) for color in ((255, 0, 0), (0, 0, 255), (255, 196, 0)))
    # The image, its 4x2 grid and the thumbnail, which is warped to a square: three panels of 360 pixels, half of each.
    assert red.sum() + line.sum() / 2 == pytest.approx(180 * (180 + 180 + 360), rel=0.05)
    assert blue.sum() + line.sum() / 2 == pytest.approx(180 * (180 + 180 + 360), rel=0.05)
    assert line.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_images_can_be_drawn(size: tuple[int, int]) -> None:
    processor = load_processor("tiny-nvila")
    pictures = [picture(*size)]
    assert draw_tilings(pictures, prompt_plans(processor, pictures), processor.image_processor.tiling).width > 360


def test_padding_is_drawn_as_the_tower_gets_it() -> None:
    sheet = draw_tilings([picture(40, 20)], [TilePlan()], TilingConfig("pad", 64))
    grey = (np.asarray(sheet) == PAD_COLOR).all(axis=2).sum()
    assert grey == pytest.approx(360 * 180, rel=0.15)


def test_images_are_drawn_below_each_other() -> None:
    config = TilingConfig("resize", 64)
    one = draw_tilings([picture(30, 20)], [TilePlan()], config)
    two = draw_tilings([picture(30, 20)] * 2, [TilePlan()] * 2, config)
    assert (two.width, two.height) == (one.width, 2 * one.height)
