"""Floating-point operations of a training step, and what they take in time and money.

A product of (m, k) and (k, n) is 2 m k n operations. The forward pass of a linear layer with P weights takes 2 P for
each position, and attention over rows of n positions 4 n w for each position and layer of width w (scores and their
sum; the causal half is counted too, as in the usual definition of MFU). The backward pass takes as much again for the
gradients of inputs, and as much again for those of weights, if they are trained. Gradient checkpointing repeats the
forward pass. Norms, activations and the optimizer are left out: they are bound by memory, not by products.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nvila.training.config import PartName


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWork:
    """The forward pass of one part over some positions.

    Args:
        weights: Weights of the linear layers that a position goes through.
        positions: Positions over which they run.
        attention: Sum over attention layers and rows of n * n * width; 0 without attention.
    """

    weights: int
    positions: float
    attention: float = 0.0

    @property
    def linear(self) -> float:
        """Operations of linear layers."""
        return 2 * self.weights * self.positions

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.linear + 4 * self.attention


def step_operations(
    work: dict[PartName, PartWork], head: PartWork, trained: Collection[PartName], *, checkpointing: bool = False
) -> float:
    """Count the operations of forward and backward pass.

    Args:
        work: Forward work of every part over a step.
        head: The language-model head, over the supervised positions.
        trained: Parts that learn; gradients flow back to the first of them.
        checkpointing: Whether decoder and tower run forward once more.
    """
    flows = {
        "vision": "vision" in trained,
        "projector": "vision" in trained or "projector" in trained,
        "language": True,
    }
    total = 0.0
    for part, one in work.items():
        total += one.forward
        # In the decoder gradients flow back to the projector, or to its own first layer.
        if flows[part]:
            total += one.linear + 8 * one.attention + (one.linear if part in trained else 0.0)
            total += one.forward if checkpointing and part != "projector" else 0.0
    return total + head.forward * (3 if "language" in trained else 2)


def step_seconds(operations: float, *, gpus: int, peak_tflops: float, mfu: float) -> float:
    """Return the time of a step.

    Args:
        operations: Of the step over all GPUs, without repeated forward passes, which MFU does not count as useful.
        gpus: Number of GPUs.
        peak_tflops: Peak of one GPU in 1e12 operations a second.
        mfu: Share of the peak that is reached.

    Example:
        >>> step_seconds(8e15, gpus=8, peak_tflops=1000, mfu=0.5)
        2.0
    """
    return operations / (gpus * peak_tflops * 1e12 * mfu)


def gpu_hours(seconds: float, gpus: int) -> float:
    """Return the GPU-hours of some seconds on some GPUs."""
    return seconds * gpus / 3600


def fp8_share(converted: int, weights: int) -> float:
    """Share of a decoder's products that run in FP8, given the weights of its converted and of all its layers."""
    return converted / weights if weights else 0.0


def mixed_peak(bf16_tflops: float, fp8_tflops: float, share: float) -> float:
    """Peak of work of which a share runs in FP8: times add up, so speeds are averaged harmonically.

    Example:
        >>> round(mixed_peak(100.0, 200.0, 0.5), 1)
        133.3
    """
    return 1 / (share / fp8_tflops + (1 - share) / bf16_tflops)
