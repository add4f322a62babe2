"""Tiles, videos, chats and counts: what the processor makes is what it counted and what the model takes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nvila.configuration import NVILAConfig
from nvila.data.tokenizers import build_word_tokenizer
from nvila.errors import ConfigError, DataError
from nvila.image_processing import NVILAImageProcessor
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.vision.tiling import Grid

WORDS = ("what is in the picture compare watch describe", "system user assistant yes no image < > / vila video |")
VISION = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
MODES: dict[str, dict[str, Any]] = {
    "resize": {"image_aspect_ratio": "resize"},
    "pad": {"image_aspect_ratio": "pad"},
    "dynamic": {"image_aspect_ratio": "dynamic", "mm_projector_type": "mlp_downsample_3x3_fix"},
    "dynamic_s2": {"image_aspect_ratio": "dynamic_s2"},
}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return build_word_tokenizer(WORDS, model_max_length=4096)


def config_of(words: PreTrainedTokenizerFast, mode: str, **kwargs: Any) -> NVILAConfig:
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(words),
    }
    return NVILAConfig(
        vision_config=dict(VISION),
        text_config=text,
        image_token_id=cast("int", words.convert_tokens_to_ids("<image>")),
        video_token_id=cast("int", words.convert_tokens_to_ids("<vila/video>")),
        **{**MODES[mode], **kwargs},
    )


def processor_of(words: PreTrainedTokenizerFast, mode: str, **kwargs: Any) -> NVILAProcessor:
    return NVILAProcessor.from_config(config_of(words, mode, **kwargs), words)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames: int = 4) -> list[Image.Image]:
    return [picture(20, 12, seed) for seed in range(frames)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[(40, 30)], [(40, 30), (16, 16)], [(1, 1)], [(1, 20000)], [(20000, 1)]])
def test_counts_agree_with_the_processor_and_the_model(
    mode: str, sizes: list[tuple[int, int]], words: PreTrainedTokenizerFast
) -> None:
    processor = processor_of(words, mode, video_pool_sizes=[[2, 1, 1]])
    text = "<image>" * len(sizes) + "<vila/video>what is in the picture?"
    inputs = processor([picture(*size) for size in sizes], text, clip(), num_frames=4)
    count = processor.count_tokens(image_sizes=sizes, video_frames=[4], text=text)
    ids = inputs["input_ids"][0]
    placeholders = torch.isin(ids, torch.tensor(words.convert_tokens_to_ids(["<image>", "<vila/video>"])))
    assert (count.total, count.visual) == (len(ids), int(placeholders.sum()))
    assert count.text == count.total - count.visual
    assert sum(grid.num_tiles for grids in count.tiles for grid in grids) == len(inputs["pixel_values"])
    model = NVILAForConditionalGeneration(config_of(words, mode, video_pool_sizes=[[2, 1, 1]]))
    assert model(**inputs).logits.shape[1] == count.total


@pytest.mark.parametrize(
    ("preset", "size", "grids", "visual", "total"),
    [
        ("nvila-lite-8b", (448, 448), [Grid(1, 1)], 121, 123),
        ("nvila-lite-8b", (1000, 1000), [Grid(3, 3), Grid(1, 1)], 1210, 1230),
        ("nvila-lite-8b", (640, 480), [Grid(4, 3), Grid(1, 1)], 1573, 1599),
        ("nvila-8b", (336, 336), [Grid(1, 1), Grid(2, 2), Grid(3, 3)], 2304, 2305),
        ("nvila-8b", (2000, 1000), [Grid(1, 1), Grid(2, 2), Grid(5, 2)], 2560, 2561),
        ("nvila-8b", (1920, 1080), [Grid(1, 1), Grid(2, 2), Grid(4, 3)], 3072, 3073),
    ],
)
def test_counts_of_released_variants(
    preset: str, size: tuple[int, int], grids: list[Grid], visual: int, total: int
) -> None:
    count = NVILAProcessor.from_preset(preset).count_tokens(image_sizes=[size])
    assert (list(count.tiles[0]), count.visual, count.total) == (grids, visual, total)


def test_counts_of_the_released_video_variant() -> None:
    processor = NVILAProcessor.from_preset("nvila-8b-video")
    count = processor.count_tokens(video_frames=[256, 32])
    assert (count.visual, count.total) == (8192 + 1024, 8224 + 4 * 257)
    with pytest.raises(ConfigError, match=r"\[8, 1, 1\] does not divide 12 frames"):
        processor.count_tokens(video_frames=[12])


def test_several_images_are_tiled_only_on_request(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "dynamic_s2")
    images = [picture(), picture(16, 40)]
    inputs = processor(images, "<image><image>compare")
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert inputs["image_blocks"].tolist() == [[0, 0], [0, 0]]
    tiled = processor(images, "<image><image>compare", tile_all=True)
    assert tiled["image_blocks"].tolist() == [[4, 3], [2, 5]]
    assert len(tiled["pixel_values"]) == 5 + 12 + 5 + 10
    one_each = processor([[images[0]], [images[1]]], ["<image>compare", "<image>compare"])
    assert one_each["image_blocks"].tolist() == [[4, 3], [2, 5]]


def test_tiles_of_dynamic_are_closed_one_by_one(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "dynamic", max_tiles=2)
    tokens = words.convert_ids_to_tokens(processor(picture(40, 20), "<image>what")["input_ids"][0].tolist())
    assert tokens == [*(["<image>"] * 4 + ["\n", "\n"]) * 3, "what"]


def test_frames_are_pooled_and_closed_one_by_one(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize", video_pool_sizes=[[2, 1, 1], [4, 2, 2]])
    inputs = processor(text="<vila/video>watch", videos=clip(4), num_frames=4)
    tokens = words.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens == [*(["<vila/video>"] * 4 + ["\n"]) * 2, "<vila/video>", "\n", "watch"]
    assert inputs["pixel_values_videos"].shape == (4, 3, 16, 16)
    expected = NVILAImageProcessor(size={"height": 16, "width": 16})(clip(4))["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values_videos"], expected)


def chat(*content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(content)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_chat_keeps_images_and_videos_in_order(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    processor = processor_of(words, "resize")
    path = tmp_path / "a.png"
    picture(seed=7).save(path)
    data = io.BytesIO()
    picture(seed=8).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    messages = chat(
        {"type": "image", "path": str(path)},
        text("compare"),
        {"type": "video", "video": clip(2)},
        {"type": "image_url", "image_url": {"url": url}},
        text("what"),
        {"type": "image", "image": picture(seed=9)},
    )
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, num_frames=2
    )
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\n<image>compare<vila/video><image>what<image><|im_end|>\n<|im_start|>assistant\n"
    )
    by_hand = processor([picture(seed=seed) for seed in (7, 8, 9)], rendered, [clip(2)], num_frames=2)
    assert by_hand.keys() == inputs.keys()
    for name, tensor in inputs.items():
        assert torch.equal(tensor, by_hand[name]), name


def test_markers_that_a_user_writes_stay_text(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize")
    written = "what is <image> and <|im_end|> <vila/video>"
    messages = chat({"type": "image", "image": picture()}, text(written))
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = words.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens.count("<image>") == 4
    assert tokens.count("<|im_end|>") == 1
    assert "<vila/video>" not in tokens
    assert [token for token in tokens if token in ("<", "image", ">")] == ["<", "image", ">", "<", ">", "<", ">"]
    assert written in processor.apply_chat_template(messages)


def test_batches_of_chats_are_padded_on_the_left_to_be_answered(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize")
    batch = [chat({"type": "image", "image": picture()}, text("what")), chat(text("yes"))]
    inputs = processor.apply_chat_template(batch, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["input_ids"][1, 0] == words.pad_token_id
    alone = processor.apply_chat_template(batch[1], add_generation_prompt=True, tokenize=True)
    assert inputs["input_ids"][1, -alone.shape[1] :].tolist() == alone[0].tolist()
    whole = processor.apply_chat_template(batch, tokenize=True, return_dict=True)
    assert whole["attention_mask"][1, -1] == 0
    assert isinstance(processor.apply_chat_template(batch), list)


def test_last_message_can_be_left_open(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize")
    messages = chat(text("what?")) + chat(text("yes the"), role="assistant")
    opened = processor.apply_chat_template(messages, continue_final_message=True)
    assert opened.endswith("<|im_start|>assistant\nyes the")
    ids = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_tensors=None)
    assert words.convert_ids_to_tokens(ids[0])[-2:] == ["yes", "the"]
    with pytest.raises(DataError, match="last message is not the assistant's"):
        processor.apply_chat_template(chat(text("what?")), continue_final_message=True)


def test_template_and_its_variables_can_be_given(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize")
    template = "{% for m in messages %}{{ m.content[0].text }}{{ mood }}{% endfor %}"
    assert processor.apply_chat_template(chat(text("what")), chat_template=template, mood="!") == "what!"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'"),
        (chat({"type": "audio"}), "part 0 of message 0 is of kind 'audio'"),
        (chat(text("x"), 7), "part 1 of message 0 is of kind 'int'"),
        (chat({"type": "image"}), "part 0 of message 0 holds no image"),
        (chat({"type": "image", "base64": "!"}), "part 0 of message 0 is no base64"),
        (chat({"type": "image", "path": "missing.png"}), r"missing\.png does not exist"),
    ],
)
def test_broken_messages_are_refused(
    messages: list[dict[str, Any]], message: str, words: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        processor_of(words, "resize").apply_chat_template(messages, tokenize=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "<image>"}, "1 image markers but 0 images"),
        ({"text": "<vila/video>"}, "1 video markers but 0 videos"),
        ({"text": "what", "videos": clip()}, "0 video markers but 1 videos"),
        ({"text": "what", "colour": 1}, "no argument 'colour'"),
        ({"text": ["what", "what is"], "padding": False}, "rows of different length"),
        ({"text": "what<image>", "images": picture(), "truncation": True, "max_length": 3}, "loses 2 visual tokens"),
        ({"text": "<image>", "images": np.full((4, 4, 3), np.nan, np.float32)}, "that are no numbers"),
    ],
)
def test_broken_calls_are_refused(kwargs: dict[str, Any], message: str, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=message):
        processor_of(words, "resize")(**kwargs)


def test_rows_are_padded_and_cut_as_asked(words: PreTrainedTokenizerFast) -> None:
    processor = processor_of(words, "resize")
    texts = ["what is", "yes"]
    left = processor(text=texts, pad_to_multiple_of=4)
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    right = processor(text=texts, padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    fixed = processor(text=texts, padding="max_length", max_length=3)
    assert fixed["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1]]
    cut = processor(text="what is in the picture", truncation=True, max_length=2, return_tensors=None)
    assert [len(row) for row in cut["input_ids"]] == [2]


def test_tokenizer_without_pad_still_batches(words: PreTrainedTokenizerFast) -> None:
    bare = build_word_tokenizer(WORDS, model_max_length=64)
    bare.pad_token = None
    processor = processor_of(bare, "resize")
    assert processor(text=["what is", "yes"])["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_settings_come_back_from_disk(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    processor = processor_of(words, "dynamic_s2", video_pool_sizes=[[2, 1, 1]], num_video_frames=4, fps=2.0)
    processor.save_pretrained(tmp_path)
    loaded = NVILAProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
    assert (loaded.video_processor.num_frames, loaded.video_processor.fps) == (4, 2.0)
    assert loaded.video_pool_sizes == [[2, 1, 1]]
    assert loaded.count_tokens([(40, 30)], [4]) == processor.count_tokens([(40, 30)], [4])
    assert set(loaded.model_input_names) >= {"input_ids", "pixel_values", "image_blocks", "video_frames"}


def test_saved_siglip_processor_is_read_as_resize() -> None:
    raw = {"image_processor_type": "SiglipImageProcessorPil", "size": {"height": 32, "width": 32}, "do_resize": True}
    processor = NVILAImageProcessor.from_saved(raw)
    assert (processor.tile_size, processor.image_aspect_ratio) == (32, "resize")
