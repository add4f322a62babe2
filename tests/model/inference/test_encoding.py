"""The tower works in pieces between the steps of others, and only on what nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.configuration import NVILAConfig
from nvila.data.records import Message, Part
from nvila.data.video import Video
from nvila.inference.engine import Engine, EngineConfig, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

Ask = Callable[..., list[Message]]
Pictures = dict[str, Image.Image]
GREEDY = SamplingParams(max_tokens=16)
FILM = [Message(role="user", content=(Part(type="video", value="film"), Part(type="text", value="what?")))]


@pytest.fixture(scope="module")
def parts() -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    config = NVILAConfig.from_preset("tiny-nvila-video")
    config.text_config.initializer_range = 0.2
    torch.manual_seed(3)
    return NVILAForConditionalGeneration(config).eval(), NVILAProcessor.from_preset("tiny-nvila-video")


@pytest.fixture(scope="module")
def film() -> Video:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 3), dtype=np.uint8)
    return Video(pixels, tuple(float(moment) for moment in range(64)), 64.0)


@contextmanager
def watching(engine: Engine, fail_at: int | None = None) -> Iterator[list[int]]:
    """Note the number of tiles of every call of the tower; one of the calls may fail."""
    seen: list[int] = []

    def look(_: Any, args: Any) -> None:
        seen.append(len(args[0]))
        if len(seen) == fail_at:
            raise RuntimeError("the tower fell")

    hook = engine.model.model.vision_tower.embeddings.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def expected(engine: Engine, messages: list[Message], media: Any, max_tokens: int) -> list[int]:
    inputs = model_inputs(engine.processor, messages, media)
    out = cast("Any", engine.model).generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return [token for token in out[0, inputs["input_ids"].shape[1] :].tolist() if token not in engine.stop_ids]


def test_others_wait_for_one_piece_of_a_long_video_at_a_time(
    parts: tuple[NVILAForConditionalGeneration, NVILAProcessor], film: Video, ask: Ask
) -> None:
    engine = Engine(*parts, EngineConfig(encode_tiles=4))
    other = ask(text="tell me more")
    running = engine.stream(other, {}, SamplingParams(max_tokens=40))
    next(running)
    video = engine.stream(FILM, {"film": film}, GREEDY)
    said: list[int] = []
    hook = engine.model.model.vision_tower.embeddings.register_forward_pre_hook(
        lambda *_: said.append(running.usage.completion_tokens)
    )
    try:
        with watching(engine) as seen:
            list(running)
            assert seen == [4] * 16
            list(video)
            assert seen == [4] * 16
    finally:
        hook.remove()
    # Between two pieces of the video the other one got its token.
    assert said == list(range(said[0], said[0] + 16))
    assert running.token_ids == expected(engine, other, {}, 40)
    assert video.token_ids == expected(engine, FILM, {"film": film}, 16)


def test_a_video_given_up_leaves_no_tiles_behind(
    parts: tuple[NVILAForConditionalGeneration, NVILAProcessor], film: Video, ask: Ask
) -> None:
    engine = Engine(*parts, EngineConfig(encode_tiles=4))
    running = engine.stream(ask(text="tell me more"), {}, SamplingParams(max_tokens=40))
    next(running)
    video = engine.stream(FILM, {"film": film}, GREEDY)
    with watching(engine) as seen:
        next(running)
        next(running)
        assert seen == [4, 4]
        held = engine._variants.encoding
        video.close()
        list(running)
        assert seen == [4, 4]
    assert held
    assert not engine._variants.encoding
    assert engine.stats().media_bytes == 0


def test_a_later_piece_that_fails_is_the_fault_of_its_video_alone(
    parts: tuple[NVILAForConditionalGeneration, NVILAProcessor], film: Video, ask: Ask, pictures: Pictures
) -> None:
    engine = Engine(*parts, EngineConfig(encode_tiles=40))
    media: dict[str, Image.Image | Video] = {"film": film, "a": pictures["a"]}
    # The second call has the rest of the film and the picture; tried alone, only the film fails again.
    with watching(engine, fail_at=3) as seen, watching(engine, fail_at=2):
        video, picture = engine.stream(FILM, media, GREEDY), engine.stream(ask("a"), media, GREEDY)
        list(picture)
        with pytest.raises(RuntimeError, match="the tower fell"):
            list(video)
    assert seen[0] == 40
    assert picture.token_ids == expected(engine, ask("a"), media, 16)
    assert engine.stats().blocks_used == 0


def test_tiles_of_known_pictures_are_not_cut_again(
    build_engine: Callable[..., Engine], ask: Ask, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(blocks=200)
    cut: list[tuple[int, int]] = []
    real: Callable[..., torch.Tensor] = engine.processor.image_processor.tile_levels

    def count(image: Image.Image, plan: Any) -> torch.Tensor:
        cut.append(image.size)
        return real(image, plan)

    monkeypatch.setattr(engine.processor.image_processor, "tile_levels", count)
    list(engine.stream(ask("a"), pictures, GREEDY))
    assert len(cut) == 1
    list(engine.stream(ask("a", text="what shape?"), {"a": pictures["a"].copy()}, GREEDY))
    assert len(cut) == 1
    list(engine.stream(ask("b"), pictures, GREEDY))
    assert len(cut) == 2


def test_a_picture_that_was_forgotten_meanwhile_is_encoded_again(
    build_engine: Callable[..., Engine], generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    room = 4 * 64 * 4  # visual tokens of one picture: 4 of 64 floats
    engine = build_engine(blocks=200, max_running=1, media_cache_bytes=room, prefix_reuse=False)
    list(engine.stream(ask("a"), pictures, GREEDY))
    assert engine.stats().media_bytes == room
    other, again = (engine.stream(ask(key), pictures, GREEDY) for key in "ba")  # `a` is known now, and not when it runs
    list(other)
    list(again)
    assert again.token_ids == generated(ask("a"))


def test_pictures_are_told_apart_by_their_pixels_and_tiling(
    parts: tuple[NVILAForConditionalGeneration, NVILAProcessor], ask: Ask, pictures: Pictures
) -> None:
    engine = Engine(NVILAForConditionalGeneration(_tiled()).eval(), NVILAProcessor.from_preset("tiny-nvila"))
    wide = pictures["a"].resize((150, 50))
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    digests = [
        tuple(medium.digest for medium in engine._variants.base.reader.read(ask(*keys), media)[1])
        for keys, media in (
            ("a", {"a": wide}),
            ("a", {"a": wide.copy()}),
            ("a", {"a": turned}),
            ("aa", {"a": wide}),
        )
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    # Several images are not tiled, so the same picture is another medium then.
    assert digests[3][0] == digests[3][1]
    assert digests[3][0] != digests[0][0]


def _tiled() -> NVILAConfig:
    torch.manual_seed(0)
    return NVILAConfig.from_preset("tiny-nvila")
