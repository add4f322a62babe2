"""A server that watches drift: it counts what comes and goes, tells `/drift` and `/metrics`, and keeps nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from nvila_platform.drift.features import answer_features, request_features
from nvila_platform.drift.reference import build_reference
from nvila_platform.serving.client import RunningServer

StartWords = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of requests with one dark picture each."""
    path = tmp_path_factory.mktemp("drift") / "drift.json"
    dark = [Image.new("RGB", (30, 20), (level, level, level)) for level in range(50)]
    build_reference((request_features("what is it", [one]) | answer_features(20) for one in dark), "dark").write(path)
    return path


@pytest.fixture(scope="module")
def http(start_words: StartWords, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    args = ("--drift", str(reference), "--drift-share", "1")
    with (
        start_words(tmp_path_factory.mktemp("model"), args=args) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=20.0) as client,
    ):
        yield client


def seen(http: httpx.Client) -> dict[str, int]:
    return {name: found["seen"] for name, found in http.get("/drift").json()["features"].items()}


def ask(http: httpx.Client, *parts: dict[str, Any], text: str = "count 3", **more: Any) -> str:
    content = [*parts, {"type": "text", "text": text}]
    body = {"model": "words", "messages": [{"role": "user", "content": content}], **more}
    answer = http.post("/openai/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.text


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def film() -> str:
    import base64

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            white = np.full((48, 64, 3), 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(white, format="rgb24")))
        container.mux(stream.encode(None))
    return f"data:video/mp4;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_what_comes_and_goes_is_counted(http: httpx.Client, png_url: str) -> None:
    before = seen(http)
    ask(http, picture(png_url), picture(png_url))
    ask(http, text="count 2")
    after = seen(http)
    change = {name: after[name] - before[name] for name in after}
    # Equal media are decoded once, and described once.
    assert change == {
        "images": 2, "prompt_letters": 2, "answer_letters": 2, "megapixels": 1, "aspect": 1, "brightness": 1,
        "contrast": 1,
    }  # fmt: skip


def test_streams_and_several_answers_are_counted_when_they_end(http: httpx.Client) -> None:
    before = seen(http)
    assert "[DONE]" in ask(http, stream=True)
    ask(http, n=3)
    after = seen(http)
    assert after["answer_letters"] - before["answer_letters"] == 4
    assert after["prompt_letters"] - before["prompt_letters"] == 2


def test_of_a_video_the_first_frame_is_described(http: httpx.Client) -> None:
    before = seen(http)
    ask(http, {"type": "video_url", "video_url": {"url": film()}})
    assert seen(http)["brightness"] - before["brightness"] == 1


def test_other_traffic_shows_in_the_metrics_and_the_summary(http: httpx.Client, png_url: str) -> None:
    # 200 values are needed before a number is given; the pictures are red, the reference is dark.
    for _ in range(200):
        ask(http, picture(png_url), text="count 1")
    summary = http.get("/drift").json()
    assert summary["features"]["brightness"]["psi"] > 0.25
    assert summary["features"]["aspect"]["psi"] < 0.1
    lines = http.get("/metrics").text.splitlines()
    (line,) = (one for one in lines if one.startswith('nvila:drift_psi{feature="brightness",model_name="words"}'))
    assert float(line.split()[-1]) == pytest.approx(summary["features"]["brightness"]["psi"], rel=0.05)
    assert any(one.startswith('nvila:drift_values{feature="images",model_name="words"}') for one in lines)
    assert "count 1" not in http.get("/drift").text


def test_a_server_that_watches_nothing_has_no_such_page(server: RunningServer) -> None:
    with httpx.Client(base_url=server.base_url, trust_env=False) as client:
        assert client.get("/drift").status_code == 404
        assert "nvila:drift" not in client.get("/metrics").text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--drift", "nowhere.json"), "nowhere.json cannot be read"),
        (("--drift", "REFERENCE", "--drift-share", "2"), "the share of requests watched for drift is 2"),
    ],
)
def test_what_cannot_be_watched_is_told_at_the_start(
    start_words: StartWords, reference: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    from nvila.errors import ConfigError

    words = tuple(str(reference) if word == "REFERENCE" else word for word in args)
    with pytest.raises(ConfigError, match=said), start_words(tmp_path, args=words):
        pass
