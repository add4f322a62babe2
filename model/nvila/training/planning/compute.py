"""What the operations of training steps take in time and money."""

from __future__ import annotations


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
