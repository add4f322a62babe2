"""Points of a sweep, what they change, what they cost, and which of them to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from nvila.configuration import NVILAConfig
from nvila.data.encoding import encode_video
from nvila.errors import ConfigError
from nvila.evaluation.asking import Piece, Question
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.sweep.costs import measure_costs
from nvila.evaluation.sweep.front import Weighed, best, pareto_front, recommended
from nvila.evaluation.sweep.points import Choices, Point, applied, own_tiling, parse_pool, plan_points, spelled
from nvila.evaluation.task import GenerationSettings
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.saved import tensor_bytes


@pytest.fixture(scope="module")
def config() -> NVILAConfig:
    return NVILAConfig.from_preset("tiny-nvila-lite")


def names(points: list[Point]) -> list[str]:
    return [point.name for point in points]


def test_images_are_cut_in_every_way_that_the_weights_allow(config: NVILAConfig) -> None:
    choices = Choices(tilings=("resize", "pad", "dynamic:4", "dynamic_s2:9"), forms=("stored", "int8"))
    points, left = plan_points(config, choices, images=True, videos=False, quantized=False)
    assert names(points) == [f"{t}, {form}" for form in ("stored", "int8") for t in ("resize", "pad", "dynamic:4")]
    assert any(one.setting == "tiling dynamic_s2:9" and "features of one scale" in one.why for one in left)
    # Weights of another compression are another model.
    assert any(one.setting.startswith("projector mlp_downsample") and "--with" in one.why for one in left)


def test_a_model_of_several_scales_keeps_them() -> None:
    config = NVILAConfig.from_preset("tiny-nvila")
    assert config.uses_s2
    fewest = config.tiling.last_scale_min
    choices = Choices(tilings=("resize", f"dynamic_s2:{fewest}", f"dynamic_s2:{fewest - 1}"), forms=("stored",))
    points, left = plan_points(config, choices, images=True, videos=False, quantized=False)
    assert names(points) == [f"dynamic_s2:{fewest}, stored"]
    whys = {one.setting: one.why for one in left}
    assert "features of" in whys["tiling resize"]
    assert "max_tiles" in whys[f"tiling dynamic_s2:{fewest - 1}"]
    usual, _ = plan_points(config, Choices(forms=("stored",)), images=True, videos=False, quantized=False)
    assert f"{own_tiling(config)}, stored" in names(usual)


def test_videos_have_frames_and_pooling(config: NVILAConfig) -> None:
    choices = Choices(frames=(8, 6), pools=((1, 1, 1), (4, 1, 1)), forms=("stored",), tilings=("resize",))
    points, left = plan_points(config, choices, images=False, videos=True, quantized=False)
    assert names(points) == [f"{n} frames, pool {p}, stored" for n, p in ((8, "1x1x1"), (8, "4x1x1"), (6, "1x1x1"))]
    settings = [one.setting for one in left]
    assert settings[:2] == ["tiling", "6 frames, pool 4x1x1"]
    usual, _ = plan_points(config, Choices(forms=("stored",)), images=False, videos=True, quantized=False)
    assert {point.frames for point in usual} == {config.num_video_frames * n // 2 for n in (1, 2, 4, 8)}


def test_images_alone_have_no_frames(config: NVILAConfig) -> None:
    points, left = plan_points(config, Choices(frames=(8,)), images=True, videos=False, quantized=False)
    assert all(point.frames is None for point in points)
    assert left[0].why == "the data has no videos"


def test_quantized_weights_have_one_form(config: NVILAConfig) -> None:
    points, left = plan_points(config, Choices(), images=True, videos=False, quantized=True)
    assert {point.form for point in points} == {"stored"}
    assert any(one.setting == "form int8" and "quantized already" in one.why for one in left)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(tilings=("dynamik:4",)), "there is no tiling 'dynamik'"),
        (Choices(tilings=("dynamic:x",)), "no number of tiles"),
        (Choices(tilings=("resize:4",)), "has one tile"),
        (Choices(tilings=("dynamic_s2:9",)), "nothing is left to try"),
        (Choices(forms=("int4",)), "there is no form 'int4'"),
    ],
)
def test_wrong_choices(config: NVILAConfig, choices: Choices, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_points(config, choices, images=True, videos=False, quantized=False)


def test_poolings_are_written_in_two_ways() -> None:
    assert (parse_pool("4"), parse_pool("4x2x2")) == ((4, 1, 1), (4, 2, 2))
    assert spelled((4, 2, 2)) == "4x2x2"
    for text in ("0", "4x2", "a", ""):
        with pytest.raises(ConfigError, match="is no pooling"):
            parse_pool(text)


@pytest.fixture(scope="module")
def loaded() -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    torch.manual_seed(0)
    config = NVILAConfig.from_preset("tiny-nvila-lite")
    return NVILAForConditionalGeneration(config).eval(), NVILAProcessor.from_preset("tiny-nvila-lite")


def asked(kind: str, value: object) -> Question:
    pieces = (Piece(kind, value), Piece("text", "What is it?"))
    return Question(index=0, id="0", pieces=pieces, reference={}, group=None, digest=kind)


def test_a_point_changes_what_the_model_sees(
    loaded: tuple[NVILAForConditionalGeneration, NVILAProcessor], tmp_path: Path
) -> None:
    model, own = loaded
    config = model.config
    assert isinstance(config, NVILAConfig)
    tile = config.num_image_tokens
    image = asked("image", Image.new("RGB", (200, 100), "red"))
    settings = GenerationSettings(max_new_tokens=2)
    costs = {}
    for tiling in ("resize", "dynamic:2", "resize"):
        answerer = ModelAnswerer(model, applied(Point(tiling=tiling), config, own))
        costs[tiling] = measure_costs(answerer, [image], settings)
        assert len(answerer.answer([image], settings)) == 1
    # Two tiles and the thumbnail; back at one tile nothing is left of the point before.
    assert (costs["resize"].tokens, costs["dynamic:2"].tokens) == (tile, 3 * tile)
    assert costs["resize"].prompt_tokens > tile
    weights = tensor_bytes(model) / 2**20
    for cost in costs.values():
        assert cost.weights_mib == pytest.approx(weights)
        assert 0 < cost.ttft_low_ms <= cost.ttft_ms <= cost.ttft_high_ms
    assert weights < costs["resize"].memory_mib < costs["dynamic:2"].memory_mib
    clip = asked("video", encode_video([Image.new("RGB", (64, 64), "red")] * 16, rate=8))
    for frames, pool, groups in ((8, (1, 1, 1), 8), (8, (4, 1, 1), 2), (4, (4, 1, 1), 1)):
        answerer = ModelAnswerer(model, applied(Point(frames=frames, pool=pool), config, own))
        assert measure_costs(answerer, [clip], settings).tokens == groups * tile


def test_the_front_leaves_out_what_is_beaten() -> None:
    points = [Weighed(cost=c, score=s) for c, s in ((3, 0.9), (1, 0.5), (2, 0.5), (4, 0.9), (2, 0.7), (5, 0.2))]
    assert pareto_front(points) == [1, 4, 0]
    assert best(points) == 0


@pytest.mark.parametrize(("loss", "index"), [(0.0, 2), (0.01, 1), (0.3, 0)])
def test_the_cheapest_point_within_a_loss(loss: float, index: int) -> None:
    points = [Weighed(cost=c, score=s) for c, s in ((1, 0.5), (2, 0.79), (3, 0.8), (4, 0.8))]
    assert recommended(points, loss) == index


def test_nothing_to_recommend() -> None:
    with pytest.raises(ValueError, match="no points"):
        recommended([], 0.1)
