"""What can be wrong with data and answers, by the command as people run it, against a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.platform.test_endpoint import Service

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

TASK = "{{version: 1, title: T, fields: {{question: q, answer: a}}, prompt: '{{question}}', scorer: {scorer}}}"


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def write(folder: Path, scorer: str, answers: list[Any], **more: Any) -> tuple[str, ...]:
    """Write a task and its rows, and return the words that evaluate them."""
    (folder / "mine.yaml").write_text(TASK.format(scorer=scorer))
    rows = [{"q": f"q{n}", "a": answer} | more for n, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--tasks", "mine.yaml", "--data", "mine=rows.jsonl")


@pytest.mark.parametrize(
    ("scorer", "said", "answers", "right"),
    [
        pytest.param("relaxed_accuracy", ["", "42"], ["42", "42"], [0, 1], id="an empty answer is wrong, and counts"),
        pytest.param("relaxed_accuracy", ["\uff14\uff12", "\u0664\u0662"], ["42", "42"], [1, 1], id="Unicode digits"),
        pytest.param("anls", ["b", "c"], [["a", "b"], ["a", "b"]], [1, 0], id="answers as lists"),
        pytest.param("exact_match", ["b", "c"], [["a", "b"], "c"], [1, 1], id="lists and texts"),
    ],
)
def test_odd_answers_are_scored(
    nvila: Nvila, service: Service, tmp_path: Path, scorer: str, said: list[str], answers: list[Any], right: list[int]
) -> None:
    words = write(tmp_path, scorer, answers)
    service.script = {f"q{n}": [text] for n, text in enumerate(said)}
    done = nvila("evaluate", service.url, *words, "--json")
    assert done.code == 0, done.err
    [value] = [
        v for name, v in done.last_json["results"]["mine"].items() if name.endswith(",none") and "_st" not in name
    ]
    assert value == sum(right) / len(right)
    found = json.loads(Path(done.last_json["file"]).read_text())
    assert found["n-samples"]["mine"] == {"original": 2, "effective": 2}


def test_a_missing_column_is_named_before_anything_is_asked(nvila: Nvila, service: Service, tmp_path: Path) -> None:
    words = write(tmp_path, "exact_match", ["x"])
    (tmp_path / "mine.yaml").write_text(TASK.format(scorer="exact_match").replace("answer: a", "answer: qq"))
    done = nvila("evaluate", service.url, *words)
    assert done.code == 1
    assert "rows.jsonl has no column 'qq', which the task mine needs" in done.err
    assert "did you mean 'q'?" in done.err
    assert service.bodies == []


def test_a_row_without_a_column_has_no_score(nvila: Nvila, service: Service, tmp_path: Path) -> None:
    words = write(tmp_path, "exact_match", ["fine"] * 10)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"q": "q10"}\n')
    done = nvila("evaluate", service.url, *words, "--json")
    assert done.code == 0, done.err
    found = json.loads(Path(done.last_json["file"]).read_text())
    assert found["n-samples"]["mine"] == {"original": 11, "effective": 10}
    assert found["results"]["mine"]["exact_match,none"] == 1.0
    assert "no column 'a'" in found["failures"]["mine"]["first"][0]["problem"]
