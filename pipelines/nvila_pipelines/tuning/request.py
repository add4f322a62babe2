"""What a tuning is asked to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nvila.tuning.methods import DEFAULT_RATIO, TuneMethod
from nvila_pipelines.curation.spec import DataSpec

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """A tuning.

    Args:
        model: Folder of the base.
        data: What to learn from.
        method: What learns, and how.
        lr: Rate of the language model; None takes the default of the method.
        ratio: The tower learns so many times as slowly; `auto` sweeps.
        vision_lr: Rate of the tower instead.
        projector_lr: Rate of the projector; None takes `lr`.
        held_out: Share of samples to measure by, or a path of other data.
        scorer: How held-out answers are scored.
        tasks: Evaluation tasks that are asked before and after.
        task_data: Place of their data by name.
        guard: Evaluation tasks whose scores must not fall.
        guard_limit: Samples of each of them.
        max_drop: How much they may fall.
        merge: Write all weights even where an adapter would do.
        memory: Bytes that a step may take; None takes what the device has.
        device: `cpu` or `cuda`.
        processes: Local processes that share the batches.
        name: Name in the registry; None registers nothing.
        max_length: Longest sample in positions; None takes the model's.
        batch_tokens: Positions of a step; None takes about 16 samples.
        micro_batch_tokens: Positions of a forward pass; None takes what fits.
        samples_per_image: Samples of an image that share a row.
        epochs: Passes over the data.
        steps: Steps instead; 0 for none.
        eval_every: Steps between looks at the held-out split; 0 looks ten times.
        patience: Looks without a better loss that end tuning; None never does.
        precision: `fp32` or `bf16`.
        attention: `sdpa` or `eager`.
        gradient_checkpointing: None lets the plan choose.
        max_bad: Largest share of samples that may be unusable.
        seed: Of everything that is drawn.
    """

    model: Path
    data: DataSpec
    method: TuneMethod = field(default_factory=TuneMethod)
    lr: float | None = None
    ratio: float | Literal["auto"] = DEFAULT_RATIO
    vision_lr: float | None = None
    projector_lr: float | None = None
    held_out: float | str = 0.1
    scorer: str = "exact_match"
    tasks: tuple[str, ...] = ()
    task_data: Mapping[str, str] = field(default_factory=dict)
    guard: tuple[str, ...] = ()
    guard_limit: int = 200
    max_drop: float = 0.05
    merge: bool = False
    memory: int | None = None
    device: str = "cpu"
    processes: int = 1
    name: str | None = "nvila-tuned"
    max_length: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    samples_per_image: int = 1
    epochs: float = 3.0
    steps: int = 0
    eval_every: int = 0
    patience: int | None = 3
    precision: str = "fp32"
    attention: Literal["eager", "sdpa"] = "sdpa"
    gradient_checkpointing: bool | None = None
    max_bad: float = 0.01
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what the result depends on, in JSON form; paths and places are left to digests."""
        values = asdict(self)
        for name in ("model", "data", "name", "memory", "device", "processes"):
            del values[name]
        return values | {"method": self.method.to_dict(), "tasks": list(self.tasks), "guard": list(self.guard)}

    def save(self, path: Path, **more: Any) -> None:
        """Write it for launched processes, with what else they need to know."""
        values = asdict(self) | {"model": str(self.model), "method": self.method.to_dict()}
        path.write_text(json.dumps({"request": values, **more}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> tuple[TuneRequest, dict[str, Any]]:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        values = raw.pop("request")
        values |= {
            "model": Path(values["model"]),
            "data": DataSpec(**values["data"]),
            "method": TuneMethod.from_dict(values["method"]),
            "tasks": tuple(values["tasks"]),
            "guard": tuple(values["guard"]),
        }
        return cls(**values), raw
