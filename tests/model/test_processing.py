from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nvila.data.records import Message, Part
from nvila.errors import DataError
from nvila.image_processing import NVILAImageProcessor
from nvila.processing import NVILAProcessor


def test_images_are_resized_to_a_square_and_scaled_to_one(processor: NVILAProcessor) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pixels = processor.pixel_values([picture])
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == torch.float32
    columns_first = picture.resize((32, 50), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    resized = np.asarray(columns_first, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels[0].numpy(), resized, atol=2 / 127.5 + 1e-5)
    assert (np.abs(pixels[0].numpy() - resized) > 1e-5).mean() < 0.02


@pytest.mark.parametrize(("color", "value"), [((0, 0, 0), -1.0), ((255, 255, 255), 1.0)])
def test_range_of_pixels(color: tuple[int, int, int], value: float, processor: NVILAProcessor) -> None:
    pixels = processor.pixel_values([Image.new("RGB", (5, 9), color)])
    torch.testing.assert_close(pixels, torch.full((1, 3, 32, 32), value))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_image_modes_become_rgb(mode: str, processor: NVILAProcessor) -> None:
    assert processor.pixel_values([Image.new(mode, (9, 9))]).shape == (1, 3, 32, 32)


def test_tile_size_follows_the_tower() -> None:
    processor = NVILAImageProcessor(size={"height": 48, "width": 48})
    out = processor(images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 48, 48)


def test_each_marker_becomes_visual_tokens_and_a_line_feed(
    processor: NVILAProcessor, tokenizer: PreTrainedTokenizerFast, pictures: dict[str, Image.Image]
) -> None:
    out = processor([pictures["a"], pictures["b"]], "<image>red<image>blue")
    assert tokenizer.convert_ids_to_tokens(out["input_ids"][0].tolist()) == [
        *["<image>"] * 4, "\n", "red", *["<image>"] * 4, "\n", "blue",
    ]  # fmt: skip
    assert set(out) == {"input_ids", "attention_mask", "pixel_values"}
    torch.testing.assert_close(out["pixel_values"], processor.pixel_values([pictures["a"], pictures["b"]]))


def test_texts_of_different_length_are_padded(processor: NVILAProcessor, pictures: dict[str, Image.Image]) -> None:
    out = processor(pictures["a"], ["<image>red", "blue"])
    assert out["input_ids"].shape == (2, 6)
    assert out["attention_mask"].sum(1).tolist() == [6, 1]


@pytest.mark.parametrize(("text", "images", "message"), [("<image>", 0, "1 image markers but 0"), ("x", 1, "0 image")])
def test_markers_and_images_must_agree(
    text: str, images: int, message: str, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    with pytest.raises(DataError, match=message):
        processor([pictures["a"]] * images, text)


def test_prompt_ids_are_those_of_the_rendered_text(
    processor: NVILAProcessor, tokenizer: PreTrainedTokenizerFast, pictures: dict[str, Image.Image]
) -> None:
    content = (Part(type="image", value="a"), Part(type="text", value="what color?"))
    messages = [Message(role="user", content=content)]
    text = "<|im_start|>user\n<image>what color?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.prompt_ids(messages) == processor(pictures["a"], text)["input_ids"][0].tolist()


def test_processor_comes_back_from_disk(
    processor: NVILAProcessor, pictures: dict[str, Image.Image], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    loaded = NVILAProcessor.from_pretrained(tmp_path)
    assert loaded.num_image_tokens == 4
    ours, theirs = (one(pictures["a"], "<image>is there a circle?") for one in (processor, loaded))
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert loaded.chat_template == processor.chat_template
