"""What the documents tell a reader to type exists: make targets, verbs and flags of the command, linked files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SHELLS = {"", "bash", "console", "sh", "shell"}
# What ends one command on a line: the rest belongs to another program.
OPERATORS = {"|", "||", "&&", ";", "&", ">", ">>", "2>", "<"}


def shell_lines(text: str) -> Iterator[str]:
    """Yield the command lines of fenced shell blocks; a backslash at the end of a line continues it."""
    for language, block in re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Every use of a program in a document's shell blocks: document name and arguments."""
    found = []
    for document in DOCUMENTS:
        for line in shell_lines(document.read_text(encoding="utf-8")):
            if not re.match(rf"{program}(\s|$)", line):
                continue
            words = shlex.split(line, comments=True)
            end = next((index for index, word in enumerate(words) if word in OPERATORS), len(words))
            found.append((str(document.relative_to(ROOT)), words[1:end]))
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def nvila_parser() -> argparse.ArgumentParser:
    if importlib.util.find_spec("nvila_pipelines.cli") is None:
        pytest.skip("the nvila command does not exist yet")
    module = importlib.import_module("nvila_pipelines.cli")
    if module.__file__ is None:
        pytest.skip("the nvila command does not exist yet")
    parser = module.build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def test_readme_exists() -> None:
    assert (ROOT / "README.md").is_file()


def test_documented_make_targets_exist() -> None:
    targets = make_targets()
    unknown = [
        f"{document}: make {word}"
        for document, words in commands("make")
        for word in words
        if "=" not in word and not word.startswith("-") and word not in targets
    ]
    assert not unknown, "\n".join(unknown)


def test_documented_tests_exist() -> None:
    named = [
        (document.name, path, test)
        for document in DOCUMENTS
        for path, test in re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", document.read_text(encoding="utf-8"))
    ]
    assert named, "docs/faults.md names a test for each row"
    gone = [
        f"{document}: {path}::{test}"
        for document, path, test in named
        if not (file := ROOT / "tests" / path).is_file() or f"def {test}(" not in file.read_text(encoding="utf-8")
    ]
    assert not gone, "\n".join(gone)


def test_documented_nvila_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    parser = nvila_parser()
    wrong = []
    for document, words in commands("nvila"):
        try:
            parser.parse_args(words)
        except SystemExit as stop:
            if stop.code:
                wrong.append(f"{document}: nvila {' '.join(words)}: {capsys.readouterr().err.strip()}")
    assert not wrong, "\n".join(wrong)


def test_make_help_lists_every_documented_target() -> None:
    described = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"help", "demo", "test", "test-all", "check", "format", "bench", "golden", "clean"} <= set(described)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    missing = []
    for target in (first or second for first, second in targets):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:") and not (document.parent / path).exists():
            missing.append(target)
    assert not missing


def test_shell_lines_joins_continuations_and_skips_other_languages() -> None:
    text = "```bash\n$ nvila run \\\n  --fast\n```\n\n```python\nmake = 1\n```\n"
    assert [line.split() for line in shell_lines(text)] == [["nvila", "run", "--fast"]]
