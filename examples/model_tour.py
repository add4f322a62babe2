"""A tour of the model in one file: an image, several images, a video, a streamed chat, and other checkpoint layouts.

It runs on a laptop in a few seconds, because the model is a tiny twin of a published variant: every mechanism is there,
the weights are random, and so are its answers. Put a converted checkpoint in place of the folder of part 4 to get real
ones.

    python examples/model_tour.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import nvila
from nvila import NVILAConfig, NVILAForConditionalGeneration, NVILAProcessor
from nvila.checkpoints import convert

PROMPT = "Which way does the dot go?"


def main() -> None:
    """Walk through the parts; each prints what it found."""
    torch.set_num_threads(1)
    model, processor = build("tiny-nvila")
    one_image(model, processor)
    several_images(model, processor)
    a_video()
    with tempfile.TemporaryDirectory() as folder:
        a_chat(model, processor, Path(folder) / "model")
        other_layouts(Path(folder))


def build(preset: str) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Build a preset with random weights."""
    torch.manual_seed(0)
    model = NVILAForConditionalGeneration(NVILAConfig.from_preset(preset)).eval()
    return model, NVILAProcessor.from_preset(preset)


def picture(dot_at: float, size: tuple[int, int] = (160, 100)) -> Image.Image:
    """Draw a dot on a pale ground, `dot_at` of the way from left to right."""
    image = Image.new("RGB", size, "ivory")
    x, y = int(dot_at * size[0]), size[1] // 2
    ImageDraw.Draw(image).ellipse((x - 12, y - 12, x + 12, y + 12), fill="crimson")
    return image


def one_image(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
    """Part 1: one image becomes tiles at three scales, and those become visual tokens."""
    image = picture(0.3)
    inputs = processor(images=image, text=f"<image>{PROMPT}")
    with torch.no_grad():
        logits = model(**inputs).logits
    count = processor.count_tokens(image_sizes=[image.size], text=f"<image>{PROMPT}")
    assert count.total == inputs["input_ids"].shape[1] == logits.shape[1]
    grids = " + ".join(f"{columns}x{rows}" for columns, rows in count.tiles[0])
    print(f"1. one image of {image.width}x{image.height}: tiles {grids}, {count.visual} visual tokens of {count.total}")


def several_images(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
    """Part 2: images among text, in the order of the message; several of them get one tile each."""
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "Before:"},
            {"type": "image", "image": picture(0.2)},
            {"type": "text", "text": "After:"},
            {"type": "image", "image": picture(0.8)},
            {"type": "text", "text": PROMPT},
        ],
    }
    inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)  # type: ignore[misc]  # transformers' own type
    answer = ids[0, length:]
    tiles, tokens = len(inputs["pixel_values"]), answer.tolist()
    print(f"2. two images: {tiles} tiles in a prompt of {length} tokens, answered with the tokens {tokens}")


def a_video() -> None:
    """Part 3: a video becomes frames, and their tokens are averaged over time."""
    model, processor = build("tiny-nvila-video")
    frames = [picture(step / 15) for step in range(16)]
    inputs = processor(videos=[frames], text=f"<vila/video>{PROMPT}")
    with torch.no_grad():
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_frames"])
    pooling = model.config.video_pool_sizes
    count = processor.count_tokens(video_frames=[len(frames)])
    assert count.visual == len(features)
    print(f"3. a video of {len(frames)} frames, pooled by {pooling}: {count.visual} visual tokens")


def a_chat(model: NVILAForConditionalGeneration, processor: NVILAProcessor, folder: Path) -> None:
    """Part 4: save, load with one call, and read an answer while it is written."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    chat = nvila.load(folder)
    pieces = list(chat.chat([nvila.Image(picture(0.5)), PROMPT], stream=True, max_new_tokens=6))
    print(f"4. a streamed answer in {len(pieces)} pieces: {''.join(pieces)!r}")


def other_layouts(folder: Path) -> None:
    """Part 5: to the layout of the published checkpoints and back, without changing a bit."""
    convert(folder / "model", folder / "original", "vila")
    convert(folder / "original", folder / "again", "nvila")
    before, after = (nvila.load(folder / name).model.state_dict() for name in ("model", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    parts = sorted(path.name for path in (folder / "original").iterdir() if path.is_dir())
    print(f"5. converted to {', '.join(parts)} and back: {len(before)} tensors, all equal")


if __name__ == "__main__":
    main()
