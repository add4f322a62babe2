"""Curate, train, quantize and evaluate, really run on a few images: what they leave, and that it is always the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila.curation.scoring import AnswerScore
from nvila.data.dataset import load_samples
from nvila.data.records import read_jsonl, vqa_sample
from nvila.errors import DataError
from nvila.quantization.resume import PartStates
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.curate import _merged_deltas, _ranked, scorer_subset
from nvila_platform.artifacts import file_sha256
from nvila_platform.settings import Settings
from nvila_platform.training.backup_store import FolderBackups
from nvila_platform.training.history import HISTORY_FILE, read_history


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every output; hidden files are scratch."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    relative = {path.relative_to(directory): path for path in files}
    return {str(name): file_sha256(path) for name, path in relative.items() if not str(name).startswith(".")}


@pytest.fixture(scope="module")
def module_bench(request: pytest.FixtureRequest, micro: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("steps")
    # The class comes from the fixture's module: tests import nothing from each other.
    made = request.getfixturevalue("bench_class")
    variables = {"NVILA_PEAK_TFLOPS": "0.1", "NVILA_WATTS_PER_CORE": "10", "NVILA_CHECKPOINT_URI": str(root / "volume")}
    return made(micro, Settings.load(root / "ws", variables), root / "bench")


@pytest.fixture(scope="module")
def curated(module_bench: Any, data_dir: Path) -> tuple[dict[str, float], Path]:
    found: tuple[dict[str, float], Path] = module_bench.run("curate", {"data": data_dir})
    return found


@pytest.fixture(scope="module")
def trained(module_bench: Any, data_dir: Path, curated: tuple[dict[str, float], Path]) -> tuple[dict[str, float], Path]:
    found: tuple[dict[str, float], Path] = module_bench.run("train", {"data": data_dir, "selection": curated[1]})
    return found


@pytest.fixture(scope="module")
def quantized(
    module_bench: Any, data_dir: Path, trained: tuple[dict[str, float], Path]
) -> tuple[dict[str, float], Path]:
    found: tuple[dict[str, float], Path] = module_bench.run("quantize", {"data": data_dir, "model": trained[1]})
    return found


def test_curation_keeps_the_share_of_every_source(curated: tuple[dict[str, float], Path], data_dir: Path) -> None:
    import pyarrow.parquet as pq

    metrics, out = curated
    samples = load_samples(data_dir, "train")
    table = pq.read_table(out / "selection.parquet").to_pydict()
    assert table["id"] == [sample.id for sample in samples]
    for source in set(table["source"]):
        rows = [kept for name, kept in zip(table["source"], table["kept"], strict=True) if name == source]
        assert abs(sum(rows) - len(rows) / 2) <= 1, source
    kept = [name for name, keep in zip(table["id"], table["kept"], strict=True) if keep]
    assert [sample.id for sample in read_jsonl(out / "selected.jsonl")] == kept
    assert (metrics["scored"], metrics["kept"]) == (len(samples), len(kept))
    scores = pq.read_table(out / "scores.parquet").to_pydict()
    assert scores["delta"] == table["delta"]
    assert set(scores["status"]) == {"ok"}
    assert (out / "quarantine.jsonl").read_text() == ""
    ignored = {path.stem: len(json.loads(path.read_text())) for path in (out / "ignore").iterdir()}
    assert sum(ignored.values()) == len(samples) - len(kept)
    assert set(ignored) == set(table["source"])


def test_samples_without_a_number_are_set_aside(tmp_path: Path, change: Callable[..., Recipe]) -> None:
    import pyarrow.parquet as pq

    samples = [vqa_sample(id=str(number), source="a", image="i", question="what?", answer="yes") for number in range(4)]
    small = [AnswerScore(nll=nll, num_tokens=2) for nll in (3.0, 1.0, math.nan, 2.0)]
    large = [AnswerScore(nll=1.0, num_tokens=2)] * 4
    deltas = _merged_deltas(tmp_path, samples, {"small": small, "large": large}, "none")
    assert deltas == [2.0, 0.0, None, 1.0]
    assert pq.read_table(tmp_path / "scores.parquet")["status"].to_pylist() == ["ok", "ok", "not_finite", "ok"]
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["where"] == "train.jsonl:3"
    literal = change("curate.centre=none", "curate.resolution=0", "curate.keep_rate=0.5").curate
    assert literal is not None
    assert _ranked(samples, deltas, literal) == ([2.0, 0.0, None, 1.0], [True, False, False, True])


def test_scorers_learn_from_all_questions_of_a_share_of_the_images(data_dir: Path) -> None:
    samples = load_samples(data_dir, "train")
    part = scorer_subset(samples, 0.25, seed=0)
    images = {sample.images for sample in part}
    assert len(images) == 8
    assert part == [sample for sample in samples if sample.images in images]
    assert scorer_subset(samples, 0.25, seed=0) == part
    assert scorer_subset(samples, 0.25, seed=1) != part
    assert len({sample.images for sample in scorer_subset(samples, 1e-9, seed=0)}) == 1


def test_curation_is_the_same_every_time(curated: tuple[dict[str, float], Path], bench: Any, data_dir: Path) -> None:
    assert hashes(bench.run("curate", {"data": data_dir})[1]) == hashes(curated[1])


def test_training_leaves_every_stage_and_the_model(trained: tuple[dict[str, float], Path]) -> None:
    metrics, out = trained
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {"1-base", "2-align", "3-vision", "4-instruct", "model", "metrics.jsonl"}
    assert hashes(out / "model") == hashes(out / "4-instruct")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["stage"] for line in lines if line["step"] == 0] == ["base", "align", "vision", "instruct"]
    assert metrics["loss_instruct"] == lines[-1]["loss_smooth"]
    assert metrics["tokens_per_second"] > 0


def test_training_is_watched_with_the_settings_of_the_command(
    trained: tuple[dict[str, float], Path], module_bench: Any
) -> None:
    metrics, out = trained
    history = read_history(out / HISTORY_FILE)
    assert list(history) == ["base", "align", "vision", "instruct"]
    assert 0 < history["align"].points[-1].values["mfu"] < 1
    assert {"core_hours_align", "energy_kwh_estimated_instruct"} <= set(metrics)
    events = [json.loads(line) for line in (module_bench.root / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["step"] == "train" and event.get("phase") == "align"][-2:]
    assert {"loss", "tokens_per_second", "samples_per_second", "mfu", "memory_gib"} <= set(last[0]["metrics"])
    assert set(last[1]["metrics"]) == {"core_hours", "energy_kwh_estimated"}
    assert not [event for event in events if "no backup" in event.get("notice", "")]
    assert FolderBackups(Path(module_bench.settings.checkpoint_uri) / out.name).names() == [], "it has finished"


@pytest.mark.slow
def test_training_goes_on_from_backups(
    trained: tuple[dict[str, float], Path], curated: tuple[dict[str, float], Path], bench: Any, data_dir: Path
) -> None:
    """Two stages were finished on a machine that is gone."""
    store = FolderBackups(bench.root / "volume" / "train")
    for name in ("1-base", "2-align"):
        files = {path.name: path for path in (trained[1] / name).iterdir()}
        store.put(name, files | {".beside/metrics.jsonl": trained[1] / "metrics.jsonl"})
    bench.settings = replace(bench.settings, checkpoint_uri=str(bench.root / "volume"))
    out = bench.run("train", {"data": data_dir, "selection": curated[1]})[1]
    assert hashes(out) == hashes(trained[1])
    assert bench.reporter.notices == ["nothing of this training is on this machine; going on from the backup 2-align"]


@pytest.mark.slow
def test_training_is_the_same_every_time(
    trained: tuple[dict[str, float], Path], curated: tuple[dict[str, float], Path], bench: Any, data_dir: Path
) -> None:
    again = bench.run("train", {"data": data_dir, "selection": curated[1]})[1]
    assert hashes(again) == hashes(trained[1])


@pytest.mark.slow
def test_training_on_broken_data_raises_the_error_of_the_training_process(
    curated: tuple[dict[str, float], Path], bench: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "images.parquet").write_bytes(b"no table")
    for split in ("captions", "text"):
        (broken / f"{split}.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"captions.jsonl") as failed:
        bench.run("train", {"data": broken, "selection": curated[1]})
    assert "\n" not in str(failed.value)


def test_quantization_makes_the_towers_smaller(quantized: tuple[dict[str, float], Path]) -> None:
    metrics, out = quantized
    sizes = json.loads((out / "sizes.json").read_text(encoding="utf-8"))
    for part in ("vision", "language", "total"):
        assert sizes["quantized"][part] < sizes["wide"][part]
    assert sizes["quantized"]["projector"] == sizes["wide"]["projector"]
    assert metrics["quantized_bytes"] == sizes["quantized"]["total"]
    assert metrics["quantized_layers"] > 0
    assert metrics["ttft_ms_wide"] > 0
    assert metrics["decode_tokens_per_second_language"] > 0


def test_quantization_is_calibrated_on_training_and_measured_on_validation(
    quantized: tuple[dict[str, float], Path], data_dir: Path
) -> None:
    metrics, out = quantized
    report = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    assert [(part["part"], part["method"]) for part in report["parts"]] == [
        ("vision", "SmoothQuant"),
        ("language", "AWQ"),
    ]
    assert report["num_calibration"] == 8
    assert report["after"]["num_samples"] == 12
    assert metrics["vision_loss_points"] == pytest.approx(report["parts"][0]["loss"]["points"], abs=1e-3)
    # Equal models must have an equal digest, so that no time may be among the files.
    assert report["speed_after"] is None
    assert all(part["speed_after"] is None for part in report["parts"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "calibrated", "measured"),
    [
        ("quantize.calibration_samples=0", 0, False),
        ("quantize.evaluation_samples=0", 8, False),
        ("quantize.data=easy-vqa", 8, True),
    ],
)
def test_quantization_takes_its_samples_from_where_the_recipe_says(
    override: str,
    calibrated: int,
    measured: bool,
    bench: Any,
    data_dir: Path,
    trained: tuple[dict[str, float], Path],
    change: Callable[..., Recipe],
) -> None:
    bench.recipe = change(override)
    _, out = bench.run("quantize", {"data": data_dir, "model": trained[1]})
    report = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    assert report["num_calibration"] == calibrated
    assert (report["after"] is not None) == measured


def test_without_a_data_set_of_its_own_quantization_rounds_and_says_so(
    bench: Any, trained: tuple[dict[str, float], Path], tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "registry.json").write_text('{"registry": null}', encoding="utf-8")
    _, out = bench.run("quantize", {"data": tmp_path / "own", "model": trained[1]})
    assert "quantize.data names no data set" in bench.reporter.notices[0]
    assert json.loads((out / "quantization.json").read_text(encoding="utf-8"))["num_calibration"] == 0


def test_quantization_is_the_same_every_time_and_starts_over(
    quantized: tuple[dict[str, float], Path], trained: tuple[dict[str, float], Path], bench: Any, data_dir: Path
) -> None:
    left_behind = bench.root / "quantize" / "model" / "of-an-earlier-try.safetensors"
    left_behind.parent.mkdir(parents=True)
    left_behind.write_bytes(b"half")
    again = bench.run("quantize", {"data": data_dir, "model": trained[1]})[1]
    assert hashes(again) == hashes(quantized[1])


def test_quantization_that_was_interrupted_goes_on_behind_its_last_block(
    quantized: tuple[dict[str, float], Path],
    trained: tuple[dict[str, float], Path],
    bench: Any,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = PartStates.save

    def save_and_stop(self: PartStates, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        if self.part == "language":
            raise KeyboardInterrupt

    monkeypatch.setattr(PartStates, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run("quantize", {"data": data_dir, "model": trained[1]})
    monkeypatch.undo()
    again = bench.run("quantize", {"data": data_dir, "model": trained[1]})[1]
    used = [notice for notice in bench.reporter.notices if "of an interrupted run are used" in notice]
    assert [notice.split(":")[0] for notice in used] == ["quantize vision", "quantize language"]
    assert hashes(again) == hashes(quantized[1])  # without `blocks/`


@pytest.mark.parametrize("form", ["wide", "quantized"])
def test_evaluation_answers_every_question_the_same_way(
    form: str,
    bench: Any,
    data_dir: Path,
    trained: tuple[dict[str, float], Path],
    quantized: tuple[dict[str, float], Path],
) -> None:
    inputs = {"data": data_dir, "model": {"wide": trained, "quantized": quantized}[form][1]}
    metrics, out = bench.run(f"evaluate-{form}", inputs)
    first = hashes(out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = load_samples(data_dir, "test")
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert results["model"] == form
    assert results["accuracy"] == metrics["accuracy"] == sum(line["correct"] for line in lines) / len(lines)
    assert sum(tally["total"] for tally in results["by_source"].values()) == results["num_samples"] == len(lines)
    assert 0 < results["baselines"]["majority"] <= results["baselines"]["text_majority"] < 1
    # No speed among the results: equal answers have an equal digest.
    bench.run(f"evaluate-{form}", inputs)
    assert hashes(out) == first
    assert metrics["samples_per_second"] > 0


def test_evaluation_takes_the_split_of_the_recipe(
    bench: Any, data_dir: Path, trained: tuple[dict[str, float], Path], change: Callable[..., Recipe]
) -> None:
    bench.recipe = change("evaluate.split=validation")
    _, out = bench.run("evaluate-wide", {"data": data_dir, "model": trained[1]})
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["split"] == "validation"
    assert results["num_samples"] == len(load_samples(data_dir, "validation"))
