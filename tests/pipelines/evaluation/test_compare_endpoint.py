"""`nvila compare MODEL http://...`: a model beside its own service, and a service that errs on a few samples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.pipelines.cli.test_cli_serve import started
from tests.platform.test_endpoint import Service

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

TASK = "{version: 1, title: T, fields: {question: q, answer: a}, prompt: '{question}', scorer: exact_match}"


@pytest.mark.slow
def test_a_model_and_its_real_service_say_the_same(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    with started("serve", "--model-dir", str(model_folder), "--port", "0", "--name", "tiny", cwd=tmp_path) as server:
        assert server.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert url is not None
        words = ("--tasks", "easy_vqa,digit_pages", "--limit", "8", "--json")
        done = nvila("compare", model_folder, url[0], *words, "--threads", "1")
    assert done.code == 0, done.err
    assert done.last_json["b"]["name"].endswith("-tiny")
    # The service tells which model it is: the same one.
    assert done.last_json["a"]["digest"] != ""
    for task in done.last_json["tasks"].values():
        main = task["metrics"]["exact_match"]
        assert (main["samples"], main["better"], main["worse"]) == (8, 0, 0)
    answers = [
        {line["doc_hash"]: line["resps"] for line in map(json.loads, log.read_text().splitlines())}
        for side in "ab"
        for log in Path(done.last_json[side]["results"]).parent.glob("*_samples_easy_vqa.jsonl")
    ]
    assert len(answers) == 2
    assert answers[0] == answers[1]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "mine.yaml").write_text(TASK)
    rows = [{"q": f"q{n}", "a": "fine"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Service()
    yield made
    made.close()


def test_what_a_service_does_not_answer_is_in_no_pair(nvila: Nvila, model_folder: Path, service: Service) -> None:
    service.script = {"q3": [400], "q5": [503, "fine"]}
    words = ("compare", model_folder, service.url, "--tasks", "mine.yaml", "--data", "mine=rows.jsonl")
    done = nvila(*words, "--threads", "1")
    assert done.code == 0, done.err
    assert "not compared: 1 samples with a score of A alone, 0 of B alone" in done.out
    assert "1 questions have no answer: status 400" in done.err
    main = nvila(*words, "--threads", "1", "--json").last_json["tasks"]["mine"]["metrics"]["exact_match"]
    # The service is right wherever it answers, so what it did not answer was not counted as wrong.
    assert (main["samples"], main["b"], main["worse"]) == (9, 1.0, 0)
    assert nvila(*words, "--threads", "1", "--max-failed", "5%").code == 1
