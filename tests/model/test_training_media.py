"""Media as stages see them: the pixels and positions of the processor, generated clips, settings of a stage."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.assembly import build_model, build_processor, load_model
from nvila.configuration import NVILAConfig
from nvila.data import moving_shapes
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import Part, vqa_sample
from nvila.data.tokenizers import build_word_tokenizer
from nvila.data.video import load_video
from nvila.errors import ConfigError, DataError
from nvila.processing import NVILAProcessor
from nvila.training.config import ModelConfig, StageConfig, Tiling, TrainConfig
from nvila.training.media import Feed, FrameCache, StageMedia
from nvila.training.observer import StageStart, StepRecord
from nvila.training.run import train

WORDS = ["what is it ? red which way does it move color shape left right up down circle square"]


class Table:
    """Images and clips that tests draw."""

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        self._sizes = sizes

    def image(self, key: str) -> Image.Image:
        width, height = self._sizes[key]
        levels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
        return Image.fromarray(levels)

    def encoded(self, key: str) -> bytes:
        if key not in self._sizes:
            return moving_shapes.gif(int(key.rpartition("/")[2]))
        out = io.BytesIO()
        self.image(key).save(out, "PNG")
        return out.getvalue()


class Steps:
    """Remembers the steps of a run."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_stage_start(self, start: StageStart) -> None:
        pass

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_notice(self, text: str) -> None:
        pass

    def on_stage_end(self, stage: str) -> None:
        pass


TABLE = Table({"wide": (96, 32), "tall": (32, 64), "small": (20, 20)})


def config(model_config: ModelConfig, tiling: Tiling, **changes: Any) -> ModelConfig:
    scales = (32, 64, 96) if tiling == "dynamic_s2" else ()
    return replace(model_config, tiling=tiling, s2_scales=scales, max_length=256, **changes)


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "one", "data": "clips", "steps": 1, "lr": {"projector": 1e-3}, "images_per_step": 2,
        "samples_per_image": 1, "schedule": "cosine",
    }  # fmt: skip
    return StageConfig(**(values | changes))


def built(model: ModelConfig) -> tuple[Any, NVILAProcessor]:
    made = build_model(model, build_word_tokenizer(WORDS, model_max_length=256))
    return made, build_processor(cast("NVILAConfig", made.config), build_word_tokenizer(WORDS, model_max_length=256))


@pytest.mark.parametrize("tiling", ["resize", "pad", "dynamic", "dynamic_s2"])
def test_training_sees_what_the_processor_makes(model_config: ModelConfig, tiling: Tiling) -> None:
    _, processor = built(config(model_config, tiling))
    media = StageMedia.of(stage(), processor, TABLE.image, TABLE.encoded)
    keys = ["wide", "small", "tall"]
    found = media.tensors(keys, [])
    expected = processor(images=[TABLE.image(key) for key in keys], text="<image>" * 3 + "what is it ?", tile_all=True)
    assert found.keys() == {name for name in expected if name in ("pixel_values", "image_blocks")}
    for name, values in found.items():
        assert torch.equal(values, expected[name])
    samples = [
        vqa_sample(id=key, source="s", image=key, question="what is it ?", answer="red") for key in ("wide", "small")
    ]
    encoder = ConversationEncoder(processor.tokenizer, processor.num_image_tokens, 256, layouts=media.layouts)
    marker = processor.tokenizer.convert_tokens_to_ids("<image>")
    for sample in samples:
        visual = sum(token == marker for token in encoder(sample).ids)
        size = TABLE.image(sample.images[0]).size
        assert visual == processor.count_tokens([size], text="<image>", tile_all=True).visual


def test_a_stage_of_single_tiles_cuts_nothing(model_config: ModelConfig) -> None:
    _, processor = built(config(model_config, "dynamic_s2"))
    media = StageMedia.of(stage(tiling="resize"), processor, TABLE.image, TABLE.encoded)
    found = media.tensors(["wide"], [])
    assert found["pixel_values"].shape == (1, 3, 32, 32)
    assert found["image_blocks"].tolist() == [[0, 0]]
    assert media.layouts([Part(type="image", value="wide")])[0].runs == (processor.num_image_tokens,)


@pytest.mark.parametrize(("budget", "reads"), [(2**20, 2), (2 * 3 * 32 * 32, 3), (0, 4)], ids=["all", "one", "none"])
def test_videos_are_decoded_once_while_they_fit(model_config: ModelConfig, budget: int, reads: int) -> None:
    _, processor = built(config(model_config, "resize", frames=2))
    read: list[str] = []

    def encoded(key: str) -> bytes:
        read.append(key)
        return TABLE.encoded(key)

    media = StageMedia(
        processor=processor, tile=True, image=TABLE.image, video=encoded, frames=FrameCache(budget=budget)
    )
    keys = [sample.messages[0].content[0].value for number in range(2) for sample in moving_shapes.questions(number)]
    keys = sorted(set(keys))
    expected = processor.video_processor([TABLE.encoded(key) for key in keys])
    for _ in range(2):
        found = media.tensors([], keys)
        assert found.keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in found.items())
    assert len(keys) == 2
    assert len(read) == reads


def test_an_image_is_read_once_for_the_layouts_of_all_its_samples(model_config: ModelConfig) -> None:
    _, processor = built(config(model_config, "dynamic_s2"))
    read: list[str] = []

    def image(key: str) -> Any:
        read.append(key)
        return TABLE.image(key)

    media = StageMedia(processor=processor, tile=True, image=image, video=TABLE.encoded)
    first, again, other = (media.layouts([Part(type="image", value=key)]) for key in ("wide", "wide", "tall"))
    assert first == again != other
    assert read == ["wide", "tall"]


def test_a_stage_sets_frames_and_pooling_from_there_on(model_config: ModelConfig, tmp_path: Path) -> None:
    samples = [sample for number in range(2) for sample in moving_shapes.questions(number)]
    model = config(model_config, "resize", frames=2)
    stages = (stage(), stage(name="two", frames=8, pool_sizes=((4, 1, 1),)), stage(name="three"))
    run = TrainConfig(model=model, stages=stages, backend="torch", attention="eager")
    tokenizer = build_word_tokenizer(WORDS, model_max_length=256)
    train(run, {"clips": samples}, TABLE, tokenizer, tmp_path, videos=TABLE)
    found = [load_model(tmp_path / name)[0].config for name in ("1-one", "2-two", "3-three")]
    assert [one.num_video_frames for one in found] == [2, 8, 8]
    assert [one.video_pool_sizes for one in found] == [[[1, 1, 1]], [[4, 1, 1]], [[4, 1, 1]]]


@pytest.mark.parametrize("tiling", [None, "resize"])
def test_a_token_budget_looks_at_media_as_the_stage_says(
    model_config: ModelConfig, tiling: Tiling | None, tmp_path: Path
) -> None:
    image = vqa_sample(id="1", source="s", image="wide", question="what is it ?", answer="red")
    samples = [image, *moving_shapes.questions(0)]
    model = config(model_config, "dynamic", frames=2)
    one = stage(
        images_per_step=0, batch_tokens=5000, epochs=2.0, steps=0, warmup_ratio=0.1, tiling=tiling, frames=8,
        pool_sizes=((4, 1, 1),),
    )  # fmt: skip
    run = TrainConfig(model=model, stages=(one,), backend="torch", attention="eager")
    tokenizer, seen = build_word_tokenizer(WORDS, model_max_length=256), Steps()
    trained = train(run, {"clips": samples}, TABLE, tokenizer, tmp_path, videos=TABLE, observers=(seen,))
    _, processor = built(model)
    tiles = processor.image_processor.plan(96, 32, tile=tiling is None).num_tiles
    assert (tiles > 1) == (tiling is None)
    # An epoch is one step; each of the other samples shows a clip.
    assert [(step.samples, step.images) for step in seen.records] == [(4, tiles + 8 * (len(samples) - 1))] * 2
    assert load_model(trained)[0].config.num_video_frames == 8


def test_videos_that_are_not_there_are_told(model_config: ModelConfig, tmp_path: Path) -> None:
    one = stage(images_per_step=0, batch_tokens=5000)
    run = TrainConfig(model=config(model_config, "resize"), stages=(one,), backend="torch", attention="eager")
    tokenizer = build_word_tokenizer(WORDS, model_max_length=256)
    with pytest.raises(DataError, match=r"is a video, but there are none"):
        train(run, {"clips": list(moving_shapes.questions(0))}, TABLE, tokenizer, tmp_path)


def test_a_stage_has_a_length_limit_of_its_own(model_config: ModelConfig) -> None:
    _, processor = built(config(model_config, "dynamic"))
    feed = Feed({"clips": [vqa_sample(id="1", source="s", image="wide", question="what ?", answer="red")]}, TABLE)
    groups, _ = feed.stage(stage(), config(model_config, "dynamic"), processor)
    assert len(groups) == 1
    with pytest.raises(Exception, match="more than the limit of 20"):
        feed.stage(stage(max_length=20), config(model_config, "dynamic"), processor)


@pytest.mark.parametrize("number", range(6))
def test_a_clip_shows_what_its_answers_say(number: int) -> None:
    shown = moving_shapes.clip(number)
    frames = load_video(moving_shapes.gif(number), num_frames=moving_shapes.NUM_FRAMES).frames
    assert frames.shape == (moving_shapes.NUM_FRAMES, moving_shapes.SIZE, moving_shapes.SIZE, 3)
    colour = np.array(moving_shapes.COLOURS[shown.colour])
    masks = [np.abs(frame.astype(int) - colour).sum(-1) < 60 for frame in (frames[0], frames[-1])]
    (top, left), (bottom, right) = (np.argwhere(mask).mean(0) for mask in masks)
    moved = np.sign(np.round([right - left, bottom - top]))
    assert tuple(moved) == moving_shapes.DIRECTIONS[shown.direction]
    answers = {sample.source: sample.answer for sample in moving_shapes.questions(number)}
    assert answers == {"clip_direction": shown.direction, "clip_colour": shown.colour, "clip_shape": shown.shape}
    assert moving_shapes.gif(number) == moving_shapes.gif(number)


def test_a_vocabulary_without_room_for_the_tokenizer_is_refused(model_config: ModelConfig) -> None:
    small = replace(model_config, language=dict(model_config.language) | {"vocab_size": 4})
    with pytest.raises(ConfigError, match=r"model\.language\.vocab_size is 4, but the tokenizer has \d+ tokens"):
        built(small)


def test_time_tokens_get_rows(model_config: ModelConfig) -> None:
    made, _ = built(replace(model_config, time_tokens=10))
    assert len(made.config.time_token_ids) == 10
    assert max(made.config.time_token_ids) < made.config.text_config.vocab_size
