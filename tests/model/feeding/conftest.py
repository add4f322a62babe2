"""A folder of mixed training data: texts, one image, several images, a video."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from nvila.configuration import NVILAConfig
    from nvila.data.feeding import BatchFeed
    from nvila.processing import NVILAProcessor

WORDS = ("what is in the picture compare watch describe red blue green a long answer about it", "yes no image video")
MODES: Mapping[str, Mapping[str, Any]] = {
    "resize": {},
    "dynamic": {"image_aspect_ratio": "dynamic", "mm_projector_type": "mlp_downsample_3x3_fix", "max_tiles": 4},
    "dynamic_s2": {"image_aspect_ratio": "dynamic_s2", "s2_scales": [16, 32], "max_tiles": 6},
}
SIZES = ((40, 30), (16, 16), (60, 20), (20, 60), (33, 21))


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    from nvila.data.tokenizers import build_word_tokenizer

    return build_word_tokenizer(WORDS, model_max_length=4096)


@pytest.fixture(scope="session")
def config_of(words: PreTrainedTokenizerFast) -> Callable[[str], NVILAConfig]:
    def build(mode: str) -> NVILAConfig:
        from nvila.configuration import NVILAConfig
        from nvila.data.tokenizers import token_id

        return NVILAConfig(
            vision_config={
                "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "vision_use_head": False,
            },
            text_config={
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "vocab_size": len(words), "pad_token_id": words.pad_token_id,
                "initializer_range": 0.2,
            },
            image_token_id=token_id(words, "<image>"),
            video_token_id=token_id(words, "<vila/video>"),
            num_video_frames=4,
            video_pool_sizes=[[2, 1, 1]],
            **MODES[mode],
        )  # fmt: skip

    return build


@pytest.fixture(scope="session")
def processor_of(
    config_of: Callable[[str], NVILAConfig], words: PreTrainedTokenizerFast
) -> Callable[[str], NVILAProcessor]:
    def build(mode: str) -> NVILAProcessor:
        from nvila.processing import NVILAProcessor

        return NVILAProcessor.from_config(config_of(mode), words)

    return build


def png(size: tuple[int, int], seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    out = BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(out, "PNG")
    return out.getvalue()


def mp4(seed: int, frames: int = 6) -> bytes:
    import av
    import numpy as np

    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for number in range(frames):
            level = np.full((32, 32, 3), 20 * seed + 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def records() -> list[dict[str, Any]]:
    """Twenty samples; two out of five share an image with another."""
    made: list[dict[str, Any]] = []
    for number in range(20):
        image = f"{number // 2 % 5}.png"
        kinds: dict[int, dict[str, Any]] = {
            0: {"image": image, "conversations": turns("<image>what is in the picture?", "a red")},
            1: {
                "image": image,
                "conversations": turns("<image>describe it", "a long answer about it " * (1 + number % 4)),
            },
            2: {"conversations": turns("what is red?", "green " * (1 + number))},
            3: {"image": [image, "4.png"], "conversations": turns("<image><image>compare it", "yes blue")},
            4: {"video": f"{number // 5}.mp4", "conversations": turns("<video>watch it", "no")},
        }
        made.append({"id": f"r{number}", **kinds[number % 5]})
    made[1]["conversations"] = turns("<image>describe it", "a")
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The data on disk."""
    directory = tmp_path / "mixed"
    directory.mkdir()
    for number, size in enumerate(SIZES):
        (directory / f"{number}.png").write_bytes(png(size, number))
    for number in range(4):
        (directory / f"{number}.mp4").write_bytes(mp4(number))
    lines = [json.dumps(record) for record in records()]
    (directory / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def open_feed(processor_of: Callable[[str], NVILAProcessor], folder: Path, tmp_path: Path) -> Any:
    """Open the folder, or another expression, with changed settings."""
    opened: list[BatchFeed] = []

    def open_(
        expression: str | None = None, *, mode: str = "dynamic", rank: int = 0, world: int = 1, **changes: Any
    ) -> BatchFeed:
        from nvila.data.mixtures import Registry
        from nvila.data.stage_data import StageData, open_stage_data
        from nvila.data.token_budget import TokenBudget

        budget: dict[str, Any] = {"batch_tokens": 400, "micro_batch_tokens": 150, "max_length": 150, "pack": True}
        budget |= {name: changes.pop(name) for name in list(changes) if name in TokenBudget.__dataclass_fields__}
        reporter = {"reporter": changes.pop("reporter")} if "reporter" in changes else {}
        stage = StageData(expression=expression or str(folder / "data.jsonl"), budget=TokenBudget(**budget), **changes)
        stream = Registry().open(stage.expression)
        feed = open_stage_data(
            stage, stream, processor_of(mode), tmp_path / "index", rank=rank, world=world, **reporter
        )
        opened.append(feed)
        return feed

    yield open_
    for feed in opened:
        feed.close()
