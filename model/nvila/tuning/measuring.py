"""Peak memory of a step, as it runs: counted tensor by tensor on a CPU, as the allocator says on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nvila.training.engine import StepOutcome, TrainEngine
from nvila.training.observer import StageStart, StepRecord
from nvila.training.partitions import Partitions

# Batches differ in size, so several steps are looked at; on a GPU, where it costs nothing, all but the first.
_LAST = 9
# The first step on a GPU picks kernels.
_FIRST_TIMED = 2


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is on, and of those given to it before.

    A storage counts once, however many tensors look at it, until the last of them is gone.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch left it without annotations
        self.current = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in existing:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        storage = tensor.untyped_storage()
        if storage in self._known or storage.device.type == "cuda":
            return
        size = int(storage.nbytes())
        self._known[storage] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._gone, size)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                self.add(one)
        return out

    def _gone(self, size: int) -> None:
        self.current -= size


class PeakMeter:
    """Measures the peak of the steps of a run.

    Args:
        model: What is trained.
        device: Where.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self._model, self._cuda = model, device.startswith("cuda")
        self.peak_bytes: int | None = None
        self._added = 0

    def watched(self, engine: TrainEngine) -> TrainEngine:
        """Return an engine that measures some early steps, and otherwise is the one given."""
        return _WatchedEngine(engine, self)

    def begin(self, engine: Any) -> LiveTensors | None:
        """Start to measure; the mode to run under on a CPU."""
        if self._cuda:
            if self.peak_bytes is None:
                torch.cuda.reset_peak_memory_stats()
            return None
        optimizer = getattr(engine, "_optimizer", None)
        states = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
        held = [*self._model.parameters(), *self._model.buffers(), *states]
        # The first update makes the moments; every later step has them from its beginning, so this one counts them too.
        trained = [] if states else [p for p in self._model.parameters() if p.requires_grad]
        self._added = 2 * sum(p.numel() * p.element_size() for p in trained)
        return LiveTensors([one for one in held if isinstance(one, Tensor)])

    def before_update(self, mode: LiveTensors | None) -> None:
        """Take the figure of forward and backward pass."""
        if mode is not None:
            self.peak_bytes = max(mode.peak + self._added, self.peak_bytes or 0)

    def end(self, mode: LiveTensors | None) -> None:
        """Take the figure of the whole step."""
        peak = int(torch.cuda.max_memory_allocated()) if mode is None else mode.peak
        self.peak_bytes = max(peak, self.peak_bytes or 0)

    def wants(self, number: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return number > 1 if self._cuda else number <= _LAST


class StepClock:
    """Takes the time of steps, as a `StageObserver`; those whose tensors are counted run slower and are left out.

    Args:
        device: Where the run is.
    """

    def __init__(self, device: str) -> None:
        self._begin = _FIRST_TIMED if device.startswith("cuda") else _LAST + 1
        self._seen = 0
        self._seconds: list[float] = []

    @property
    def seconds(self) -> float | None:
        """Median time of a step; None where all steps were left out."""
        return median(self._seconds) if self._seconds else None

    def on_stage_start(self, start: StageStart) -> None:
        """Nothing yet."""

    def on_step(self, record: StepRecord) -> None:
        """Remember its time."""
        self._seen += 1
        if self._seen >= self._begin:
            self._seconds.append(record.seconds)

    def on_notice(self, text: str) -> None:
        """Nothing to do."""

    def on_stage_end(self, stage: str) -> None:
        """Nothing to do."""


class _WatchedEngine:
    """Counts live tensors from the first forward pass of a step to the end of its update."""

    def __init__(self, engine: TrainEngine, meter: PeakMeter) -> None:
        self._engine, self._meter = engine, meter
        self.module, self.layout = engine.module, engine.layout
        self._steps, self._on = 0, False
        self._mode: LiveTensors | None = None

    def __call__(self, **inputs: Any) -> Any:
        number = self._steps + 1
        if not self._on and self._meter.wants(number):
            self._on, self._mode = True, self._meter.begin(self._engine)
            if self._mode is not None:
                self._mode.__enter__()
                for value in inputs.values():
                    if isinstance(value, Tensor):
                        self._mode.add(value)
        return self._engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.backward(loss, last=last)

    def step(self, lr_scale: float) -> StepOutcome:
        if self._on:
            self._meter.before_update(self._mode)
        outcome = self._engine.step(lr_scale)
        self._steps += 1
        if self._on:
            self._stop()
            self._meter.end(self._mode)
        return outcome

    def partitions(self) -> Partitions:
        return self._engine.partitions()

    def whole_weights(self) -> dict[str, Tensor] | None:
        return self._engine.whole_weights()

    def close(self) -> None:
        if self._on:
            self._stop()
        self._engine.close()

    def _stop(self) -> None:
        self._on = False
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
