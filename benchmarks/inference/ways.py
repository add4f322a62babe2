"""Ways to answer one prompt with one model: the engine's decoders, `generate`, and other runtimes.

Each says how long the first token took and how fast the others came, and gives the logits of a text.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peer_llama import LlamaCpp, rounded
from peer_onnx import OnnxRuntime
from smollm import find_gguf
from torch import Tensor

from nvila.data.records import Message, Part
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import build_decoder, cache_shape
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor


class Runner(Protocol):
    """Another runtime."""

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forget everything, read prompts and return the next token of each."""

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Add a token to each and return the next ones."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text."""

    def close(self) -> None:
        """Free its memory."""


class Way(Protocol):
    """A way to answer."""

    def time(self, prompt: str, tokens: int) -> tuple[float, float]:
        """Return seconds to the first token, and tokens a second after it."""

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of every position of a text."""


def question(text: str) -> list[Message]:
    """Return a conversation of one message."""
    return [Message(role="user", content=(Part(type="text", value=text),))]


class OurWay:
    """The engine."""

    def __init__(self, model: NVILAForConditionalGeneration, processor: NVILAProcessor, **options: Any) -> None:
        self.config = EngineConfig(prefix_reuse=False, **options)
        self._model = model
        self._engine = Engine(model, processor, self.config)

    def time(self, prompt: str, tokens: int) -> tuple[float, float]:
        """See `Way`."""
        began = time.perf_counter()
        running = self._engine.stream(question(prompt), {}, SamplingParams(max_tokens=tokens))
        next(running)
        first, said = time.perf_counter(), running.usage.completion_tokens
        list(running)
        return first - began, (running.usage.completion_tokens - said) / (time.perf_counter() - first)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """See `Way`."""
        pool = BlockPool(cache_shape(self._model), 2**28, 16)
        batch = BlockBatch(pool, [Span(list(range(1, 1 + pool.blocks_for(len(ids)))), 0, len(ids))])
        plain = EngineConfig(decoder=self.config.decoder, compile="off")  # prompts are not compiled anyway
        decoder = build_decoder(self._model, plain, pool)
        return decoder(self._model.get_input_embeddings()(ids), batch, torch.arange(len(ids))).float()


class GenerateWay:
    """The model's own `generate`."""

    def __init__(self, model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
        self._model, self._processor = model, processor

    def time(self, prompt: str, tokens: int) -> tuple[float, float]:
        """See `Way`; the whole less the prompt with one token."""
        inputs = model_inputs(self._processor, question(prompt), {})

        def seconds(count: int) -> tuple[float, int]:
            began = time.perf_counter()
            out = cast("Any", self._model).generate(**inputs, max_new_tokens=count, do_sample=False)
            return time.perf_counter() - began, out.shape[1] - inputs["input_ids"].shape[1]

        (short, one), (long, many) = seconds(1), seconds(tokens)
        return short, (many - one) / (long - short)


class PeerWay:
    """Another runtime, asked with the same tokens."""

    def __init__(self, runner: Runner, processor: NVILAProcessor) -> None:
        self._runner, self._processor = runner, processor

    def time(self, prompt: str, tokens: int) -> tuple[float, float]:
        """See `Way`."""
        began = time.perf_counter()
        ids = model_inputs(self._processor, question(prompt), {})["input_ids"][0].tolist()
        last = self._runner.start([ids])
        first = time.perf_counter()
        for _ in range(tokens - 1):
            last = self._runner.step(last)
        return first - began, (tokens - 1) / (time.perf_counter() - first)

    def logits(self, ids: Tensor) -> Tensor:
        """See `Way`."""
        return self._runner.logits(ids.tolist())


def torchao_way(model: NVILAForConditionalGeneration, processor: NVILAProcessor, bits: int) -> OurWay:
    """Return the engine's plain decoder with torchao's weights of 8 bits, or of 4 in groups of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config: Any = Int8WeightOnlyConfig()
    if bits == 4:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=32)
    other = copy.deepcopy(model)
    quantize_(other.model.language_model, config)
    return OurWay(other, processor, decoder="transformers")


def peers(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, scratch: Path, threads: int
) -> tuple[dict[str, Way], dict[str, str]]:
    """Return what runs here, and for each peer that does not why."""
    made: dict[str, Way] = {}
    missing = {"openvino": "no graph of the decoder has been written for it"}

    def add(name: str, package: str, make: Callable[[], Way]) -> None:
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed"
            return
        try:
            made[name] = make()
        except Exception as e:
            missing[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"

    def llama(form: str) -> Way:
        path = find_gguf() if form == "Q4_1" else rounded(find_gguf(), scratch / f"{form}.gguf", form)
        return PeerWay(LlamaCpp(path, threads=threads), processor)

    add("torchao-int8", "torchao", lambda: torchao_way(model, processor, 8))
    add("torchao-int4", "torchao", lambda: torchao_way(model, processor, 4))
    add("onnxruntime-int8", "onnxruntime", lambda: PeerWay(OnnxRuntime(model, threads=threads), processor))
    for form in ("Q4_1", "Q8_0"):
        add(f"llama.cpp-{form}", "llama_cpp", lambda form=form: llama(form))  # type: ignore[misc]
    return made, missing
