"""`nvila curate --out DIR`: a preview is what the choice then makes, and every option has an effect or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Curate = Callable[..., int]


@pytest.fixture
def answer(curate: Curate, capsys: Any) -> Callable[..., dict[str, Any]]:
    """Run the verb and return its JSON object without what differs by nature."""

    def run(*words: str) -> dict[str, Any]:
        assert curate("--out", "out", *words, "--json") == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return {name: found[name] for name in ("records", "kept", "statuses", "sources")}

    return run


def state(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_preview_shows_what_the_same_choice_makes(scored: Path, answer: Any) -> None:
    answer("--method", "cluster")  # makes the features
    before = state(scored)
    choices = (
        ["--keep-rate", "0.2", "--keep-rate", "vqa=75%"],
        ["--normalize", "token", "--max-delta", "0"],
        ["--min-delta", "0"],
        ["--method", "cluster", "--clusters", "2", "--seed", "3"],
        ["--method", "random", "--seed", "4", "--keep-rate", "0.3"],
    )
    previews = [answer(*choice, "--dry-run") for choice in choices]
    assert state(scored) == before
    assert [answer(*choice) for choice in choices] == previews
    assert len({json.dumps(preview) for preview in previews}) == len(choices), "each choice is another one"


def test_a_preview_says_what_it_lacks(curate: Curate, scored: Path, capsys: Any) -> None:
    assert curate("--out", "out", "--method", "cluster", "--dry-run") == 2
    assert "has no features of images yet" in capsys.readouterr().err
    shutil.rmtree(scored / "shards")
    assert curate("--out", "out", "--dry-run") == 0
    assert curate("--out", "out", "--normalize", "token", "--dry-run") == 2
    assert "shards is needed to normalize by token" in capsys.readouterr().err


def test_what_may_be_bad_is_remembered(
    curate: Curate, models: dict[str, Path], llava: Any, capsys: Any, tmp_path: Path
) -> None:
    data = llava(12, dict.fromkeys((2, 5, 7), "{broken"))
    words = (data, "--small", models["small"], "--large", models["large"], "--out", "out")
    assert curate(*words, "--max-bad", "30%") == 0
    assert curate("--out", "out", "--keep-rate", "0.2") == 0, "choosing again accepts what scoring did"
    assert curate(*words) == 0
    assert curate("--out", "out", "--max-bad", "20%") == 1
    assert "3 of 12 records (25.0%) cannot be used, more than 20.0%" in capsys.readouterr().err
    assert curate("--out", "out") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out", "--seed", "3"], "--seed changes nothing without a baseline"),
        (["--out", "out", "--clusters", "3"], "--clusters changes nothing without a baseline"),
        (["--out", "out", "--method", "random", "--clusters", "3"], "--clusters is of --method cluster"),
        (["--out", "out", "--min-delta", "3", "--max-delta", "1"], "min_delta 3 is above max_delta 1"),
        (["--out", "out", "--min-delta", "nan"], "argument --min-delta: 'nan' is no number"),
        (["--out", "out", "--max-delta", "much"], "argument --max-delta: 'much' is no number"),
        (["--out", "s3://bucket/out"], "--out s3:/bucket/out is no folder"),
        (["x.jsonl", "--out", "out", "--dry-run"], "--dry-run chooses from saved scores, not from x.jsonl"),
        (["--out", "out", "--dry-run", "--media-dir", "x"], "--media-dir scores, --dry-run does not"),
        (["--out", "out", "--dry-run", "--max-bad", "1"], "--max-bad was decided when the data was scored"),
    ],
)
def test_an_option_without_effect_is_refused(words: list[str], message: str, curate: Curate, capsys: Any) -> None:
    assert curate(*words) == 2
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert message in first
    assert second.startswith("  fix: ")


def test_torchrun_has_started_the_processes(
    curate: Curate, scored: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    words = json.loads((scored / "scoring.json").read_text())
    models = ("--small", words["small"], "--large", words["large"])
    assert curate(words["data"]["data"], *models, "--out", "out", "--processes", "2") == 2
    assert "--processes starts processes, and so did torchrun" in capsys.readouterr().err
