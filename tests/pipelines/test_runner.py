"""Running one step: reuse, resumption, damage, locks and failures. The steps' work stands in; the rest is real."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.errors import ArtifactError, ConfigError, DataError, ResourceError
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.runner import RunContext, run_step
from nvila_pipelines.steps.table import StepSpec
from nvila_platform.artifacts import read_manifest
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.telemetry import Event

Work = Callable[[StepContext], dict[str, float]]
NewRun = Callable[[], RunContext]
ReadEvents = Callable[[RunContext], list[Event]]


class Stand:
    """The work of every step: writes a file, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.work: Work | None = None

    def __call__(self, context: StepContext) -> dict[str, float]:
        self.calls.append(context.out_dir.parent.name)
        if self.work is not None:
            return self.work(context)
        model = context.out_dir / "model" / "model.safetensors"
        model.parent.mkdir(exist_ok=True)
        model.write_bytes(b"weights of " + self.calls[-1].encode())
        return {"loss": 0.5}


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand()
    monkeypatch.setattr(StepSpec, "load", lambda self: made)
    return made


def phases(found: list[Event]) -> list[str]:
    return [event.phase or f"notice: {event.notice}" for event in found]


def directory(settings: Settings, ref: ArtifactRef) -> Path:
    return Path(settings.store_uri) / ref.step / ref.key[:16]


def test_finished_work_is_reused_and_not_done_again(
    stand: Stand, micro: Recipe, new_context: NewRun, events: ReadEvents
) -> None:
    first, second = new_context(), new_context()
    ref = run_step("data", micro, {}, first)
    assert phases(events(first)) == ["start", "finished"]
    assert run_step("data", micro, {}, second) == ref
    assert stand.calls == ["data"]
    assert phases(events(second)) == ["reused"]
    assert events(second)[0].metrics == events(first)[1].metrics
    assert set(events(second)[0].metrics) == {"loss", "core_hours"}


def test_a_finished_step_has_a_manifest_with_its_origin(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings
) -> None:
    run = new_context()
    data = run_step("data", micro, {}, run)
    ref = run_step("curate", micro, {"data": data}, run)
    manifest = read_manifest(directory(settings, ref))
    assert manifest is not None
    assert manifest.inputs == {"data": data.digest}
    assert set(manifest.config) == {
        "seed",
        "curate",
        "train.betas",
        "train.weight_decay",
        "train.attention",
        "train.max_grad_norm",
    }
    assert manifest.metrics.keys() == {"loss", "core_hours"}


def test_an_unfinished_directory_is_continued(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings
) -> None:
    def interrupted(context: StepContext) -> dict[str, float]:
        (context.out_dir / "half.txt").write_text("half", encoding="utf-8")
        raise DataError("stopped here")

    def goes_on(context: StepContext) -> dict[str, float]:
        assert (context.out_dir / "half.txt").read_text(encoding="utf-8") == "half"
        return {}

    stand.work = interrupted
    with pytest.raises(DataError, match="stopped here"):
        run_step("data", micro, {}, new_context())
    assert list(Path(settings.store_uri).glob("data/*/half.txt"))
    assert not list(Path(settings.store_uri).glob("data/*/manifest.json"))
    stand.work = goes_on
    ref = run_step("data", micro, {}, new_context())
    assert (directory(settings, ref) / "half.txt").is_file()


def test_a_damaged_artifact_is_named_moved_aside_and_made_again(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings, events: ReadEvents
) -> None:
    first, second = new_context(), new_context()
    inputs = {"data": run_step("data", micro, {}, first)}
    inputs["selection"] = run_step("curate", micro, inputs, first)
    ref = run_step("train", micro, inputs, first)
    weights = directory(settings, ref) / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[3] ^= 1
    weights.write_bytes(content)
    again = run_step("train", micro, inputs, second)
    assert again.digest == ref.digest
    assert stand.calls == ["data", "curate", "train", "train"]
    notice = events(second)[0].notice
    assert "model/model.safetensors: sha256" in notice
    assert notice.endswith("moved aside, doing it again")
    (aside,) = (Path(settings.store_uri) / "damaged").iterdir()
    assert (aside / "model" / "model.safetensors").read_bytes() == bytes(content)
    assert "model.safetensors" in (aside / "DAMAGED.txt").read_text(encoding="utf-8")
    assert bytes(content) != weights.read_bytes()


def test_a_damaged_input_stops_the_step_that_needs_it(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings
) -> None:
    run = new_context()
    data = run_step("data", micro, {}, run)
    (directory(settings, data) / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: has 5 bytes"):
        run_step("curate", micro, {"data": data}, run)
    assert stand.calls == ["data"]


def test_every_run_registers_in_a_directory_of_its_own(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings, events: ReadEvents
) -> None:
    first, second = new_context(), new_context()
    model = run_step("data", micro, {}, first)
    inputs = {"model": model, "verdict": model}
    one = run_step("register", micro, inputs, first)
    two = run_step("register", micro, inputs, second)
    assert stand.calls == ["data", "register", "register"]
    assert one.digest == two.digest
    assert one.key != two.key
    # The first run may still be reading its own.
    assert open_store(settings).fetch(one).is_dir()
    assert not (Path(settings.store_uri) / "damaged").exists()
    # A task that is tried again within a run finds what it did.
    assert run_step("register", micro, inputs, second) == two
    assert phases(events(second))[-1] == "reused"


def test_the_second_of_two_runs_waits_and_reuses(
    stand: Stand, micro: Recipe, new_context: NewRun, events: ReadEvents
) -> None:
    first, second = new_context(), new_context()
    working, go_on = threading.Event(), threading.Event()

    def slow(context: StepContext) -> dict[str, float]:
        working.set()
        assert go_on.wait(30)
        (context.out_dir / "done.txt").write_text("done", encoding="utf-8")
        return {}

    stand.work = slow
    refs: list[ArtifactRef] = []
    threads = [
        threading.Thread(target=lambda run=run: refs.append(run_step("data", micro, {}, run)))
        for run in (first, second)
    ]
    threads[0].start()
    assert working.wait(30)
    threads[1].start()
    while not events(second):
        threading.Event().wait(0.02)
    assert events(second)[0].notice.endswith(f"process {os.getpid()} is working on it; waiting")
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert refs[0] == refs[1]
    assert stand.calls == ["data"]
    assert phases(events(second))[1:] == ["reused"]


def test_no_space_left_in_the_step_is_one_line(stand: Stand, micro: Recipe, new_context: NewRun) -> None:
    def full(context: StepContext) -> dict[str, float]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(context.out_dir / "images.parquet"))

    stand.work = full
    with pytest.raises(ResourceError, match=r"no space left while writing .*images\.parquet") as failed:
        run_step("data", micro, {}, new_context())
    assert "\n" not in str(failed.value)
    assert failed.value.hint == "free some space, then run it again"


def test_no_space_left_for_the_manifest_leaves_the_step_unfinished(
    stand: Stand, micro: Recipe, new_context: NewRun, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_context()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="no space left while writing"):
            run_step("data", micro, {}, run)
    assert not list(Path(settings.store_uri).glob("data/*/manifest.json"))
    run_step("data", micro, {}, run)
    assert stand.calls == ["data", "data"]


def test_no_space_left_for_the_event_log_does_not_stop_the_step(
    stand: Stand, micro: Recipe, new_context: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_context()

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    run_step("data", micro, {}, run)
    assert [record.message for record in caplog.records if "progress events" in record.message] == [
        "progress events cannot be written: [Errno 28] No space left on device"
    ]


def test_no_space_left_for_the_run_folder_is_one_line(
    micro: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match=r"no space left while writing .*recipe\.yaml"):
        new_run(micro, settings)


def test_a_workspace_that_is_a_file_is_one_line(micro: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot write .*file.*: Not a directory") as failed:
        new_run(micro, Settings.load(tmp_path / "file", {}))
    assert failed.value.exit_code == 2
    assert "--workspace" in failed.value.hint


def test_an_unknown_step_is_refused_before_anything_is_made(
    micro: Recipe, new_context: NewRun, settings: Settings
) -> None:
    with pytest.raises(ConfigError, match="unknown step 'dta'"):
        run_step("dta", micro, {}, new_context())
    assert not Path(settings.store_uri).exists()


def test_the_tracking_run_is_known_once_its_file_is_there(new_context: NewRun) -> None:
    run = new_context()
    assert run.tracking_run() is None
    (run.directory / "mlflow-run-id").write_text("abc\n", encoding="utf-8")
    assert run.tracking_run() == "abc"
