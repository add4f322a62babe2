"""A step whose training job is played by the test: shared by the tests of the launcher."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fake_kubernetes import Cluster
from tests.fake_trainer import GROUP, JOBS, FakeTrainer

from nvila_platform.cluster.placement import JobPlacement
from nvila_platform.launch import Launcher
from nvila_platform.launch.job_progress import Patience
from nvila_platform.launch.train_job import TrainJobLauncher

# Quick, so that nothing here is timed: what is waited for comes from the test itself.
PATIENCE = Patience(look_s=1, start_s=0.5, api_s=60, stop_s=10, gone_s=10, drain_s=20)


class Step:
    """A step that runs a job in a thread while the test plays the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *, run: bool = False) -> None:
        self.cluster = cluster
        self.trainer = FakeTrainer(cluster, run=run)
        self.said: list[str] = []
        self.echo = io.StringIO()
        self.log = folder / "logs" / "run-train.log"
        self.patience = PATIENCE
        self.noted: tuple[Path, str] | None = None
        self.values: dict[str, Any] = {"image": "nvila:1", "nodes": 2, "claims": {"work": str(folder.resolve())}}

    def launcher(self) -> TrainJobLauncher:
        placement = JobPlacement.model_validate(self.values)
        return TrainJobLauncher(
            placement, "key-1", self.said.append, echo=self.echo, patience=self.patience, noted=self.noted
        )

    def launch(self, env: dict[str, str] | None = None) -> None:
        launcher: Launcher = self.launcher()
        launcher.run("some.module", ["spec.json"], num_processes=1, env=env or {}, log_path=self.log)

    def play(self, story: Callable[[], None]) -> None:
        """Launch, and let the story happen to the job once it is there."""
        failed: list[BaseException] = []
        attempts, said = self.trainer.attempts, len(self.said)

        def found() -> bool:
            return self.trainer.attempts > attempts or any("going on with it" in one for one in self.said[said:])

        def tell() -> None:
            try:
                self.until(found)
                story()
            except BaseException as e:  # told to the test below
                failed.append(e)
                self.trainer.set_status(("Complete", "True", "the story failed"))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            self.launch()
        finally:
            thread.join(30)
            if failed:
                raise failed[0]

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"waited in vain; said: {self.said}"
            time.sleep(0.02)

    def job(self) -> dict[str, Any]:
        (job,) = self.cluster.all(GROUP, JOBS)
        return job

    def lines(self) -> list[str]:
        """Return the log without times and names of attempts."""
        text = self.log.read_text(encoding="utf-8") if self.log.is_file() else ""
        return [line.partition(" ")[2] for line in text.splitlines()]


def pod(step: Step, index: int, attempt: int = 1) -> str:
    return f"{step.launcher().job_name}-node-0-{index}-try{attempt}"


def ended(**terminated: Any) -> dict[str, Any]:
    return {"terminated": terminated}
