"""`nvila curate` on a folder: what it makes, that a killed run ends as if nothing had happened, and wrong use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Curate = Callable[..., int]


def contents(out: Path) -> dict[str, bytes]:
    """Bytes of every output but the manifest, which holds times."""
    files = (path for path in out.rglob("*") if path.is_file())
    names = {str(path.relative_to(out)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith((".", "manifest", "report"))}


def last_json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def test_a_folder_is_curated_with_one_command(
    curate: Curate, models: dict[str, Path], llava: Any, capsys: Any, tmp_path: Path
) -> None:
    data = llava(
        24, {4: '{"id": "q4", "image": "images/none.png", "question": "what?", "answer": "red"}', 9: "{broken"}
    )
    code = curate(data, "--small", models["small"], "--large", models["large"], "--out", "out", "--threads", "1",
                  "--shard-size", "10", "--keep-rate", "0.5", "--keep-rate", "vqa=25%", "--json")  # fmt: skip
    assert code == 0
    result = last_json(capsys.readouterr().out)
    assert result["statuses"] == {"ok": 22, "bad_media": 1, "unreadable": 1}
    assert {name: (one["records"], one["scored"], one["kept"]) for name, one in result["sources"].items()} == {
        "vqa": (11, 11, 3),
        "shapes": (11, 11, 6),
        "llava": (2, 0, 0),
    }
    out = tmp_path / "out"
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert table["id"] == [f"q{index}" if index != 9 else "" for index in range(24)]
    assert all(
        (delta is None) == (status != "ok") for delta, status in zip(table["delta"], table["status"], strict=True)
    )
    selection = pq.read_table(out / "selection.parquet").to_pydict()
    assert sum(selection["kept"]) == result["kept"] == 9
    ignored = {path.stem: json.loads(path.read_text()) for path in (out / "ignore").iterdir()}
    assert {name: len(positions) for name, positions in ignored.items()} == {"vqa": 8, "shapes": 5, "llava": 2}
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["where"], line["status"]) for line in quarantine] == [
        ("llava.jsonl:5", "bad_media"),
        ("llava.jsonl:10", "unreadable"),
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"] == {"records": 24.0, "scored": 22.0, "kept": 9.0}
    assert "shards/scores-00002.parquet" in {entry["path"] for entry in manifest["outputs"]}


def test_choosing_again_scores_nothing(curate: Curate, scored: Path, refuse_models: None, capsys: Any) -> None:
    before = contents(scored)
    assert curate("--out", "out", "--keep-rate", "0.25", "--dry-run", "--json") == 0
    preview = last_json(capsys.readouterr().out)
    assert contents(scored) == before
    assert curate("--out", "out", "--keep-rate", "0.25", "--json") == 0
    chosen = last_json(capsys.readouterr().out)
    assert (chosen["sources"], chosen["kept"]) == (preview["sources"], 6)
    assert contents(scored)["scores.parquet"] == before["scores.parquet"]
    assert curate("--out", "out", "--method", "random", "--seed", "3") == 0
    assert curate("--out", "out", "--normalize", "token") == 0
    assert contents(scored)["scores.parquet"] != before["scores.parquet"]


def test_the_shards_may_go_once_they_are_merged(curate: Curate, scored: Path, refuse_models: None) -> None:
    for path in (scored / "shards").iterdir():
        path.unlink()
    assert curate("--out", "out", "--keep-rate", "0.25") == 0


def test_clusters_are_made_of_the_same_folder(curate: Curate, scored: Path, capsys: Any) -> None:
    assert curate("--out", "out", "--method", "cluster", "--clusters", "3", "--json") == 0
    assert last_json(capsys.readouterr().out)["kept"] == 12
    assert len(set(pq.read_table(scored / "clusters.parquet")["cluster"].to_pylist())) == 3


def test_scores_of_other_options_are_refused(
    curate: Curate, scored: Path, models: dict[str, Path], llava: Any, capsys: Any
) -> None:
    both = ("--small", models["small"], "--large", models["large"], "--out", "out")
    data = json.loads((scored / "scoring.json").read_text())["data"]["data"]
    assert curate(data, *both) == 0, "the options of before need not be given again"
    assert curate(data, *both, "--dtype", "bf16") == 2
    assert "holds scores of another configuration (dtype: fp32 -> bf16)" in capsys.readouterr().err
    assert curate(llava(5), *both) == 2
    assert "(data: " in capsys.readouterr().err
    assert curate(data, "--small", models["large"], *both[2:]) == 2
    assert "(small: " in capsys.readouterr().err


def test_a_selection_is_what_readers_give_for_training(curate: Curate, scored: Path) -> None:
    from nvila.data.mixtures import Registry

    data = json.loads((scored / "scoring.json").read_text())["data"]["data"]
    table = pq.read_table(scored / "selection.parquet").to_pydict()
    kept = [id for id, keep in zip(table["id"], table["kept"], strict=True) if keep]
    records = Registry().open(f"{data}@{scored}").records()
    assert [record.sample.id for record in records if record.sample is not None] == kept


def test_a_mixture_of_named_data_sets_is_curated(
    curate: Curate, models: dict[str, Path], llava: Any, capsys: Any, tmp_path: Path
) -> None:
    first, second = llava(6), llava(9, {4: "{broken"})
    text = (
        f"first: {{path: {first}, source: first}}\nsecond: {{path: {second}, source: second}}\nboth: first + second\n"
    )
    (tmp_path / "sets.yaml").write_text(text, encoding="utf-8")
    words = ("--small", models["small"], "--large", models["large"], "--mixtures", "sets.yaml", "--out", "out")
    assert curate("both", *words, "--max-bad", "10%", "--json") == 0
    sources = last_json(capsys.readouterr().out)["sources"]
    found = {name: (one["records"], one["scored"], one["kept"]) for name, one in sources.items()}
    assert found == {"first": (6, 6, 3), "second": (9, 8, 4)}, "a broken line belongs to its data set"
    assert 4 in json.loads((tmp_path / "out" / "ignore" / "second.json").read_text())
    assert curate("bth", *words) == 2
    assert "there is no data set 'bth'" in capsys.readouterr().err
    assert curate("both", *words, "--media-dir", ".") == 2
    assert "--media-dir is for one data set" in capsys.readouterr().err


def test_a_folder_is_chosen_from_wherever_one_is(
    curate: Curate, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert curate("--out", "../out", "--keep-rate", "0.25") == 0
    assert "data:image/png;base64" in (scored / "report.html").read_text(encoding="utf-8")


def test_too_many_bad_records_stop_the_run(
    curate: Curate, models: dict[str, Path], llava: Any, capsys: Any, tmp_path: Path
) -> None:
    data = llava(30, dict.fromkeys((2, 5, 7), "{broken"))
    words = ("--small", models["small"], "--large", models["large"], "--out", "out", "--shard-size", "8")
    assert curate(data, *words, "--max-bad", "5%") == 1
    error = capsys.readouterr().err
    assert "error: 3 of 30 records (10.0%) cannot be used, more than 5.0%: 3 unreadable; first: llava.jsonl:3" in error
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "selection.parquet").exists()
    assert curate(data, *words, "--max-bad", "10%") == 0, "what was scored before is taken"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_that_are_killed_and_started_again_give_the_same_bytes(
    curate: Curate, models: dict[str, Path], llava: Any, tmp_path: Path
) -> None:
    data = llava(240, {100: "{broken"})
    words = [str(data), "--small", str(models["small"]), "--large", str(models["large"]), "--threads", "1"]
    words += ["--shard-size", "4"]
    program = "import sys; from nvila_pipelines.cli import main; main(sys.argv[1:])"
    killed = subprocess.Popen(
        [sys.executable, "-c", program, "curate", *words, "--out", "killed", "--processes", "2"],
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    shards = tmp_path / "killed" / "shards"
    wait_for(lambda: len(list(shards.glob("scores-*.parquet"))) >= 2, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not processes_of(tmp_path / "killed"))
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("scores-*.parquet")}
    assert 2 <= len(done) < 60
    assert not (tmp_path / "killed" / "scores.parquet").exists()
    assert curate(*words, "--out", "killed") == 0
    assert curate(*words, "--out", "peace") == 0
    assert {name: (shards / name).stat().st_mtime_ns for name in done} == done, "no finished shard is scored again"
    assert contents(tmp_path / "killed") == contents(tmp_path / "peace")


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(
    curate: Curate, models: dict[str, Path], llava: Any, tmp_path: Path
) -> None:
    data = llava(60)
    words = [data, "--small", models["small"], "--large", models["large"], "--threads", "1", "--shard-size", "7"]
    assert curate(*words, "--out", "one", "--method", "cluster") == 0
    assert curate(*words, "--out", "two", "--method", "cluster", "--processes", "2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_gives_the_same_bytes_as_one_process(
    curate: Curate, models: dict[str, Path], llava: Any, tmp_path: Path
) -> None:
    data = llava(60, {30: "{broken"})
    words = [str(data), "--small", str(models["small"]), "--large", str(models["large"]), "--threads", "1"]
    words += ["--shard-size", "7", "--method", "cluster", "--normalize", "token"]
    assert curate(*words, "--out", "one") == 0
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    agent += ["--nproc-per-node=2", "--no-python", str(Path(sys.executable).with_name("nvila")), "curate"]
    done = subprocess.run(
        [*agent, *words, "--out", "two"], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("kept 30 of 60 records") == 1, "one process speaks"
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "ended too early"
        time.sleep(0.01)


def processes_of(out: Path) -> list[int]:
    """Processes whose command line names the folder."""
    import psutil

    return [
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if any(str(out) in word for word in one.info["cmdline"] or ())
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.jsonl", "--small", "m"], "there is no folder to write to"),
        (["--out", "out"], "out has no scores yet"),
        (["--out", "out", "--dry-run"], "out has no scores to choose from"),
        (["x.jsonl", "--out", "out"], "there is no small model to score x.jsonl with"),
        (["x.jsonl", "--small", "none", "--out", "out"], "model folder none does not exist"),
        (["a", "b", "--out", "out"], "two data sets are named: a and b"),
        (["--out", "out", "--dtype", "bf16"], "--dtype scores, but no data set is named"),
        (["--out", "out", "--dry-run", "--processes", "2"], "--processes scores, --dry-run does not"),
        (["--keep-rate", "0.5"], "--keep-rate is about a data set"),
        (["--fast", "--out", "out"], "--fast is a recipe"),
        (["x", "--out", "out", "--keep-rate", "chart=2"], "--keep-rate 'chart=2': '2' is no share"),
        (["x", "--out", "out", "--shard-size", "0"], "argument --shard-size: '0' is no positive whole number"),
        (["x", "--out", "out", "--max-bad", "x"], "argument --max-bad: 'x' is no share, write 0.01 or 1%"),
    ],
)
def test_wrong_use_is_one_line_with_a_fix(words: list[str], message: str, curate: Curate, capsys: Any) -> None:
    assert curate(*words) == 2
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert message in first
    assert second.startswith("  fix: ")


def test_a_missing_data_set_is_named(curate: Curate, models: dict[str, Path], capsys: Any) -> None:
    assert curate("none.jsonl", "--small", models["small"], "--large", models["large"], "--out", "out") == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_only_the_first_rank_merges(
    curate: Curate, models: dict[str, Path], llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [llava(20), "--small", models["small"], "--large", models["large"], "--shard-size", "6", "--threads", "1"]
    assert curate(*words, "--out", "alone") == 0
    # The first rank leaves this before it scores; here the second one runs first.
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "alone" / "scoring.json", tmp_path / "out")
    words += ["--out", "out"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert curate(*words) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == [
        "scores-00001.parquet",
        "scores-00003.parquet",
    ]
    assert not (tmp_path / "out" / "scores.parquet").exists()
    monkeypatch.setenv("RANK", "0")
    assert curate(*words) == 0
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
