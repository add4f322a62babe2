"""Scorers of every variant: the likelihood that the processor and one forward pass give, for any conversation."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.configuration import NVILAConfig
from nvila.curation.encoding import score_all
from nvila.curation.problems import Problem
from nvila.curation.scorers import load_scorer, sampling_of
from nvila.curation.scoring import AnswerScore
from nvila.curation.windows import FrameSampling, Window, windows
from nvila.data.conversation import Encoded
from nvila.data.readers.record import Record
from nvila.data.records import Message, Part, Sample
from nvila.errors import CheckpointError, ResourceError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

MAX_TOKENS = 4096
TURN_END = "<|im_end|>"


@pytest.fixture(scope="module", params=["tiny-nvila-lite", "tiny-nvila", "tiny-nvila-video"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny twin of a published variant with random weights."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    config = NVILAConfig.from_preset(request.param)
    config.text_config.initializer_range = 0.2
    NVILAForConditionalGeneration(config).save_pretrained(folder)
    NVILAProcessor.from_preset(request.param).save_pretrained(folder)
    return folder


def png(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def film() -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            frame = np.full((48, 64, 3), 12 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


class Source:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        return self.data


CONVERSATIONS: dict[str, list[tuple[str, list[str]]]] = {
    "image": [("user", ["<wide.png>", "what is it?"]), ("assistant", ["a wide one"])],
    "same-image": [("user", ["<wide.png>", "is it red?"]), ("assistant", ["no"])],
    "two-images": [("user", ["<wide.png>", "<tall.png>", "which is taller?"]), ("assistant", ["the second"])],
    "turns": [
        ("system", ["be short"]),
        ("user", ["<tall.png>", "one?"]),
        ("assistant", ["first answer"]),
        ("user", ["two?"]),
        ("assistant", ["second answer"]),
    ],
    "text": [("user", ["no picture at all"]), ("assistant", ["just text\nin two lines"])],
    "video": [("user", ["<film.mp4>", "what happens?"]), ("assistant", ["it gets brighter"])],
    "image-behind": [("user", ["look: ", "<tall.png>"]), ("assistant", ["a tall one"])],
}


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
    return {"wide.png": png(150, 70, 1), "tall.png": png(40, 90, 2), "film.mp4": film()}


def records(media: dict[str, bytes], names: Sequence[str]) -> Iterator[Record]:
    for index, name in enumerate(names):
        used: set[str] = set()
        messages = []
        for role, pieces in CONVERSATIONS[name]:
            parts = []
            for piece in pieces:
                key = piece.strip("<>")
                kind = "text" if key not in media else "video" if key.endswith("mp4") else "image"
                used |= {key} - {piece}
                parts.append(Part(type=kind, value=key if kind != "text" else piece))  # type: ignore[arg-type]
            messages.append(Message(role=role, content=tuple(parts)))  # type: ignore[arg-type]
        sample = Sample(id=name, source="s", messages=tuple(messages))
        sources = {key: Source(media[key]) for key in used}
        yield Record(index=index, where=f"memory:{index}", sample=sample, media=sources)


def window_of(scorer: Any, rows: Iterator[Record]) -> Window:
    (window,) = windows(rows, frozenset({scorer.sampling} - {None}))
    return window


def expected(scorer: Any, record: Record, media: dict[str, bytes]) -> float:
    """The likelihood from the processor's own rendering and one forward pass with logits."""
    assert record.sample is not None
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.value}
                if part.type == "text"
                else {"type": part.type, part.type: io.BytesIO(media[part.value])}
                for part in message.content
            ],
        }
        for message in record.sample.messages
    ]
    inputs = scorer.processor.apply_chat_template(chat, tokenize=True, return_dict=True, tile_all=True)
    with torch.inference_mode():
        logits = scorer.model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    total, start = 0.0, 0
    for message in record.sample.messages:
        if message.role == "assistant":
            answer = scorer.processor.tokenizer(message.text + TURN_END, add_special_tokens=False)["input_ids"]
            start = next(i for i in range(start, len(ids)) if ids[i : i + len(answer)] == answer)
            total -= sum(float(logits[start + i - 1, token]) for i, token in enumerate(answer))
            start += len(answer)
    return total


def test_every_conversation_is_scored_as_the_processor_prepares_it(variant: Path, media: dict[str, bytes]) -> None:
    scorer = load_scorer(variant, dtype="fp32", device="cpu")
    window = window_of(scorer, records(media, list(CONVERSATIONS)))
    found = scorer.score(window, MAX_TOKENS)
    for name, record, score in zip(CONVERSATIONS, records(media, list(CONVERSATIONS)), found, strict=True):
        assert isinstance(score, AnswerScore), (name, score)
        assert score.nll == pytest.approx(expected(scorer, record, media), rel=2e-4), name


def test_how_videos_are_sampled_is_known_without_the_weights(variant: Path, text_model: Path) -> None:
    frames = 16 if "video" in variant.parent.name else 8
    assert sampling_of(variant) == FrameSampling(frames, 0.0)
    assert sampling_of(text_model) is None


def test_bf16_is_close_to_fp32(variant: Path, media: dict[str, bytes]) -> None:
    exact, rounded = (load_scorer(variant, dtype=dtype, device="cpu") for dtype in ("fp32", "bf16"))
    window = window_of(exact, records(media, ["text", "image"]))
    for one, other in zip(exact.score(window, MAX_TOKENS), rounded.score(window, MAX_TOKENS), strict=True):
        assert isinstance(one, AnswerScore)
        assert isinstance(other, AnswerScore)
        assert other.nll != one.nll
        assert other.nll == pytest.approx(one.nll, rel=0.1)


def test_a_language_model_scores_text_and_nothing_else(text_model: Path, media: dict[str, bytes]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scorer = load_scorer(text_model, dtype="fp32", device="cpu")
    text, image, turns = scorer.score(window_of(scorer, records(media, ["text", "image", "turns"])), MAX_TOKENS)
    assert image == Problem(status="bad_media", reason="a language model takes no images and videos")
    assert isinstance(turns, Problem)
    assert isinstance(text, AnswerScore)
    # Without a chat template the turns are lines, the answer's closed by the end token.
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    question = tokenizer("<s>no picture at all\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer("just text\nin two lines</s>", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(text_model)(torch.tensor([question + answer])).logits[0]
    chosen = logits.log_softmax(-1)[len(question) - 1 : -1][torch.arange(len(answer)), torch.tensor(answer)]
    assert text.nll == pytest.approx(-float(chosen.sum()), rel=1e-4)
    assert text.num_tokens == len(answer)


def test_templates_of_language_models_get_texts(text_model: Path, tmp_path: Path, media: dict[str, bytes]) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    # As most language models write it; a list of parts would be an error here.
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    scorer = load_scorer(folder, dtype="fp32", device="cpu")
    (found,) = scorer.score(window_of(scorer, records(media, ["text"])), MAX_TOKENS)
    assert isinstance(found, AnswerScore)
    assert found.num_tokens == len("just text\nin two lines")


@pytest.mark.parametrize(
    ("break_model", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{broken"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'), "no language model in"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "no language model in"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors weights"),
        (lambda folder: (folder / "pytorch_model.bin").touch(), "can execute code on load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no language model in"),
    ],
    ids=["config", "kind", "weights", "no-weights", "pickle", "tokenizer"],
)
def test_what_is_no_model_is_named(break_model: Any, message: str, text_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    break_model(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_scorer(folder, dtype="fp32", device="cpu")
    assert "\n" not in refused.value.message


def test_too_little_memory_names_the_setting() -> None:
    def score(rows: Any) -> list[AnswerScore]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoded = Encoded(ids=(1, 2), labels=(-100, 2), images=(), media_end=0)
    with pytest.raises(ResourceError, match="a batch of 64 tokens does not fit") as failed:
        score_all([encoded], 64, score)
    assert failed.value.hint == "lower --batch-tokens"
