"""NVILA under lmms-eval: found by its entry point, run by its own command on local data, scored by both alike."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nvila.evaluation.fixtures import picture

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install 'nvila[lmms-eval]'")
TASK = """\
task: nvila_local
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: generate_until
doc_to_visual: !function local.doc_to_visual
doc_to_text: !function local.doc_to_text
doc_to_target: answer
process_results: !function local.process
generation_kwargs: {{max_new_tokens: 8, do_sample: false}}
metric_list:
  - {{metric: relaxed_overall, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
FUNCTIONS = """\
from lmms_eval.tasks.chartqa.utils import relaxed_correctness

def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc, kwargs=None):
    return doc["question"]

def process(doc, results):
    return {"relaxed_overall": float(relaxed_correctness(results[0], doc["answer"]))}
"""
OURS = """\
{version: 1, title: The same, fields: {question: question, answer: answer}, images: [image], prompt: "{question}",
 generation: {max_new_tokens: 8}, scorer: relaxed_accuracy}
"""
QUESTIONS = ["what color is the shape?", "is there a circle?", "what is it?", "one two three?"]


def write_data(folder: Path, answers: list[str]) -> Path:
    from datasets import Dataset, Features, Image, Value

    rows = [
        {
            "image": {"bytes": picture(str(n)), "path": None},
            "question": QUESTIONS[n % 4],
            "answer": answers[n],
        }
        for n in range(len(answers))
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    path = folder / "data.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def test_the_entry_point_names_a_manifest() -> None:
    found = [point for point in entry_points(group="lmms_eval.models") if point.name == "nvila"]
    if not found:
        pytest.skip("this installation is older than the entry point")
    assert found[0].value == "nvila.evaluation.lmms_plugin:manifest"
    if INSTALLED:
        assert found[0].load()().model_id == "nvila"


@needs_lmms_eval
@pytest.mark.slow
def test_lmms_eval_runs_nvila_on_local_data(model_folder: Path, tmp_path: Path) -> None:
    """Its command, its task machinery and its scorer; then the same model, data and scorer by ours."""
    known = run_ours(model_folder, write_data(tmp_path, ["?"] * 10), tmp_path / "first")[1]
    # Some answers are right, so that a score says something.
    data = write_data(tmp_path, [answer if n < 4 else f"not {answer}" for n, answer in enumerate(known)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "nvila_local.yaml").write_text(TASK.format(data=data))
    (tmp_path / "tasks" / "local.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "nvila", "--model_args", f"pretrained={model_folder}"]
    command += ["--tasks", "nvila_local", "--include_path", str(tmp_path / "tasks"), "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "theirs"), "--log_samples", "--verbosity", "ERROR"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [file] = (tmp_path / "theirs").rglob("*_results.json")
    theirs = json.loads(file.read_text())["results"]["nvila_local"]["relaxed_overall,none"]
    [samples] = (tmp_path / "theirs").rglob("*_samples_*.jsonl")
    said = {line["doc_id"]: line for line in map(json.loads, samples.read_text().splitlines())}
    assert len(said) == 10
    ours, answers = run_ours(model_folder, data, tmp_path)
    assert [said[n]["filtered_resps"] for n in range(10)] == answers
    assert ours == theirs == 0.4


def run_ours(model_folder: Path, data: Path, tmp_path: Path) -> tuple[float, list[str]]:
    from nvila.assembly import load_model
    from nvila.evaluation.answer_log import AnswerLog
    from nvila.evaluation.model_answerer import ModelAnswerer
    from nvila.evaluation.results import summarize
    from nvila.evaluation.rows import open_rows
    from nvila.evaluation.runner import TaskRun, score_all
    from nvila.evaluation.task import parse_task

    task = parse_task(OURS, name="same", where="same.yaml")
    rows, log = open_rows(task, str(data)), AnswerLog.open(tmp_path / "ours", task, "m", {})
    TaskRun(task=task, rows=rows, log=log, load=lambda: ModelAnswerer(*load_model(model_folder)), batch_size=4).run()
    outcome = score_all(task, rows, log)
    value = summarize(task, rows.name, outcome, seed=0).estimates["relaxed_overall"].value
    return value, [sample.answer for sample in outcome.scored]
