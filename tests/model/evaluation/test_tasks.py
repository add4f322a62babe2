"""Task files: all that are shipped, and what is wrong with those that people write."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.readers.rows import Row
from nvila.errors import CapabilityError, ConfigError, DataError
from nvila.evaluation import registry
from nvila.evaluation.asking import Asker
from nvila.evaluation.fixtures import write_fixture
from nvila.evaluation.registry import find_task, select_tasks, task_files
from nvila.evaluation.rows import TaskRows, open_rows
from nvila.evaluation.scorers import table
from nvila.evaluation.scorers.exact import EXACT
from nvila.evaluation.task import names_in, parse_task

if TYPE_CHECKING:
    from tests.model.evaluation.conftest import MakeTask, WriteRows

NAMED_BY_THE_PAPER = """
ai2d chartqa docvqa_val infovqa_val mathvista_testmini mmmu_val realworldqa seedbench textvqa_val vqav2_val pope gqa
ocrbench scienceqa_img activitynetqa longvideobench_val mlvu_dev mvbench nextqa_mc videomme videomme_w_subtitle
activitynet_rtl r2r vqa_rad pathvqa cxr_report chexpert
"""


def test_all_tasks_are_shipped() -> None:
    assert set(NAMED_BY_THE_PAPER.split()) <= set(task_files())


@pytest.mark.parametrize("name", task_files())
def test_shipped_tasks_ask_about_their_fixtures(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    if task.file.data.builtin is not None:
        assert task.file.tags == ["builtin"]
        return
    rows = open_rows(task, str(write_fixture(task, tmp_path)))
    questions = [Asker(task, rows).question(i, row.fields or {}) for i, row in enumerate(rows.read(task.columns))]
    assert len(questions) == rows.count() >= 2
    assert len({question.digest for question in questions}) == len(questions)
    for question in questions:
        assert "{" not in question.prompt
        assert "None" not in question.prompt
        assert {piece.kind for piece in question.pieces} - {"text"}
        best = question.reference["answer"]
        said = best[0] if isinstance(best, list) else best
        if isinstance(said, str) and name not in ("mvbench", "cxr_report"):
            assert next(iter(task.scorer.score(said, question.reference).values())) is not None


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("ai2d", "B"),
        ("videomme", "(A) Red."),
        ("nextqa_mc", "it was red"),
        ("longvideobench_val", "A."),
        ("mlvu_dev", "A) red"),
        ("mvbench", "red"),
        ("scienceqa_img", "The answer is A"),
        ("mmmu_val", "B"),
        ("activitynet_rtl", "<1.0> <2.0>"),
        ("chexpert", "Cardiomegaly, Edema"),
        ("docvqa_val", "january 5"),
    ],
)
def test_right_answers_to_first_samples_score_full(name: str, right: str, tmp_path: Path) -> None:
    task = find_task(name)
    rows = open_rows(task, str(write_fixture(task, tmp_path)))
    question = Asker(task, rows).question(0, next(iter(rows.read(task.columns))).fields or {})
    main = task.scorer.metrics[task.scorer.main]
    assert main.aggregate([task.scorer.score(right, question.reference)]) == 1


def test_fixtures_are_the_same_every_time(tmp_path: Path) -> None:
    task = find_task("videomme_w_subtitle")
    first, second = (write_fixture(task, tmp_path / name) for name in "ab")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(path) for path in files] == ["data/a.mp4", "data/b.mp4", "data.parquet", "subtitle/a.srt"]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"promt": "x"}, "no field 'promt'", "did you mean 'prompt'?"),
        ({"data": {"hib": "x"}}, "no field 'data.hib'", "did you mean 'hub'?"),
        ({"generation": {"max_tokens": 3}}, "no field 'generation.max_tokens'", "did you mean 'max_new_tokens'?"),
        ({"version": "1"}, "version is '1'", "correct the value"),
        ({"version": 0}, "version is 0", "correct the value"),
        ({"scorer": "exactmatch"}, "no scorer 'exactmatch'", "did you mean 'exact_match'?"),
        ({"scorer": "temporal"}, "needs the field 'duration'", "map it under fields"),
        ({"fields": {"question": "q"}}, "needs the field 'answer'", "map it under fields"),
        ({"prompt": "{qestion}"}, "names 'qestion'", "did you mean 'question'?"),
        ({"prompt": "{choices}"}, "names 'choices'", "known"),
        ({"prompt": "{question"}, "is no template", "write {{"),
        ({"prompt": "{question.x}"}, "more than a name", "write {field}"),
        ({"prompt": "{question!r}"}, "more than a name", "write {field}"),
        ({"group_by": "kind"}, "no field 'kind'", "known"),
        ({"optional": {"hint": "x"}}, "no field 'hint'", "known"),
        ({"choice_line": "{char}"}, "choice_line names 'char'", "{letter}"),
        ({"subtitles": "{q}.srt"}, "subtitles need videos", "sampled frames"),
        ({"answer_is": "index"}, "but there are none", "map choices"),
        ({"answer_is": "number"}, "answer_is is 'number'", "correct the value"),
        ({"data": {"hub": "a/b", "builtin": "easy-vqa"}}, "named twice", "name builtin or hub"),
        ({"videos": ["{a.b}"]}, "more than a name", "write {field}"),
        ({"fixture": {"rows": []}}, "fixture.rows", "correct the value"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_task_files(make_task: MakeTask, changed: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(**changed)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_text_that_is_no_task() -> None:
    with pytest.raises(ConfigError, match="is no task"):
        parse_task("just words", name="x", where="x.yaml")
    with pytest.raises(ConfigError, match="'prompt' is missing"):
        parse_task("{version: 1, title: X, fields: {answer: a}, scorer: anls}", name="x", where="x.yaml")


def test_names_of_a_template() -> None:
    assert names_in("{a} and {{b}} and {c}") == ["a", "c"]


def test_digest_follows_what_scores_depend_on(make_task: MakeTask) -> None:
    plain = make_task().digest
    assert make_task(title="Other", tags=["x"], fixture={"rows": [{"q": "1"}]}).digest == plain
    for changed in ({"prompt": "{question}?"}, {"version": 2}, {"scorer": "anls"}):
        assert make_task(**changed).digest != plain
    assert make_task(name="other").digest != plain


def test_tasks_are_selected_by_name_tag_and_file(tmp_path: Path) -> None:
    assert [task.name for task in select_tasks(["pope,chartqa", "pope"])] == ["pope", "chartqa"]
    assert {"easy_vqa", "digit_pages"} <= {task.name for task in select_tasks(["builtin"])}
    assert len(select_tasks(["all"])) == len(task_files())
    file = tmp_path / "mine.yaml"
    file.write_text("{version: 3, title: M, fields: {question: q, answer: a}, prompt: '{question}', scorer: anls}")
    assert select_tasks([f"{file}@3"])[0].name == "mine"
    for words, message, hint in (
        (["chartqua"], "no task or tag 'chartqua'", "did you mean 'chartqa'?"),
        (["chartqa@7"], "of version 1, not 7", "ask for chartqa"),
        ([f"{file}@1"], "of version 3, not 1", "ask for"),
        ([""], "no task is named", "chartqa"),
        ([str(tmp_path / "none.yaml")], "cannot be read", "check the path"),
    ):
        with pytest.raises(ConfigError) as caught:
            select_tasks(words)
        assert message in caught.value.message
        assert hint in caught.value.hint
    with pytest.raises(ConfigError, match="no task 'chart'"):
        find_task("chart")
    double = tmp_path / "pope.yaml"
    double.write_text(file.read_text())
    with pytest.raises(ConfigError, match="two tasks are called pope"):
        select_tasks(["pope", str(double)])


def offer(monkeypatch: pytest.MonkeyPatch, module: Any, point: EntryPoint) -> None:
    monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == point.group else [])


def test_other_packages_add_tasks_and_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("from nvila.evaluation.scorers.exact import EXACT\n")
    text = "{version: 1, title: T, fields: {question: q, answer: a}, prompt: '{question}', scorer: theirs}"
    (package / "their_task.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, registry, EntryPoint("their", "their_tasks", registry.ENTRY_POINTS))
    offer(monkeypatch, table, EntryPoint("theirs", "their_tasks:EXACT", table.ENTRY_POINTS))
    assert find_task("their_task").scorer is EXACT
    offer(monkeypatch, table, EntryPoint("theirs", "json:dumps", table.ENTRY_POINTS))
    with pytest.raises(CapabilityError, match="is a function"):
        find_task("their_task")
    (package / "pope.yaml").write_text(text)
    with pytest.raises(ConfigError, match="two tasks 'pope'"):
        task_files()


def test_listing_tasks_needs_no_torch() -> None:
    code = "import sys, nvila.evaluation.registry as r; r.select_tasks(['pope']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_task_without_data(make_task: MakeTask) -> None:
    with pytest.raises(ConfigError) as caught:
        open_rows(make_task(data={"hub": "org/name"}), None)
    assert "--data demo=hub (downloads org/name)" in caught.value.hint
    with pytest.raises(ConfigError, match="names no Hub id"):
        open_rows(make_task(), "hub")
    with pytest.raises(ConfigError, match="no built-in data set 'easy'"):
        open_rows(make_task(data={"builtin": "easy"}), None)


def test_hub_data_is_read_through_datasets(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    file = write_fixture(find_task("chartqa"), tmp_path) / "data.parquet"
    asked = []

    def load(hub: str, config: str | None, split: str) -> Any:
        asked.append((hub, config, split))
        if hub == "org/none":
            raise FileNotFoundError("no such data set")
        found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        return found.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = make_task(fields={"question": "question", "answer": "answer"}, images=["image"], data={"hub": "org/name"})
    rows = open_rows(task, "hub")
    question = Asker(task, rows).question(0, next(iter(rows.read(task.columns))).fields or {})
    assert (asked[0], rows.count()) == (("org/name", None, "test"), 3)
    assert question.pieces[0].value.startswith(b"\x89PNG")
    assert open_rows(task, "hub:org/other").name == "hub:org/other"
    with pytest.raises(DataError, match="cannot load org/none"):
        open_rows(task, "hub:org/none")


def test_a_missing_column_is_named_with_its_nearest(make_task: MakeTask, write_rows: WriteRows) -> None:
    path = write_rows("{broken", {"question": "x", "anser": "y"})
    with pytest.raises(DataError) as caught:
        open_rows(make_task(fields={"question": "question", "answer": "answer"}), str(path))
    assert "no column 'answer'" in caught.value.message
    assert caught.value.hint == "did you mean 'anser'?"
    with pytest.raises(DataError, match="no row that can be read"):
        open_rows(make_task(), str(write_rows("{broken", name="broken.jsonl")))


def test_rows_of_a_table_are_counted_without_reading_them(make_task: MakeTask, tmp_path: Path) -> None:
    task = find_task("ai2d")
    rows = open_rows(task, str(write_fixture(task, tmp_path)))
    assert rows.count() == 2


def test_what_scorers_of_a_task_need_is_there(make_task: MakeTask) -> None:
    rows = TaskRows(name="none", read=lambda columns: iter([Row(fields={})]), count=lambda: 1)
    with pytest.raises(DataError, match="no column 'q'"):
        Asker(make_task(), rows).question(0, {})


def test_json_form_of_all_references(tmp_path: Path) -> None:
    for name in ("chexpert", "r2r", "vqav2_val"):
        task = find_task(name)
        rows = open_rows(task, str(write_fixture(task, tmp_path / name)))
        for index, row in enumerate(rows.read(task.columns)):
            json.dumps(dict(Asker(task, rows).question(index, row.fields or {}).reference), allow_nan=False)
