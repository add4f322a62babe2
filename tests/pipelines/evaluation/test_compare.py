"""`nvila compare`: models, finished evaluations, the page with its pictures, and wrong use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

QUICK = ("--tasks", "easy_vqa", "--limit", "12", "--threads", "1")


@pytest.fixture(scope="session")
def other_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another last layer of its tower, so that it answers otherwise."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "changed" / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "embed_tokens" in name:
            weights[name] = value.flip(1).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def logs(nvila: Nvila, model_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two evaluations of one task on data of one's own, the second with other answers."""
    (tmp_path / "mine.yaml").write_text(
        "{version: 1, title: T, fields: {question: q, answer: a, category: c}, prompt: '{question}', "
        "images: [photo], group_by: category, scorer: exact_match}"
    )
    from nvila.evaluation.fixtures import picture

    (tmp_path / "data").mkdir()
    rows = []
    for n in range(8):
        (tmp_path / "data" / f"{n}.png").write_bytes(picture(str(n)))
        rows.append({"q": f"<b>what</b> is it? {n}", "a": "<i>x</i>", "photo": f"{n}.png", "c": "ab"[n % 2]})
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--tasks", "mine.yaml", "--data", "mine=data", "--threads", "1", "--json")
    done = nvila("evaluate", model_folder, *words, "--out", "a")
    assert done.code == 0, done.err
    file = Path(done.last_json["file"])
    changed = tmp_path / "b"
    shutil.copytree(file.parent, changed)
    [log] = changed.glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines[:3]:
        line["marks"]["exact_match"] = 1.0
        line["resps"] = [["<u>changed</u>"]]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = changed / file.name
    results.write_text(results.read_text().replace('"model_name": "tiny"', '"model_name": "other"'))
    return file, changed


def test_two_models_are_evaluated_and_compared(nvila: Nvila, model_folder: Path, other_folder: Path) -> None:
    done = nvila("compare", model_folder, other_folder, *QUICK, "--out", "out")
    assert done.code == 0, done.err
    assert done.out.startswith("A  tiny\nB  changed\n")
    head = done.out.splitlines()[3].split()
    assert head == ["task", "metric", "A", "B", "B", "-", "A", "95%", "interval", "p", "worse", "better", "samples"]
    assert Path("out/comparisons/tiny-vs-changed/comparison.html").is_file()
    found = json.loads(Path("out/comparisons/tiny-vs-changed/comparison.json").read_text())
    assert found["a"]["digest"] != found["b"]["digest"]
    assert found["tasks"]["easy_vqa"]["metrics"]["exact_match"]["samples"] == 12


def test_a_model_and_itself_in_two_folders_keep_apart_names(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "tiny" / "model")
    config = tmp_path / "tiny" / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    done = nvila("compare", model_folder, tmp_path / "tiny", *QUICK, "--json")
    assert done.code == 0, done.err
    names = [done.last_json[side]["name"] for side in "ab"]
    assert len(set(names)) == 2
    assert all(name.startswith("tiny ") for name in names)
    assert done.last_json["tasks"]["easy_vqa"]["verdict"] == "no difference shown"


def test_finished_evaluations_need_no_model(nvila: Nvila, logs: tuple[Path, Path]) -> None:
    done = nvila("compare", *logs, "--out", "out")
    assert done.code == 0, done.err
    assert "mine: other is better" in done.out or "mine: other shows no difference" in done.out
    found = json.loads(Path("out/comparisons/tiny-vs-other/comparison.json").read_text())["tasks"]["mine"]
    assert found["metrics"]["exact_match"]["difference"] == pytest.approx(3 / 8)
    assert [flip["b"] for flip in found["flipped"]["better"]] == ["<u>changed</u>"] * 3
    assert set(found["categories"]) == {"a", "b"}


def test_the_page_shows_changed_samples_with_pictures_and_runs_nothing(
    nvila: Nvila, logs: tuple[Path, Path], tmp_path: Path
) -> None:
    done = nvila("compare", *logs, "--out", "out")
    page = Path(done.out.splitlines()[-1].removeprefix("page: ")).read_text()
    assert page.count('<img src="data:image/') == 3
    assert "&lt;b&gt;what&lt;/b&gt; is it? 0" in page
    assert "&lt;u&gt;changed&lt;/u&gt;" in page
    assert not re.search(r"<script|<u>|<b>what|https?://(?!www\.w3)", page)
    assert len(re.findall(r'<svg [^>]*role="img"', page)) == 1
    (tmp_path / "data" / "1.png").unlink()
    nvila("compare", *logs, "--out", "less")
    page = Path("less/comparisons/tiny-vs-other/comparison.html").read_text()
    assert page.count('<img src="data:image/') == 2
    assert "picture not at hand" in page


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "0 models are named, a comparison needs two"),
        (["a"], 2, "1 models are named"),
        (["a", "b", "c"], 2, "3 models are named"),
        (["nowhere", "b"], 2, "model folder nowhere does not exist"),
    ],
)
def test_wrong_use(nvila: Nvila, words: list[str], code: int, message: str) -> None:
    done = nvila("compare", *words)
    assert (done.code, message in done.err) == (code, True), done.err
