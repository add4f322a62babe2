"""Bytes of weights, gradients and optimizer state on one GPU.

What the trainer holds: fp32 weights, whatever the precision (bf16 and FP8 are casts of them, made in the forward pass),
fp32 gradients of what is trained, and the moments of AdamW. ZeRO deals them to the processes: stage 1 the moments,
stage 2 the gradients too, stage 3 also the weights. With ZeRO, DeepSpeed keeps an fp32 copy of the trained weights that
the optimizer works on, dealt like the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvila.training.config import Offload, OptimizerName

WORD = 4
# Of FP8 AdamW: values that share a scale, and the three fp32 numbers of each such group.
_GROUP = 128
_GROUP_BYTES = 3 * WORD
_MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes on one GPU.

    Args:
        parameters: Weights.
        gradients: Gradients of the trained ones.
        optimizer: Moments, and the optimizer's own copy of weights where there is one.
        host: Bytes in main memory instead, for each process.
    """

    parameters: int
    gradients: int
    optimizer: int
    host: int = 0

    @property
    def total(self) -> int:
        """All bytes on the GPU."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    total: int,
    trained: Sequence[int],
    *,
    zero_stage: int,
    world: int,
    optimizer: OptimizerName = "adamw",
    offload: Offload = "none",
    master: bool = True,
) -> StateBytes:
    """Count what one process holds between steps, plus the gradients of a step.

    Args:
        total: Parameters of the model.
        trained: Sizes of the trained parameters, one number for each tensor.
        zero_stage: 0 to 3.
        world: Processes that share.
        optimizer: Which optimizer.
        offload: `optimizer` moves moments and copies to main memory.
        master: Whether ZeRO keeps its own copy of the trained weights; plain torch does not.
    """
    count = sum(trained)
    shared = {stage: world if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    copies = WORD * count if zero_stage >= 1 and master else 0
    state = _share(moment_bytes(trained, optimizer) + copies, shared[1])
    gradients = _share(WORD * count, shared[2])
    offloaded = offload == "optimizer" and zero_stage >= 1
    return StateBytes(
        parameters=_share(WORD * total, shared[3]),
        gradients=gradients,
        optimizer=0 if offloaded else state,
        # DeepSpeed brings the dealt gradients over too; on the GPU they still exist while they are made.
        host=state + gradients if offloaded else 0,
    )


def moment_bytes(trained: Sequence[int], optimizer: OptimizerName) -> int:
    """Count the moments of tensors of the given sizes, and the step counter of each tensor."""
    counters = WORD * len(trained)
    if optimizer == "adamw":
        return _MOMENTS * WORD * sum(trained) + counters
    groups = sum(-(-size // _GROUP) for size in trained)
    return _MOMENTS * groups * (_GROUP + _GROUP_BYTES) + counters


def _share(value: int, parts: int) -> int:
    return -(-value // parts)
