"""What the README and the docs show works as it stands there: the calls, and every metric that is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from nvila_platform.serving import RunningServer

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
# What asks about a picture in a file.
PAGES = ["README.md", "docs/quickstart.md"]


def block(language: str, page: str = PAGE, beginning: str = "") -> str:
    """The first block of a page in a language, or the first that begins so."""
    return beginning + page.partition(f"```{language}\n{beginning}")[2].partition("\n```")[0]


def asking(name: str) -> str:
    """The part of a page that shows how to ask."""
    return (ROOT / name).read_text(encoding="utf-8").partition("## Serve and ask")[2].partition("\n## ")[0]


def here(text: str, server: RunningServer) -> str:
    """The same call to the server of these tests."""
    text = text.replace("127.0.0.1:8080", "localhost:8080")
    text = text.replace("http://localhost:8080", server.base_url).replace("localhost:8080", server.base_url)
    return re.sub(r'("model": |model=)"nvila"', r'\1"words"', text)


def environment() -> dict[str, str]:
    """No proxy between here and the server."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def test_the_curl_line_streams_an_answer(server: RunningServer) -> None:
    _serve, _, curl = block("bash").partition("\n")
    done = subprocess.run(
        ["bash", "-c", here(curl, server)], capture_output=True, text=True, timeout=60, check=True, env=environment()
    )
    assert '"content":"hello"' in done.stdout
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_the_openai_snippet_gets_an_answer_about_an_image(server: RunningServer, png_url: str) -> None:
    code = here(block("python"), server).replace("data:image/png;base64,...", png_url)
    code += "\nprint(answer.choices[0].message.content)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment()
    )
    assert done.stdout == "30x20 What is shown?\n"


@pytest.mark.parametrize("page", PAGES)
def test_the_calls_about_a_picture_in_a_file_are_answered(
    page: str, server: RunningServer, png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "shape.png").write_bytes(png)
    calls = [
        ["bash", "-c", here(block("bash", asking(page), "curl"), server)],
        [sys.executable, "-c", here(block("python", asking(page)), server)],
    ]
    for call, question in zip(calls, ("what shape is in the image?", "what color is the shape?"), strict=True):
        done = subprocess.run(
            call, capture_output=True, text=True, timeout=120, check=True, env=environment(), cwd=tmp_path
        )
        assert f"30x20 {question}" in done.stdout


def test_every_metric_of_the_table_is_there(server: RunningServer, http: httpx.Client) -> None:
    message = {"model": "words", "messages": [{"role": "user", "content": "hi"}]}
    http.post("/openai/v1/chat/completions", json=message).raise_for_status()
    found = set(re.findall(r"^# TYPE nvila:(\S+) ", http.get("/metrics").text, re.MULTILINE))
    table = PAGE.partition("## Metrics")[2].partition("\n## ")[0]
    named = [re.sub(r"\{.*", "", one) for row in table.splitlines() if row.startswith("| `") for one in cells(row)]
    # The engine of these tests keeps no cache and takes no steps.
    engine = {"vision_encode_seconds_total", "engine_steps_total", "num_preemptions_total", "kv_cache_usage_perc"}
    engine |= {"mm_cache_queries_total", "mm_cache_hits_total"}
    assert len(named) > 20
    assert [one for one in named if one not in found | engine] == []


def cells(row: str) -> list[str]:
    """The names in the first cell of a row."""
    return re.findall(r"`([^`]+)`", row.split("|")[1])
