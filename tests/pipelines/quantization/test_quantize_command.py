"""`nvila quantize MODEL`: the real work on an untrained model of small widths, and every way to ask for it wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_platform.artifacts import read_manifest

FEW = ("--samples", "6", "--eval-samples", "12", "--budget", "100")


def test_a_model_is_quantized_measured_and_found_again(
    nvila: Callable[..., Any], model_folder: Path, data_file: Path
) -> None:
    done = nvila("quantize", model_folder, "--data", data_file, *FEW, "--json")
    assert done.code == 0, done.err
    found = done.last_json
    folder = Path(found["path"])
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    assert report == found["report"]
    assert [(part["part"], part["method"]) for part in report["parts"]] == [
        ("vision", "SmoothQuant"),
        ("language", "AWQ"),
    ]
    # 96 inputs: no 64 divides them.
    assert report["config"]["group_size"] == 32
    assert (report["num_calibration"], report["after"]["num_samples"]) == (6, 12)
    assert report["parts"][0]["speed_after"]["ttft_ms"] > 0
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.metrics["quantized_bytes"] == report["sizes"]["quantized"]["total"]
    assert set(manifest.inputs) == {"model", "data"}

    from nvila.modeling import NVILAForConditionalGeneration

    loaded = NVILAForConditionalGeneration.from_pretrained(folder / "model")
    assert hasattr(loaded.model.language_model.layers[0].mlp.up_proj.weight, "qdata")

    again = nvila("quantize", model_folder, "--data", data_file, *FEW)
    assert "this was done before" in again.err
    lines = again.out.splitlines()
    assert lines[0].split()[:3] == ["part", "scheme", "how"]
    assert [line.split()[0] for line in lines[1:4]] == ["vision", "language", "whole"]
    assert lines[-1] == f"model: {folder / 'model'}"
    other = nvila("quantize", model_folder, "--data", data_file, *FEW, "--alpha", "0.3", "--no-speed", "--json")
    assert other.last_json["key"] != found["key"]
    assert other.last_json["report"]["speed_after"] is None

    refused = nvila("quantize", folder / "model", "--vision", "none")
    assert refused.code == 2
    assert "is quantized already" in refused.err


def test_a_result_is_copied_registered_and_evaluated(
    nvila: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    exports = ("--export", "gguf", "--export", "compressed-tensors")
    words = (
        *exports,
        "--vision",
        "none",
        "--language",
        "fp8",
        "--out",
        tmp_path / "small",
        "--register",
        "tiny@candidate",
    )
    done = nvila("quantize", model_folder, *words, "--json")
    assert done.code == 0, done.err
    assert done.last_json["model"] == "models:/tiny@candidate"
    assert done.last_json["version"] == "models:/tiny/1"
    assert done.last_json["path"] == str(tmp_path / "small")
    assert "rounded to nearest" in done.err
    assert (tmp_path / "small" / "model" / "config.json").is_file()
    assert (tmp_path / "small" / "exports" / "language.gguf").is_file()
    assert (tmp_path / "small" / "exports" / "language-compressed-tensors" / "model.safetensors").is_file()

    from nvila_platform.registry import resolve
    from nvila_platform.settings import Settings

    version = resolve(Settings.load(None), "models:/tiny@candidate")
    assert version.digest == done.last_json["digest"]
    from mlflow import MlflowClient

    from nvila_platform.mlflow_backend import connect

    client: MlflowClient = connect(Settings.load(None))
    tags = client.get_model_version("tiny", str(version.version)).tags
    assert tags["nvila.quantization.language"] == "fp8"
    assert float(tags["nvila.quantization.quantized_bytes"]) > 0
    chained = nvila("quantize", "models:/tiny@candidate")
    assert chained.code == 2  # what the registry has is quantized
    assert "is quantized already" in chained.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vision", "none", "--language", "none"), "neither part is to be quantized"),
        (("--vision", "w9a9"), "did you mean"),
        (("--samples", "4"), "--samples is about data, but none is named"),
        (("--budget", "-1"), "'-1' is no number of points"),
        (("--alpha", "2"), "'2' is not between 0 and 1"),
        (("--fast",), "--fast is a recipe, but a model is meant"),
        (("--register", "@best"), "--register '@best' names no model"),
        (("--register", "a b"), "'a b' cannot be registered"),
        (("--register", "tiny@best"), "unknown alias 'best'"),
        (("--group-size", "48", "--vision", "none"), "group_size 48 does not divide the 64 inputs of"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("seed=1", "--vision", "int8"), "seed=1 follows the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_one_line(
    nvila: Callable[..., Any], model_folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = nvila("quantize", model_folder, *words)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_name_that_cannot_be_registered_is_refused_before_any_work(
    nvila: Callable[..., Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila_pipelines.cli.quantize.make_request", lambda *_: pytest.fail("it began to work"))
    for name in ("a b", "tiny@best"):
        assert nvila("quantize", model_folder, "--vision", "none", "--register", name).code == 2


def test_options_of_a_model_need_one(nvila: Callable[..., Any]) -> None:
    done = nvila("quantize", "--language", "int8")
    assert done.code == 2
    assert "--language is about a model, but none is named" in done.err


def test_an_existing_folder_is_not_written_over(nvila: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "there")
    done = nvila("quantize", model_folder, "--out", tmp_path / "there")
    assert done.code == 2
    assert "there exists" in done.err
