"""`nvila tune` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.pipelines.conftest import Nvila

from nvila.assembly import load_model
from nvila_platform.settings import Settings

QUICK = ("--steps", 6, "--eval-every", 3, "--rank", 4, "--held-out", "0.2")


def test_a_folder_becomes_a_registered_model(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, "--method", "full+full", "--lr", 0.005, "--epochs", 20, "--json")
    assert done.code == 0, done.err
    result = done.last_json
    assert result["model"] == "models:/nvila-tuned/1"
    assert result["scores"]["after"]["held_out"] > result["scores"]["before"]["held_out"]
    losses = {one["step"]: one["loss"] for one in result["losses"]}
    assert losses[result["best_step"]] == min(losses.values()) < losses[0]
    report = Path(result["path"]).with_name("report.html").read_text()
    assert "what color is the shape?" in report
    assert "data:image/png;base64" in report
    again = nvila("tune", base, pictures, "--method", "full+full", "--lr", 0.005, "--epochs", 20, "--json")
    assert again.last_json["reused"]
    assert again.last_json["model"] == result["model"]
    # What was registered is found, and carries its lineage.
    from nvila_pipelines.cli.serve import find_model
    from nvila_platform.lineage import trace
    from nvila_platform.store import open_store

    settings = Settings.load(Path("nvila-workspace"), {})
    source = find_model("models:/nvila-tuned@candidate", settings)
    assert source.digest == result["digest"]
    assert set(trace(open_store(settings), source.digest).inputs) == {"base", "data"}


def test_an_adapter_is_evaluated_and_served_without_merging(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, *QUICK, "--no-register", "--json")
    assert done.code == 0, done.err
    folder = Path(done.last_json["path"])
    assert (folder / "nvila_adapter.json").is_file()
    assert done.last_json["model"] is None
    from nvila.data.records import Message, Part
    from nvila.inference.engine import Engine, SamplingParams

    engine = Engine.load(folder)
    message = Message(role="user", content=(Part(type="text", value="what color is the shape?"),))
    assert list(engine.stream([message], {}, SamplingParams(max_tokens=2)))


def test_dry_run_lists_what_learns_and_reads_no_weights(nvila: Nvila, base: Path, pictures: Path) -> None:
    copy = Path("without weights")
    shutil.copytree(base, copy)
    (copy / "model.safetensors").write_bytes(b"never read")
    done = nvila("tune", copy, pictures, "--method", "ln+qlora", "--rank", 4, "--dry-run")
    assert done.code == 0, done.err
    assert "vision: 256 of" in done.out
    assert "model.vision_tower.encoder.layers.0.layer_norm1.weight" in done.out
    assert "model.language_model.layers.1.mlp.down_proj.lora_B" in done.out
    assert not Path("nvila-workspace/artifacts").exists()


def test_only_chooses_experts(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, "--only", "*.layers.0.*", "--rank", 4, "--dry-run", "--json")
    names = [name for part in done.last_json["parts"].values() for name in part["names"]]
    assert names
    assert all(".layers.0." in name for name in names)
    wrong = nvila("tune", base, pictures, "--only", "*.expert.*", "--dry-run")
    assert wrong.code == 2
    assert "only=*.expert.* matches no layer" in wrong.err


@pytest.mark.slow
def test_ratio_auto_shows_a_table_and_a_plot(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, *QUICK, "--lr-ratio", "auto", "--no-register", "--json")
    assert done.code == 0, done.err
    ratios = done.last_json["ratios"]
    assert [one["ratio"] for one in ratios] == [1, 5, 10, 50]
    best = min(ratios, key=lambda one: one["loss"])
    rates = done.last_json["rates"]
    assert rates["language"] / rates["vision"] == pytest.approx(best["ratio"])
    assert "Learning-rate ratio" in Path(done.last_json["path"]).with_name("report.html").read_text()


def test_ratio_auto_needs_a_tower_that_learns(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, "--lr-ratio", "auto", "--vision", "frozen", "--steps", 2)
    assert done.code == 2
    assert "which is frozen" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "ln+loro"), "did you mean 'lora'"),
        (("--method", "ln+lora", "--vision", "full"), "both say how vision is tuned"),
        (("--scorer", "exakt"), "there is no scorer 'exakt'"),
        (("--held-out", "1.5"), "is no share"),
        (("--device", "cuda"), "there is no GPU here"),
        (("--lr", "-1"), "no number above 0"),
    ],
)
def test_wrong_options_are_one_line(
    nvila: Nvila, base: Path, pictures: Path, words: tuple[str, ...], message: str
) -> None:
    done = nvila("tune", base, pictures, *words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_one_broken_line_is_named_before_the_model_is_loaded(nvila: Nvila, base: Path, pictures: Path) -> None:
    file = pictures / "data.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = '{"image": "images/4.png", "question": '
    file.write_text("\n".join(lines))
    done = nvila("tune", base, pictures, *QUICK, "--no-register")
    assert done.code == 1
    assert "data.jsonl:5: broken JSON: Expecting value at character 38" in done.err
    assert "raise max_bad (of nvila tune: --max-bad)" in done.err
    allowed = nvila("tune", base, pictures, *QUICK, "--no-register", "--max-bad", "0.1", "--json")
    assert allowed.code == 0, allowed.err
    assert allowed.last_json["samples"]["set_aside"] == 1


def test_images_without_texts_are_told_what_is_missing(nvila: Nvila, base: Path, pictures: Path) -> None:
    (pictures / "data.jsonl").unlink()
    done = nvila("tune", base, pictures)
    assert done.code == 1
    assert "holds 30 images and no texts" in done.err
    assert "data.jsonl" in done.err.split("fix:")[1]


def test_four_bit_is_refused_where_no_kernel_exists(nvila: Nvila, base: Path, pictures: Path) -> None:
    copy = Path("odd")
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    done = nvila("tune", copy, pictures, "--method", "ln+qlora")
    assert done.code == 1
    assert "intermediate_size 100" in done.err


def test_forgetting_stops_the_registration(nvila: Nvila, base: Path, pictures: Path) -> None:
    # A guard that the base does well on: the very questions, with the answers that it gives already.
    from nvila.errors import GateError
    from nvila_pipelines.curation.spec import DataSpec
    from nvila_pipelines.tuning.request import TuneRequest
    from nvila_pipelines.tuning.run import _check_guard

    request = TuneRequest(model=base, data=DataSpec(data=str(pictures)), guard=("easy_vqa",), max_drop=0.05)
    scores = {"guard": ["easy_vqa"], "before": {"easy_vqa": 0.9}, "after": {"easy_vqa": 0.86}}
    _check_guard(request, {"scores": scores}, pictures)
    scores["after"] = {"easy_vqa": 0.84}
    with pytest.raises(GateError, match=r"fell from 0\.900 to 0\.840 on easy_vqa"):
        _check_guard(request, {"scores": scores}, pictures)


def test_the_guard_is_asked_before_and_after(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila(
        "tune", base, pictures, *QUICK, "--guard", "easy_vqa", "--guard-limit", 8, "--max-drop", "100%", "--json"
    )
    assert done.code == 0, done.err
    scores = done.last_json["scores"]
    assert scores["guard"] == ["easy_vqa"]
    assert scores["before"].keys() == scores["after"].keys() == {"held_out", "easy_vqa"}


def test_merge_leaves_a_plain_model(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, *QUICK, "--merge", "--no-register", "--json")
    assert done.code == 0, done.err
    folder = Path(done.last_json["path"])
    assert not (folder / "nvila_adapter.json").exists()
    load_model(folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_processes_sweep_and_tune_together(nvila: Nvila, base: Path, pictures: Path) -> None:
    found = {}
    for processes in (1, 2):
        words = ("--lr-ratio", "auto", "--dropout", 0, "--processes", processes)
        done = nvila("tune", base, pictures, *QUICK, *words, "--workspace", f"workspace-{processes}", "--json")
        assert done.code == 0, done.err
        found[processes] = done.last_json
    one, two = found[1], found[2]
    assert [trial["loss"] for trial in two["ratios"]] == pytest.approx([t["loss"] for t in one["ratios"]], rel=1e-3)
    assert [look["loss"] for look in two["losses"]] == pytest.approx([t["loss"] for t in one["losses"]], rel=1e-3)
    assert two["model"] == "models:/nvila-tuned/1"
    # Each of the two had a part of the batch.
    assert two["memory"]["predicted"] < one["memory"]["predicted"]
    assert "--lr-ratio auto" in done.err


def test_a_licence_goes_along_from_base_to_tuned_to_quantized(
    nvila: Nvila, base: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from nvila_platform.registry import resolve, version_tags

    copy = Path("licensed")
    shutil.copytree(base, copy)
    (copy / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: team/eyes\n---\n")
    tuned = nvila("tune", copy, pictures, *QUICK)
    assert tuned.code == 0, tuned.err
    assert "must not be used commercially" in caplog.text
    assert (Path(tuned.out.rpartition("model: ")[2].splitlines()[0]) / "nvila_adapter.json").is_file()
    words = ("--vision", "none", "--language", "fp8", "--no-speed", "--register", "small@candidate")
    small = nvila("quantize", "models:/nvila-tuned@candidate", *words, "--json")
    assert small.code == 0, small.err
    # What was learned is in the weights, not beside them.
    names = json.loads(small.out.splitlines()[-1])["path"]
    assert not [name for name in load_file(Path(names) / "model" / "model.safetensors") if "lora" in name]
    assert not list(Path(names).glob(".merged"))
    settings = Settings.load(Path("nvila-workspace"), {})
    for name in ("nvila-tuned", "small"):
        tags = version_tags(settings, resolve(settings, f"models:/{name}@candidate"))
        assert tags["nvila.licence"] == "cc-by-nc-4.0"
        assert tags["nvila.base_models"] == "team/eyes"


def test_a_name_that_cannot_be_registered_is_refused_before_any_work(
    nvila: Nvila, base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila_pipelines.tuning.run.prepare", lambda *_: pytest.fail("it began to work"))
    done = nvila("tune", base, pictures, "--name", "a b")
    assert done.code == 2
    assert "'a b' cannot be registered" in done.err
