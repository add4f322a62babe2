"""What the benchmarks of the server have in common: a model to serve, clients that stream, and what they saw."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from PIL import Image

from nvila.assembly import build_model, build_processor, save_model
from nvila.configuration import NVILAConfig
from nvila.data.tokenizers import build_word_tokenizer
from nvila.training.config import ModelConfig

NAME = "bench"
_WORDS = 2000
_TIMEOUT_S = 300.0
_PIECE, _DONE = b'"delta":{"content":', b"data: [DONE]"
_COUNT = re.compile(rb'"completion_tokens":(\d+)')
_TAIL = 512  # holds the event with the counts


@dataclass(slots=True)
class Seen:
    """What one client saw of one request, by its seed: times in seconds, from sending on."""

    number: int = 0
    status: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    text: str = ""
    gaps_s: list[float] = field(default_factory=list)


def build(path: Path, *, small: bool = False) -> None:
    """Write a model of 22M parameters with weights of chance; `small` makes one of a few thousand."""
    words = [f"w{number}" for number in range(_WORDS)]
    tokenizer = build_word_tokenizer([" ".join(words), "tell me about number : ?"], model_max_length=1024)
    width, layers = (64, 2) if small else (512, 8)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width // 2,
        "intermediate_size": width,
        "num_hidden_layers": layers // 2 + 1,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    }
    language = {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": width * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
    }
    config = ModelConfig(
        vision=vision, language=language, projector="mlp_downsample_2x2_fix", select_layer=-2, max_length=1024
    )
    torch.manual_seed(3)
    model = build_model(config, tokenizer).eval()
    save_model(model, build_processor(cast("NVILAConfig", model.config), tokenizer), path)


def question(number: int) -> str:
    """A prompt of its own, so that nothing is answered from a cache."""
    draw = random.Random(number)
    return " ".join(f"w{draw.randrange(_WORDS)}" for _ in range(40))


def picture(number: int) -> str:
    """A small picture of its own as a `data:` URI."""
    out = io.BytesIO()
    Image.new("RGB", (96, 64), (number * 37 % 256, number * 61 % 256, number * 83 % 256)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def body(number: int, tokens: int, *, stream: bool = True, image: bool = False) -> dict[str, Any]:
    """A request of its own."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question(number)}]
    if image:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(number)}})
    messages = [{"role": "user", "content": content}]
    request = {"model": NAME, "messages": messages, "max_tokens": tokens, "temperature": 1.0, "seed": number}
    return request | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


@asynccontextmanager
async def client(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a connection for every request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=_TIMEOUT_S, limits=limits) as made:
        yield made


async def ask(http: httpx.AsyncClient, request: dict[str, Any]) -> Seen:
    """Stream one answer."""
    seen, began = Seen(number=request["seed"]), time.perf_counter()
    last = began
    async with http.stream("POST", "/openai/v1/chat/completions", json=request) as answer:
        seen.status = answer.status_code
        async for line in answer.aiter_lines():
            if not line.startswith("data: {") or seen.status != 200:
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                seen.tokens = event["usage"]["completion_tokens"]
            if not event.get("choices") or not event["choices"][0]["delta"].get("content"):
                continue
            now = time.perf_counter()
            if seen.text:
                seen.gaps_s.append(now - last)
            else:
                seen.first_s = now - began
            last = now
            seen.text += event["choices"][0]["delta"]["content"]
    seen.total_s = time.perf_counter() - began
    return seen


async def light_ask(base_url: str, request: dict[str, Any]) -> Seen:
    """Stream one answer and look for nothing but its first piece, its count and its end: a client that costs little."""
    host, _, port = base_url.removeprefix("http://").partition(":")
    sent = json.dumps(request).encode()
    head = f"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    seen, began, tail = Seen(number=request["seed"]), time.perf_counter(), b""
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{head}Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n".encode() + sent)
        while data := await reader.read(65536):
            if not seen.first_s and _PIECE in tail + data:
                seen.first_s = time.perf_counter() - began
            if _DONE in tail + data:
                seen.total_s = time.perf_counter() - began
                seen.status = 200
                seen.tokens = int((_COUNT.findall(tail + data) or [b"0"])[-1])
            tail = (tail + data)[-_TAIL:]
    finally:
        writer.close()
        await writer.wait_closed()
    assert seen.status == 200, "an answer was not complete"
    return seen


async def together(
    base_url: str, requests: Sequence[dict[str, Any]], clients: int, *, light: bool = False
) -> tuple[list[Seen], float]:
    """Let so many clients ask one request after the other; return what they saw, and the seconds it took.

    Args:
        base_url: Of the server.
        requests: What is asked.
        clients: How many ask at once.
        light: Ask with `light_ask`.
    """
    left = list(reversed(requests))
    seen: list[Seen] = []

    async def one(http: httpx.AsyncClient) -> None:
        while left:
            seen.append(await (light_ask(base_url, left.pop()) if light else ask(http, left.pop())))

    async with client(base_url) as http:
        began = time.perf_counter()
        await asyncio.gather(*(one(http) for _ in range(clients)))
        return seen, time.perf_counter() - began
