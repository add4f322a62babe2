"""Lineage: from a digest back to what it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.errors import ArtifactError
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.lineage import trace
from nvila_platform.store import ArtifactRef, LocalStore


def make(store: LocalStore, step: str, text: str, config: dict[str, object], **inputs: str) -> ArtifactRef:
    key = content_key(step, config, inputs, "1+code")
    directory = store.work_dir(step, key)
    (directory / "out.txt").write_text(text)
    write_manifest(
        directory,
        step=step,
        key=key,
        config=config,
        inputs=inputs,
        code_version="1+code",
        started_at=utc_now(),
        metrics={"size": float(len(text))},
    )
    return store.publish(directory)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_the_tree_reaches_the_data(store: LocalStore) -> None:
    data = make(store, "data", "samples", {"name": "easy-vqa"}, download="f" * 64)
    curated = make(store, "curate", "half", {"keep": 0.5}, data=data.digest)
    model = make(store, "train", "weights", {"stages": {"align": {"lr": 1}}, "kinds": ["a", "b"]}, data=curated.digest)
    root = trace(store, model.digest)
    assert (root.step, root.digest, root.code_version) == ("train", model.digest, "1+code")
    assert root.config == {"stages.align.lr": 1, "kinds": "a, b"}
    assert root.metrics == {"size": 7.0}
    source = root.inputs["data"].inputs["data"]
    assert (source.step, source.config) == ("data", {"name": "easy-vqa"})
    assert (source.inputs["download"].step, source.inputs["download"].digest) == ("", "f" * 64)
    assert list(root.lines()) == [
        f"train {model.digest[:12]} 1+code",
        f"  data: curate {curated.digest[:12]} 1+code",
        f"    data: data {data.digest[:12]} 1+code",
        "      download: external ffffffffffff",
    ]
    assert root.to_dict()["inputs"]["data"]["inputs"]["data"]["step"] == "data"


def test_the_checkpoint_of_each_stage_has_a_line(store: LocalStore) -> None:
    def trained(text: str) -> str:
        key = content_key("train", {"text": text}, {}, "1+code")
        directory = store.work_dir("train", key)
        for folder, content in (("1-align", "same"), ("10-last", text), ("2-pretrain", text), ("model", text)):
            (directory / folder).mkdir()
            (directory / folder / "w.bin").write_text(content)
        write_manifest(directory, step="train", key=key, config={}, inputs={}, code_version="v", started_at=utc_now())
        return store.publish(directory).digest

    one, other = trace(store, trained("one")), trace(store, trained("other"))
    assert list(one.stages) == ["1-align", "2-pretrain", "10-last"]
    assert one.stages["1-align"] == other.stages["1-align"]
    assert one.stages["2-pretrain"] != other.stages["2-pretrain"]
    assert list(one.lines())[1] == f"  1-align: stage {one.stages['1-align'][:12]}"
    assert one.to_dict()["stages"] == one.stages


def test_a_shared_input_is_shown_under_both(store: LocalStore) -> None:
    data = make(store, "data", "samples", {})
    model = make(store, "train", "weights", {}, data=data.digest)
    report = make(store, "evaluate", "report", {}, model=model.digest, data=data.digest)
    root = trace(store, report.digest)
    assert root.inputs["data"] == root.inputs["model"].inputs["data"]


def test_an_unknown_digest_is_an_error(store: LocalStore) -> None:
    with pytest.raises(ArtifactError, match="no artifact with digest 0000"):
        trace(store, "0" * 64)


def test_a_step_that_copies_its_input_ends_the_walk(store: LocalStore) -> None:
    first = make(store, "train", "same", {"round": 1})
    second = make(store, "train", "same", {"round": 2}, model=first.digest)
    assert first.digest == second.digest
    root = trace(store, second.digest)
    assert root.config == {"round": 2}
    assert root.inputs["model"].inputs == {}
