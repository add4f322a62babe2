"""A second, smaller model, a tiny language model, and data sets in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.readers.record import MediaSource, Record
from nvila.data.records import Sample, vqa_sample
from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast

    from nvila.training.config import ModelConfig

QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a red circle?")
ANSWERS = ("red", "blue", "circle", "a red circle", "yes", "no", "the green triangle")


@dataclass
class Bytes:
    """Media bytes in memory, or the error that reading them gives; counts how often it was read."""

    data: bytes | None
    reads: list[int] = field(default_factory=list)

    def read(self) -> bytes:
        self.reads.append(1)
        if self.data is None:
            raise DataError("images/gone.png does not exist", "check the path")
        return self.data


@dataclass
class MemoryStream:
    """Records in memory behind the interface of the readers."""

    rows: Sequence[tuple[Sample | None, Mapping[str, MediaSource], str | None]]
    name: str = "memory"

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        for index, (sample, media, problem) in list(enumerate(self.rows))[start:stop]:
            yield Record(index=index, where=f"{self.name}:{index + 1}", sample=sample, media=media, problem=problem)


@pytest.fixture(scope="session")
def encoded_pictures(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    encoded = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded[name] = buffer.getvalue()
    return encoded


@pytest.fixture
def vqa_stream(encoded_pictures: dict[str, bytes]) -> Any:
    """Make a data set of questions about pictures, three to each, with sources a and b."""

    def make(size: int, *changed: tuple[int, tuple[Sample | None, Mapping[str, MediaSource], str | None]]) -> Any:
        names = list(encoded_pictures)
        rows: list[Any] = []
        for index in range(size):
            name = names[index // 3 % len(names)]
            sample = vqa_sample(
                id=f"q{index}",
                source="ab"[index % 2],
                image=f"{name}.png",
                question=QUESTIONS[index % len(QUESTIONS)],
                answer=ANSWERS[index % len(ANSWERS)],
            )
            rows.append((sample, {f"{name}.png": Bytes(encoded_pictures[name])}, None))
        for index, row in changed:
            rows[index] = row
        return MemoryStream(rows)

    return make


@pytest.fixture(scope="session")
def small_model(
    model_config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Another model than `saved_model`, with the same vocabulary."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model

    torch.manual_seed(23)
    model = build_model(model_config, tokenizer).eval()
    directory = tmp_path_factory.mktemp("small") / "model"
    save_model(model, build_processor(model.config, tokenizer), directory)
    return directory


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer knows bytes and has no chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
