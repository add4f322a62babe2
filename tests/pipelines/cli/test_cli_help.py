"""The command's help: what it says, and that it needs nothing heavy to say it."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila_pipelines.cli import build_parser, main

HEAVY = {"torch", "transformers", "numpy", "mlflow", "kfp", "kserve", "fastapi", "pydantic", "rich", "PIL", "pyarrow"}
VERBS = [
    "run",
    "curate",
    "train",
    "plan",
    "tune",
    "adapters",
    "quantize",
    "evaluate",
    "compare",
    "gate",
    "sweep",
    "bench",
    "convert",
    "inspect",
    "lineage",
    "serve",
    "deploy",
    "rollback",
    "status",
    "drift",
    "pipeline",
    "store",
    "ui",
    "doctor",
    "version",
]


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def test_help_texts(golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    texts = [build_parser().format_help()] + [parser.format_help() for parser in verb_parsers().values()]
    golden("cli-help.txt", "\n----\n".join(texts))


def test_verbs_are_those_of_the_lifecycle() -> None:
    assert list(verb_parsers()) == VERBS


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_of_every_verb_is_printed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([verb] if verb else []), "--help"]) == 0
    assert f"usage: nvila {verb}".strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["curate", "--help"], ["version", "--json"], ["doctor"]]
)
def test_light_commands_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from nvila_pipelines.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert HEAVY.isdisjoint(done.stderr.split())
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_without_a_verb_the_help_is_shown_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_common_options(verb: str) -> None:
    needed = {
        "adapters": ["show", "a"],
        "convert": ["a", "b", "--to", "hf"],
        "inspect": ["m"],
        "lineage": ["r"],
        "store": ["gc"],
        "pipeline": ["list"],
        "plan": ["m", "d"],
        "rollback": ["e"],
        "tune": ["m", "d"],
    }.get(verb, [])
    words = [verb, *needed, "--workspace", "w", "--json", "--log-format", "json", "--debug"]
    args = build_parser().parse_args(words)
    assert (args.workspace, args.json, args.log_format, args.debug) == (Path("w"), True, "json", True)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["run", "fast", "seed=1", "--serve"], ["fast", "seed=1"]),
        (["run", "--serve", "fast", "seed=1"], ["fast", "seed=1"]),
        (["run", "fast", "--port", "1", "seed=1"], ["fast", "seed=1"]),
        (["run", "fast", "--serve", "seed=1", "--json", "name=x"], ["fast", "seed=1", "name=x"]),
    ],
)
def test_words_may_stand_on_both_sides_of_options(words: list[str], found: list[str]) -> None:
    assert build_parser().parse_args(words).words == found


@pytest.mark.parametrize(
    ("words", "error", "fix"),
    [
        (["rnu"], "error: argument VERB: 'rnu' is unknown", "did you mean 'run'? see nvila --help"),
        (["run", "--fsat"], "error: unrecognized arguments: --fsat", "did you mean '--fast'? see nvila run --help"),
        (["doctor", "word"], "error: unrecognized arguments: word", "see nvila doctor --help"),
        (["run", "--serv"], "error: unrecognized arguments: --serv", "did you mean '--serve'?"),
        (["serve", "--port", "70000"], "'70000' is not a port", "see nvila serve --help"),
        (["ui", "--port", "x"], "'x' is not a port", "see nvila ui --help"),
        (["run", "--log-format", "jsno"], "'jsno' is unknown", "did you mean 'json'?"),
    ],
)
def test_wrong_usage_is_one_line_with_a_fix(
    words: list[str], error: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert error in first
    assert re.match(r"  fix: ", second)
    assert fix in second
