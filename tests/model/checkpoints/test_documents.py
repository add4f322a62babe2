"""Model cards and licences beside weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nvila.checkpoints.documents import Origin, carry_documents, read_origin, write_base_documents


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, Origin()),
        ("# Only text\n", Origin()),
        ("---\nlicense: MIT\n---\n", Origin(licence="mit")),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", Origin(licence="qwen-research")),
        ("---\nlicense: other\n---\n", Origin()),
        ("---\nlicense: mit\nbase_model: a/b\n---\n", Origin(licence="mit", base_models=("a/b",))),
        ("---\nbase_model:\n- a/b\n- c/d\n---\ntext\n---\nmore", Origin(base_models=("a/b", "c/d"))),
        ("---\nlicense: [\n---\n", Origin()),
        ("---\n- a list\n---\n", Origin()),
    ],
    ids=["none", "no-head", "licence", "named", "other", "base", "bases", "broken", "list"],
)
def test_a_card_is_read(tmp_path: Path, card: str | None, expected: Origin) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_origin(tmp_path) == expected


def test_bytes_that_are_no_text_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_origin(tmp_path) == Origin()


def test_documents_go_along_and_replace_none(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in ("LICENSE.txt", "NOTICE", "README.md", "config.json"):
        (source / name).write_text(f"old {name}")
    (target / "README.md").write_text("new")
    carry_documents(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "LICENSE.txt": "old LICENSE.txt",
        "NOTICE": "old NOTICE",
        "README.md": "new",
    }


def test_a_model_of_two_parts_names_both_and_the_stricter_licence(tmp_path: Path) -> None:
    for name, head in (("vision", "license: gemma"), ("language", "license: apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{head}\n---\n")
        (tmp_path / name / "LICENSE.txt").write_text(name)
    (tmp_path / "model").mkdir()
    parts = {"vision": ("google/siglip", tmp_path / "vision"), "language": ("Qwen/Qwen2", tmp_path / "language")}
    write_base_documents(parts, tmp_path / "model")
    assert read_origin(tmp_path / "model") == Origin(licence="gemma", base_models=("google/siglip", "Qwen/Qwen2"))
    assert (tmp_path / "model" / "LICENSE.vision.txt").read_text() == "vision"
    assert (tmp_path / "model" / "LICENSE.language.txt").read_text() == "language"
    # The Hub's own reader takes it.
    assert ModelCard.load(tmp_path / "model" / "README.md").data.license == "gemma"


def test_two_strict_licences_have_a_name_of_their_own(tmp_path: Path) -> None:
    for name in ("gemma", "llama3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {name}\n---\n")
    write_base_documents({name: (f"x/{name}", tmp_path / name) for name in ("gemma", "llama3")}, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name) == ("other", "gemma and llama3")
    assert read_origin(tmp_path).licence == "gemma and llama3"
