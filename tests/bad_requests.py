"""Requests to the server with the deterministic engine, and what its answers must look like when they are bad."""

from __future__ import annotations

import io
from typing import Any

import httpx
from PIL import Image

CHAT, TEXT = "/openai/v1/chat/completions", "/openai/v1/completions"
V1, V2 = "/v1/models/words:predict", "/v2/models/words/infer"
MOST_SECONDS = 15.0


def body(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "words", "messages": [{"role": "user", "content": content}], **fields}


def image(url: Any) -> dict[str, Any]:
    return body([{"type": "image_url", "image_url": {"url": url}}])


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def check(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert len(answer.content) < 2000
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    assert answer.elapsed.total_seconds() < MOST_SECONDS


def serves(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("still here"))
    assert answer.json()["choices"][0]["message"]["content"] == "still here"
