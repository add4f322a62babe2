"""NVILA through the classes and calls of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, TextIteratorStreamer, pipeline

import nvila
from nvila._registration import _importing
from nvila.assembly import load_model, save_model
from nvila.image_processing import NVILAImageProcessor
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

CHEAP = (
    "import sys, nvila; heavy = {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules); assert not heavy, heavy"
)
ONE_IMPORT = """
{first}
{second}
from transformers import AutoConfig, AutoProcessor, AutoModelForImageTextToText
path = sys.argv[1]
names = [type(kind.from_pretrained(path)).__name__ for kind in (AutoProcessor, AutoConfig, AutoModelForImageTextToText)]
assert names == ["NVILAProcessor", "NVILAConfig", "NVILAForConditionalGeneration"], names
"""
ORDERS = {
    "nvila-first": ("import sys, nvila", ""),
    "transformers-first": ("import sys, transformers", "import nvila"),
    "auto-first": ("import sys; from transformers import AutoConfig", "import nvila"),
}


def run(code: str, *args: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_import_is_cheap() -> None:
    run(CHEAP)


@pytest.mark.parametrize(
    "order", ["nvila-first", *(pytest.param(name, marks=pytest.mark.slow) for name in list(ORDERS)[1:])]
)
def test_auto_classes_know_nvila_after_one_import(order: str, saved_model: Path) -> None:
    first, second = ORDERS[order]
    run(ONE_IMPORT.format(first=first, second=second), str(saved_model))


def test_package_gives_its_classes() -> None:
    assert nvila.NVILAForConditionalGeneration is NVILAForConditionalGeneration
    assert nvila.NVILAProcessor is NVILAProcessor
    assert {"load", "Image", "Video"} <= set(dir(nvila))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nvila.nothing


def test_image_processor_is_found(saved_model: Path) -> None:
    assert isinstance(AutoImageProcessor.from_pretrained(saved_model), NVILAImageProcessor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_type_and_device_are_chosen_on_loading(
    device_map: str | None,
    dtype: torch.dtype,
    saved_model: Path,
    processor: NVILAProcessor,
    pictures: dict[str, Image.Image],
) -> None:
    if device_map is not None:
        pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    model: Any = AutoModelForImageTextToText.from_pretrained(
        saved_model, dtype=dtype, device_map=device_map, attn_implementation="eager"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"
    inputs = processor(pictures["a"], "<image>what color?").to(dtype=dtype)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2


def test_streamer_gives_the_text_that_generate_returns(
    model: Any, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    inputs = processor(pictures["a"], "<image>what color is the shape?")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 6, "do_sample": False}
    thread = Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert streamed.split() == processor.tokenizer.decode(ids).split()
    assert streamed


def test_sampling_depends_on_the_seed_only(
    model: Any, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    inputs = processor(pictures["a"], "<image>what color?")
    drawn = []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, do_sample=True, temperature=2.0, top_p=0.95, max_new_tokens=6).tolist())
    assert drawn[0] == drawn[3]
    assert len({str(one) for one in drawn}) > 1


def test_pipeline_answers_chats(
    saved_model: Path, model: Any, processor: NVILAProcessor, pictures: dict[str, Image.Image]
) -> None:
    pipe: Any = pipeline("image-text-to-text", model=str(saved_model), device="cpu")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pictures["a"]}, {"type": "text", "text": "what color?"}],
        }
    ]
    answer = pipe(text=messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"].split() == processor.tokenizer.decode(ids, skip_special_tokens=True).split()
    plain = pipe(images=pictures["a"], text="<image>what color?", max_new_tokens=2)
    assert plain[0]["generated_text"].startswith("<image>what color?")


@pytest.mark.parametrize("preset", ["tiny-nvila-lite", "tiny-nvila"])
def test_batches_of_images_with_different_tiles_are_answered_as_one_by_one(
    preset: str, pictures: dict[str, Image.Image], tmp_path: Path
) -> None:
    config = nvila.NVILAConfig.from_preset(preset)
    config.text_config.initializer_range = 0.2
    torch.manual_seed(0)
    save_model(NVILAForConditionalGeneration(config), NVILAProcessor.from_preset(preset), tmp_path)
    model, processor = load_model(tmp_path)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in (
            (pictures["a"], "what?"),
            (pictures["b"].resize((200, 30)), "and what is this?"),
            (pictures["c"].resize((30, 90)), ""),
        )
    ]
    tiles = {len(chat_inputs(processor, [chat])["pixel_values"]) for chat in chats}
    assert len(tiles) > 1
    options = {"max_new_tokens": 5, "do_sample": False}

    def answers(*some: Any) -> list[str]:
        inputs = chat_inputs(processor, list(some))
        ids = cast("Any", model).generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return list(processor.tokenizer.batch_decode(ids, skip_special_tokens=True))

    expected = [answer for chat in chats for answer in answers(chat)]
    assert answers(*chats) == expected
    pipe: Any = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    for size in (1, 2, 3):
        said = pipe(text=chats, batch_size=size, return_full_text=False, generate_kwargs=options)
        assert [one[0]["generated_text"] for one in said] == expected


def chat_inputs(processor: NVILAProcessor, chats: list[Any]) -> Any:
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)


def test_registration_bears_imports_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that imports something when it is looked at stands for the thread that does so at that moment."""

    class Importing(str):
        def startswith(self, *args: Any) -> bool:
            monkeypatch.setitem(sys.modules, "imported_meanwhile", ModuleType("imported_meanwhile"))
            return super().startswith(*args)

    monkeypatch.setitem(sys.modules, Importing("looked_at"), ModuleType("looked_at"))
    assert not _importing()
    assert "imported_meanwhile" in sys.modules
