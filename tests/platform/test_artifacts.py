"""Content keys, manifests, verification and redaction."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ArtifactError, ConfigError, NvilaError, ResourceError
from nvila_platform import artifacts
from nvila_platform.artifacts import (
    Manifest,
    code_version,
    content_key,
    read_manifest,
    redact,
    storage_errors,
    utc_now,
    verify,
    write_atomically,
    write_manifest,
)

KEY = "ab" * 32


def finished(directory: Path, *, text: str = "weights", **changes: Any) -> Manifest:
    (directory / "model").mkdir(parents=True, exist_ok=True)
    (directory / "model" / "w.safetensors").write_text(text)
    (directory / "report.json").write_text("{}")
    values: dict[str, Any] = {
        "step": "train",
        "key": KEY,
        "config": {"lr": 1e-3, "stages": ["align", "vision"]},
        "inputs": {"data": "d" * 64},
        "code_version": "1+abc",
        "started_at": utc_now(),
        "metrics": {"loss": 0.5},
    }
    return write_manifest(directory, **(values | changes))


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    written = finished(tmp_path)
    assert read_manifest(tmp_path) == written
    assert [entry.path for entry in written.outputs] == ["model/w.safetensors", "report.json"]
    assert written.outputs[0].size_bytes == 7
    assert written.started_at <= written.finished_at


def test_equal_bytes_have_equal_digests_whenever_they_were_made(tmp_path: Path) -> None:
    first = finished(tmp_path / "a")
    later = finished(tmp_path / "b", config={"lr": 2}, started_at="2020-01-01T00:00:00+00:00", metrics={})
    assert first.digest == later.digest
    assert finished(tmp_path / "c", text="other").digest != first.digest
    assert finished(tmp_path / "d", step="tune").digest != first.digest


def test_the_digest_is_in_the_file_for_readers_without_this_package(tmp_path: Path) -> None:
    manifest = finished(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["digest"] == manifest.digest


@pytest.mark.parametrize(
    "changed",
    [("tune", {"a": 1}, {"x": "d"}, "v"), ("s", {"a": 2}, {"x": "d"}, "v"), ("s", {"a": 1}, {"x": "e"}, "v"),
     ("s", {"a": 1}, {"y": "d"}, "v"), ("s", {"a": 1}, {"x": "d"}, "w")],
    ids=["step", "config", "input-digest", "input-name", "code"],
)  # fmt: skip
def test_every_part_changes_the_key(changed: tuple[str, dict[str, int], dict[str, str], str]) -> None:
    assert content_key(*changed) != content_key("s", {"a": 1}, {"x": "d"}, "v")


def test_the_order_of_names_does_not_change_the_key() -> None:
    one = content_key("s", {"a": 1, "b": (1, 2)}, {"x": "1", "y": "2"}, "v")
    assert one == content_key("s", {"b": [1, 2], "a": 1}, {"y": "2", "x": "1"}, "v")


@pytest.mark.parametrize("value", [object(), float("nan")], ids=["object", "nan"])
def test_a_config_without_json_form_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="no JSON form"):
        content_key("s", {"a": value}, {}, "v")


def test_the_code_version_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(artifacts, "_source_roots", lambda package: [tmp_path] if package == "nvila" else [])
    (tmp_path / "a.py").write_text("x = 1")
    versions = [code_version.__wrapped__()]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("compiled")
    assert code_version.__wrapped__() == versions[0]
    (tmp_path / "a.py").write_text("x = 2")
    versions.append(code_version.__wrapped__())
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    versions.append(code_version.__wrapped__())
    assert len(set(versions)) == 3


def test_the_code_version_covers_the_packages_on_this_machine() -> None:
    from nvila import __version__

    assert code_version().startswith(f"{__version__}+")
    assert code_version() is code_version()


def test_a_directory_without_a_manifest_is_unfinished(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "missing") is None
    with pytest.raises(ArtifactError, match="did not finish"):
        verify(tmp_path)


def test_a_crash_while_the_manifest_is_written_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path)
    assert read_manifest(tmp_path) is None
    finished(tmp_path)
    assert [entry.path for entry in verify(tmp_path).outputs] == ["model/w.safetensors", "report.json"]


def test_files_with_a_dot_are_scratch_and_not_outputs(tmp_path: Path) -> None:
    (tmp_path / ".checkpoints").mkdir()
    (tmp_path / ".checkpoints" / "step-10").write_text("x")
    (tmp_path / ".manifest.json.1.tmp").write_text("left by a killed process")
    finished(tmp_path)
    assert [entry.path for entry in verify(tmp_path).outputs] == ["model/w.safetensors", "report.json"]


def damage_bytes(directory: Path) -> None:
    (directory / "model" / "w.safetensors").write_text("WEIGHTS")


def truncate(directory: Path) -> None:
    os.truncate(directory / "model" / "w.safetensors", 3)


def delete(directory: Path) -> None:
    (directory / "model" / "w.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(damage_bytes, "sha256"), (truncate, "3 bytes, the manifest says 7"), (delete, "cannot be read")],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    finished(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=says) as caught:
        verify(tmp_path)
    assert str(tmp_path / "model" / "w.safetensors") in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"loss": 0.5', '"loss": 0.1', "was changed"),
        ('"schema_version": 1', '"schema_version": 99', "schema 99"),
        ('"checksum"', '"chksum"', "not a manifest"),
        ("{", "", "not a manifest"),
    ],
    ids=["metric", "schema", "no-checksum", "broken-json"],
)
def test_a_tampered_manifest_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    finished(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ArtifactError, match=says) as caught:
        read_manifest(tmp_path)
    assert str(path) in caught.value.message


def test_bytes_that_are_no_text_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", ""])
def test_an_output_path_that_leaves_the_directory_is_refused(tmp_path: Path, path: str) -> None:
    finished(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["outputs"][0]["path"] = path
    del record["checksum"]
    record["checksum"] = artifacts._sha256_json(record)
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="leaves the directory"):
        verify(tmp_path)


def test_a_link_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="is a link"):
        finished(tmp_path)
    assert read_manifest(tmp_path) is None


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="metric 'loss' is nan"):
        finished(tmp_path, metrics={"loss": float("nan")})


def test_secrets_are_redacted_by_name_and_in_urls() -> None:
    config = {
        "hf_token": "t1",
        "s3": {"secretKey": "t2", "access_key_id": "t3", "endpoint": "h:9000"},
        "api_key": ["t4", "t5"],
        "uri": "http://me:t6@host/x",
        "credentials": {"user": "t7"},
        "image_token_id": 151643,
        "max_tokens": 64,
        "tokenizer": "qwen2",
        "keyboard": "us",
        "password": "",
    }
    assert redact(config) == {
        "hf_token": "***",
        "s3": {"secretKey": "***", "access_key_id": "***", "endpoint": "h:9000"},
        "api_key": ["***", "***"],
        "uri": "http://***@host/x",
        "credentials": {"user": "***"},
        "image_token_id": 151643,
        "max_tokens": 64,
        "tokenizer": "qwen2",
        "keyboard": "us",
        "password": "",
    }
    assert config["hf_token"] == "t1"


def test_a_manifest_holds_no_secret(tmp_path: Path) -> None:
    finished(tmp_path, config={"hf_token": "hunter2"})
    assert "hunter2" not in (tmp_path / "manifest.json").read_text()
    assert verify(tmp_path).config == {"hf_token": "***"}


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENOSPC, ResourceError, "no space left"),
        (errno.EDQUOT, ResourceError, "no space left"),
        (errno.EACCES, ConfigError, "--workspace"),
        (errno.EROFS, ConfigError, "--workspace"),
        (errno.ENOTDIR, ConfigError, "--workspace"),
    ],
)
def test_storage_errors_become_one_line_with_the_fix(
    number: int, error: type[NvilaError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught, storage_errors(tmp_path / "place"):
        raise OSError(number, os.strerror(number))
    assert "place" in caught.value.message
    assert "\n" not in str(caught.value)


def test_other_storage_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as caught, storage_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, NvilaError)


def test_a_full_disk_leaves_the_old_text_and_no_rubbish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "state.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    with pytest.raises(ResourceError, match="no space left"):
        finished(tmp_path / "step")
