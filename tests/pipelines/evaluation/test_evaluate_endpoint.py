"""`nvila evaluate http://...`: a service that errs on a few samples, and options that mean nothing there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.platform.test_endpoint import Service

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

TASK = "{version: 1, title: T, fields: {question: q, answer: a}, prompt: '{question}', scorer: exact_match}"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "mine.yaml").write_text(TASK)
    rows = [{"q": f"q{n}", "a": "fine"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Service()
    yield made
    made.close()


def test_errors_are_counted_and_never_wrong(nvila: Nvila, service: Service) -> None:
    service.script = {"q3": [400], "q5": [503, "fine"]}
    words = ("evaluate", service.url, "--tasks", "mine.yaml", "--data", "mine=rows.jsonl", "--concurrency", "4")
    done = nvila(*words, "--json")
    assert done.code == 0, done.err
    file = json.loads(Path(done.last_json["file"]).read_text())
    assert file["results"]["mine"]["exact_match,none"] == 1.0
    assert file["n-samples"]["mine"] == {"original": 10, "effective": 9}
    assert file["failures"]["mine"]["first"][0]["problem"] == "status 400: no 400"
    assert file["endpoint"]["retries"] == 1
    assert file["endpoint"]["errors"] == {"status 400": 1}
    assert "1 of 11 requests were sent again" in done.err
    assert "1 questions have no answer: status 400" in done.err
    refused = nvila(*words, "--max-failed", "5%")
    assert refused.code == 1
    assert "1 of 10 samples of mine have no score" in refused.err
    service.script = {}
    again = nvila(*words, "--json")
    found = json.loads(Path(again.last_json["file"]).read_text())
    assert found["n-samples"]["mine"]["effective"] == 10
    assert found["endpoint"]["url"].startswith(service.url)


def test_a_service_that_is_not_there_may_be_tried_again(nvila: Nvila, service: Service) -> None:
    service.close()
    done = nvila("evaluate", service.url, "--tasks", "mine.yaml", "--data", "mine=rows.jsonl")
    assert (done.code, "nothing answers" in done.err) == (75, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["http://x", "--dtype", "bf16"], "--dtype is about a model here"),
        (["http://x", "--processes", "2"], "--processes is about a model here"),
        (["folder", "--retries", "2"], "--retries is about an endpoint"),
        (["http://x", "--retries", "-1"], "no whole number"),
    ],
)
def test_options_that_mean_nothing_are_refused(nvila: Nvila, words: list[str], message: str) -> None:
    done = nvila("evaluate", *words, "--tasks", "easy_vqa")
    assert (done.code, message in done.err) == (2, True), done.err
