"""Saving the middle of a stage and going on from it, for all processes together.

What is saved knows neither the number of processes nor the ZeRO stage: whole fp32 tensors by parameter name, the
position in the data, counts. Two things are each process's own and are used again only when the processes are the same:
the state of random generators, and optimizer moments in FP8, which would be rounded a second time otherwise.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nvila.errors import CheckpointError, ConfigError
from nvila.training.checkpoint_files import (
    STATE,
    CheckpointReader,
    SavedFile,
    ShardWriter,
    remove,
    seal,
    verify,
    write_json,
    write_tensors,
)
from nvila.training.config import CheckpointConfig, StageConfig, TrainConfig
from nvila.training.engine import TrainEngine
from nvila.training.processes import from_first, gathered, rank, world_size
from nvila.training.random_state import random_state, set_random_state

_STEP = "step-"
# How a configuration is carried out, not what is learned: these may change when a run goes on.
_FREE = ("backend", "zero_stage", "attention", "offload", "gradient_checkpointing", "checkpoints", "health", "stages")


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        directory: Their folder; nothing else is in it.
        config: The whole run, which a checkpoint must have been written by.
        stage: The stage.
        notice: Told what went wrong without stopping anything.
    """

    def __init__(self, directory: Path, config: TrainConfig, stage: StageConfig, notice: Callable[[str], None]) -> None:
        self._directory = directory
        self._policy: CheckpointConfig = config.checkpoints
        self._settings = _settings(config, stage)
        self._stage = stage.name
        self._notice = notice
        self._saved_at = time.monotonic()

    def due_by_step(self, step: int) -> bool:
        """Tell whether a number of finished steps asks for a checkpoint."""
        every = self._policy.every_steps
        return every is not None and step % every == 0

    def due_by_time(self) -> bool:
        """Tell whether the last save, or the start, is long ago; processes differ in that."""
        minutes = self._policy.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, engine: TrainEngine, noise: torch.Generator, state: Mapping[str, Any]) -> bool:
        """Save; every process must call it.

        A disk that is full costs this checkpoint and nothing else: older ones stay, training goes on.

        Args:
            step: Steps of the stage that are finished.
            engine: Holds weights and optimizer state.
            noise: The augmentation's generator.
            state: What else a resumed stage must know, in JSON form and the same on every process.

        Returns:
            Whether the checkpoint is on the disk.
        """
        folder = self._directory / f"{_STEP}{step:08d}"
        partial = self._directory / f".{folder.name}.partial"
        if from_first(folder.is_dir()):
            return True
        files, problem = self._write(partial, engine, noise, {"step": step, **state})
        if problem is None and rank() == 0:
            problem = _attempt(lambda: seal(partial, folder, files))
        problem = from_first(problem)
        self._saved_at = time.monotonic()
        if problem is not None:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._notice(
                f"stage {self._stage} step {step}: no checkpoint was saved ({problem}); training goes on, and the one "
                "before stays"
            )
            return False
        if rank() == 0:
            for old in self._sealed()[self._policy.keep :]:
                remove(old)
        return True

    def restore(self, engine: TrainEngine, noise: torch.Generator) -> dict[str, Any] | None:
        """Go on from the newest checkpoint that is whole; every process must call it.

        A damaged one is named in a notice, gets another name and stays.

        Returns:
            What was saved as `state`, with `step`; None when there is nothing to go on from.

        Raises:
            ConfigError: The checkpoint was written with other settings.
            CheckpointError: It belongs to another model.
        """
        name = from_first(self._newest() if rank() == 0 else None)
        if name is None:
            return None
        with CheckpointReader(self._directory / name) as reader:
            state = reader.state
            self._check_settings(state["settings"], name)
            same = state["processes"] == _processes(engine)
            exact = reader.tensors(_own("safetensors")) if same else {}
            engine.partitions().restore(reader, state["step_counts"], exact)
            generators = reader.json(_own("json")) if same else None
        if generators is None:
            # With other processes there is no state to go on with; a seed of the step's own repeats no sequence.
            noise.manual_seed(noise.initial_seed() + 7_919 * int(state["step"]))
            torch.manual_seed(noise.initial_seed())
        else:
            set_random_state(generators, noise)
        self._notice(f"stage {self._stage} goes on from its checkpoint after step {state['step']}")
        return dict(state)

    def clear(self) -> None:
        """Delete the checkpoints of a finished stage; damaged ones stay."""
        if rank() != 0 or not self._directory.is_dir():
            return
        for folder in self._sealed():
            remove(folder)
        for partial in self._directory.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        if not any(self._directory.iterdir()):
            self._directory.rmdir()

    def _write(
        self, partial: Path, engine: TrainEngine, noise: torch.Generator, state: Mapping[str, Any]
    ) -> tuple[list[SavedFile], str | None]:
        """Write all files; returns those of all processes, and what went wrong on any of them."""
        problem = _attempt(lambda: _fresh(partial)) if rank() == 0 else None
        problem = from_first(problem)
        if problem is not None:
            return [], problem
        partitions = engine.partitions()
        shards = ShardWriter(partial)
        for name, tensor in partitions.tensors():
            # Also after a failure: the other processes wait for this one's part of every tensor.
            if rank() == 0 and problem is None:
                problem = _attempt(lambda name=name, tensor=tensor: shards.add(name, tensor))  # type: ignore[misc]
        own: list[SavedFile] = []
        if problem is None:
            problem = _attempt(lambda: own.extend(_write_own(partial, engine, noise)))
        if problem is None and rank() == 0:
            everything = {
                **state,
                "settings": self._settings,
                "processes": _processes(engine),
                "step_counts": partitions.step_counts(),
            }
            problem = _attempt(lambda: own.extend(_finish(partial, shards, everything)))
        told = gathered((own, problem))
        problems = [text for _, text in told if text is not None]
        return [file for files, _ in told for file in files], problems[0] if problems else None

    def _newest(self) -> str | None:
        """Return the newest whole checkpoint, after damaged newer ones were put aside."""
        for partial in self._directory.glob(".*.partial") if self._directory.is_dir() else ():
            shutil.rmtree(partial, ignore_errors=True)
        for folder in self._sealed():
            try:
                verify(folder)
                return folder.name
            except CheckpointError as e:
                aside = _free_name(folder.with_name(f"damaged-{folder.name}"))
                folder.rename(aside)
                self._notice(f"a checkpoint is damaged and put aside as {aside}: {e.message}; trying the one before")
        return None

    def _sealed(self) -> list[Path]:
        return sorted(self._directory.glob(f"{_STEP}*"), reverse=True)

    def _check_settings(self, written: Mapping[str, Any], name: str) -> None:
        now = self._settings
        for key in sorted(written.keys() | now.keys()):
            if written.get(key) != now.get(key):
                raise ConfigError(
                    f"{self._directory / name} was written with {key}={written.get(key)!r}, it is {now.get(key)!r} now",
                    "go on with the settings of before, use another output folder, or delete the checkpoint",
                )


def _write_own(partial: Path, engine: TrainEngine, noise: torch.Generator) -> list[SavedFile]:
    files = [write_json(partial, _own("json"), random_state(noise))]
    if exact := engine.partitions().exact():
        files.append(write_tensors(partial, _own("safetensors"), exact))
    return files


def _finish(partial: Path, shards: ShardWriter, state: Mapping[str, Any]) -> list[SavedFile]:
    shards.flush()
    return [*shards.files, write_json(partial, STATE, state)]


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _attempt(work: Callable[[], object]) -> str | None:
    """Do something that a full or broken disk can make fail; returns why it did."""
    try:
        work()
    except OSError as e:
        return e.strerror or str(e)
    return None


def _own(suffix: str) -> str:
    return f"process-{rank():05d}.{suffix}"


def _processes(engine: TrainEngine) -> list[Any]:
    """Return what the parts of each process depend on."""
    return [world_size(), *engine.layout]


def _settings(config: TrainConfig, stage: StageConfig) -> dict[str, Any]:
    """Return what a checkpoint's weights depend on, by dotted name and in JSON form."""
    values = {name: value for name, value in asdict(config).items() if name not in _FREE}
    flat = _flat(values, "train") | _flat(asdict(stage), f"stages.{stage.name}")
    # As it comes back from a checkpoint: JSON has lists where we have tuples.
    return dict(json.loads(json.dumps(flat)))


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: one for part, inner in value.items() for key, one in _flat(inner, f"{name}.{part}").items()}
    return {name: value}


def _free_name(path: Path) -> Path:
    taken = {one.name for one in path.parent.iterdir()}
    numbers = (path.name, *(f"{path.name}-{number}" for number in range(2, len(taken) + 3)))
    return path.with_name(next(name for name in numbers if name not in taken))
