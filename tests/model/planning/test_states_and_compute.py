"""Formulas of the planner against numbers worked out by hand."""

from __future__ import annotations

import pytest

from nvila.errors import ConfigError
from nvila.training.flops import PartWork, step_operations
from nvila.training.planning.activations import Block, block_bytes, buffer_bytes, loss_bytes, stack_bytes
from nvila.training.planning.compute import gpu_hours, mixed_peak, step_seconds
from nvila.training.planning.devices import GIB, gpu_named, parse_memory
from nvila.training.planning.states import moment_bytes, state_bytes

BLOCK = Block(width=64, inner=160, heads=8, queries=64, keys=16, weights=40_960, gated=True)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        # 1000 parameters in one tensor, 4 processes. From ZeRO 1 on there is a copy beside moments and counter.
        (0, (4000, 4000, 8004)),
        (1, (4000, 4000, 3001)),
        (2, (4000, 1000, 3001)),
        (3, (1000, 1000, 3001)),
    ],
)
def test_zero_deals_moments_then_gradients_then_weights(zero: int, expected: tuple[int, int, int]) -> None:
    state = state_bytes(1000, [1000], zero_stage=zero, world=4)
    assert (state.parameters, state.gradients, state.optimizer) == expected
    assert state.total == sum(expected)
    assert state.host == 0


def test_offloading_moves_the_optimizer_to_main_memory() -> None:
    state = state_bytes(1000, [500], zero_stage=2, world=4, offload="optimizer")
    # (500 * 8 + 4 + 500 * 4) / 4 of moments and copies, and 500 * 4 / 4 of gradients.
    assert (state.optimizer, state.host) == (0, 1501 + 500)
    assert state_bytes(1000, [500], zero_stage=0, world=4, offload="optimizer").host == 0


def test_frozen_parameters_have_neither_gradients_nor_moments() -> None:
    state = state_bytes(1000, [], zero_stage=0, world=1)
    assert (state.parameters, state.gradients, state.optimizer) == (4000, 0, 0)


def test_fp8_moments_are_bytes_with_three_numbers_a_group() -> None:
    # 300 values: three groups of 128 codes and 12 bytes, twice, and a counter.
    assert moment_bytes([300], "fp8_adamw") == 2 * 3 * (128 + 12) + 4
    assert moment_bytes([300, 100], "adamw") == 8 * 400 + 8


def test_attention_that_keeps_no_pairs_is_linear_in_the_row() -> None:
    def bytes_of(attention: str, row: int) -> int:
        return block_bytes(BLOCK, 96, row, half=False, attention=attention, trained=True)  # type: ignore[arg-type]

    assert bytes_of("sdpa", 48) == bytes_of("sdpa", 96) == 96 * 4776
    assert bytes_of("eager", 48) == 96 * 6664
    assert bytes_of("eager", 96) - bytes_of("eager", 48) == 96 * 8 * 48 * 4


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    kept = stack_bytes(BLOCK, 10, 96, 48, half=True, attention="sdpa", trained=False, checkpointing=True)
    one = block_bytes(BLOCK, 96, 48, half=True, attention="sdpa", trained=False)
    assert kept == 10 * 96 * 64 * 4 + one + 2 * BLOCK.weights
    # Casts of weights that learn stay for the whole forward pass.
    learned = stack_bytes(BLOCK, 10, 96, 48, half=True, attention="sdpa", trained=True, checkpointing=True)
    assert (
        learned
        == 10 * 96 * 64 * 4
        + block_bytes(BLOCK, 96, 48, half=True, attention="sdpa", trained=True)
        + 10 * 2 * BLOCK.weights
    )


def test_loss_is_whole_for_small_vocabularies_and_chunked_for_large_ones() -> None:
    assert loss_bytes(100, 50, 8, half=False, trained=True) == 100 * 50 * 8 + 4 * 100 * 8
    # 2**25 // 150000 = 223 rows of fp32 logits and of their bf16 form, the head's gradient twice, and its cast.
    expected = 223 * 150_000 * 6 + 150_000 * 8 * 6 + 150_000 * 8 * 2 + 2 * 2 * 1000 * 8
    assert loss_bytes(1000, 150_000, 8, half=True, trained=True) == expected
    assert loss_bytes(1000, 150_000, 8, half=True, trained=False) == expected - 150_000 * 8 * 6


def test_buffers_are_those_of_deepspeed() -> None:
    assert buffer_bytes(10**10, 10**10, zero_stage=0, world=1) == 0
    assert buffer_bytes(10**10, 10**10, zero_stage=2, world=8) == 2 * 4 * 500_000_000
    assert buffer_bytes(10**10, 10**10, zero_stage=3, world=8) == 4 * 500_000_000 + 4 * 10**9
    assert buffer_bytes(100, 10, zero_stage=3, world=8) == 4 * 10 + 4 * 100


WORK = {
    "vision": PartWork(weights=10, positions=4, attention=3),
    "projector": PartWork(weights=5, positions=2),
    "language": PartWork(weights=20, positions=6, attention=7),
}
HEAD = PartWork(weights=8, positions=2)


@pytest.mark.parametrize(
    ("trained", "checkpointing", "expected"),
    [
        # Forward: vision 80 + 12, projector 20, language 240 + 28, head 32.
        # Align: gradients of inputs in projector and language, of weights in the projector.
        ({"projector"}, False, (92 + 20 + 268 + 32) + (20 + 20) + (240 + 56) + 32),
        ({"language"}, False, (92 + 20 + 268 + 32) + (240 + 56 + 240) + 64),
        (
            {"vision", "projector", "language"},
            False,
            (92 + 20 + 268 + 32) + (80 + 24 + 80) + (20 + 20) + (240 + 56 + 240) + 64,
        ),
        ({"language"}, True, (92 + 20 + 268 + 32) + (240 + 56 + 240) + 64 + 268),
    ],
)
def test_frozen_parts_save_their_backward_work(trained: set[str], checkpointing: bool, expected: int) -> None:
    assert step_operations(WORK, HEAD, trained, checkpointing=checkpointing) == expected  # type: ignore[arg-type]


def test_time_and_money() -> None:
    seconds = step_seconds(8 * 989e12, gpus=8, peak_tflops=989, mfu=0.5)
    assert seconds == pytest.approx(2.0)
    assert gpu_hours(3600, 8) == 8
    assert mixed_peak(100, 200, 0.0) == 100
    assert mixed_peak(100, 200, 1.0) == 200


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * GIB), ("80", 80 * GIB), ("24 GB", 24 * 10**9), ("512MiB", GIB // 2)]
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0", "80GiBs"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount of memory"):
        parse_memory(text)


def test_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU 'h10' .did you mean 'h100'"):
        gpu_named("h10")
