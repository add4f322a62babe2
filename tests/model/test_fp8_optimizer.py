"""Moments in FP8: the vectors of the reference, bounds from the format's definition, and AdamW as the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nvila.errors import ConfigError
from nvila.training.optimizers import Fp8AdamW
from nvila.training.optimizers.fp8_moments import GROUP_SIZE, quantize_moment

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def spread(decades: float, count: int = GROUP_SIZE) -> Tensor:
    """Values whose largest is 10^decades times the smallest, of both signs."""
    values = torch.logspace(-decades, 0, count)
    return values * torch.tensor([1.0, -1.0]).repeat(count)[:count]


def relative_error(x: Tensor, **options: Any) -> Tensor:
    return (quantize_moment(x, **options).dequantize(x.numel()).view_as(x) - x).abs() / x.abs()


@pytest.mark.parametrize(
    ("decades", "power"),
    [(3, 1.625), (1, 5.0), (10, 0.5), (0.01, 64.0)],
    ids=["the reference's vector", "second moments", "compressed", "capped"],
)
def test_the_power_brings_the_range_of_a_group_to_that_of_the_format(decades: float, power: float) -> None:
    assert float(quantize_moment(spread(decades)).power) == power


def test_the_largest_value_is_the_largest_number_of_the_format() -> None:
    moment = quantize_moment(spread(3))
    assert float(moment.codes.float().abs().max()) == 448.0


@pytest.mark.parametrize("decades", [0.5, 1, 3, 6])
def test_expansion_divides_the_rounding_error_by_its_power(decades: float) -> None:
    x = spread(decades)
    moment = quantize_moment(x)
    k = float(moment.power)
    normal = moment.codes.float().abs().flatten() >= 2**-6
    assert int(normal.sum()) > 100
    # A relative error e of the code is one of (1 + e)^(1/k) - 1 of the value.
    bound = (1 - 2**-4) ** (-1 / k) - 1 + 1e-4
    assert float(relative_error(x)[normal].max()) <= bound


def test_expanded_moments_are_nearer_than_plain_ones() -> None:
    x = spread(1)
    assert relative_error(x).mean() < relative_error(x, expand=False).mean() / 3


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("expand", [True, False])
def test_zeros_stay_zeros_and_do_not_widen_the_range(dtype: torch.dtype, expand: bool) -> None:
    x = spread(1)
    x[::3] = 0
    back = quantize_moment(x, dtype=dtype, expand=expand).dequantize(x.numel())
    assert torch.equal(back[::3], torch.zeros(43))
    kept = x != 0
    limit = 0.05 if expand else 0.13
    assert float(((back - x).abs() / x.abs())[kept].max()) < limit


@pytest.mark.parametrize(
    "x",
    [torch.zeros(GROUP_SIZE), torch.full((GROUP_SIZE,), -0.3), torch.tensor([5.0])],
    ids=["nothing but zeros", "one magnitude", "one value"],
)
def test_groups_without_a_range_come_back(x: Tensor) -> None:
    torch.testing.assert_close(quantize_moment(x).dequantize(x.numel()), x, rtol=1e-5, atol=0)


def test_the_widest_range_of_fp32_stays_finite() -> None:
    x = torch.tensor([3e38, -1e-45, 1.0, 0.0])
    back = quantize_moment(x).dequantize(4)
    assert bool(back.isfinite().all())
    assert back.tolist() == [pytest.approx(3e38, rel=1e-4), 0.0, pytest.approx(0.0, abs=1e25), 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    st.sampled_from([1, 7, 128]),
    st.booleans(),
    st.sampled_from([E4M3, E5M2]),
)
def test_any_values_come_back_finite_with_their_sign(
    values: list[float], group_size: int, expand: bool, dtype: torch.dtype
) -> None:
    x = torch.tensor(values)
    back = quantize_moment(x, dtype=dtype, group_size=group_size, expand=expand).dequantize(len(values))
    assert back.shape == x.shape
    assert bool(back.isfinite().all())
    assert bool(((back == 0) | (back.sign() == x.sign())).all())


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :8].tanh() * 2).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8))


OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.05}


def test_training_follows_adamw() -> None:
    models = small_model(), small_model()
    fp8, wide = Fp8AdamW(models[0].parameters(), **OPTIONS), torch.optim.AdamW(models[1].parameters(), **OPTIONS)
    start = [p.detach().clone() for p in models[0].parameters()]
    # The first step quantizes nothing that it uses.
    train(fp8, models[0], range(1))
    train(wide, models[1], range(1))
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    train(fp8, models[0], range(1, 30))
    train(wide, models[1], range(1, 30))
    for ours, theirs, before in zip(models[0].parameters(), models[1].parameters(), start, strict=True):
        moved = (theirs - before).norm()
        assert float(((ours - theirs).norm() / moved).detach()) < 0.05


def test_moments_take_a_fourth_of_the_memory() -> None:
    model = nn.Linear(1024, 64, bias=False)
    optimizer = Fp8AdamW(model.parameters())
    assert optimizer.state_bytes == 0
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    assert optimizer.state_bytes == 1024 * 64 * 2 * (1 + 12 / 128)
    assert 8 * 1024 * 64 / optimizer.state_bytes > 3.5


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = small_model()
    train(Fp8AdamW(whole.parameters(), **OPTIONS), whole, range(6))
    part = small_model()
    first = Fp8AdamW(part.parameters(), **OPTIONS)
    train(first, part, range(3))
    saved = copy.deepcopy((part.state_dict(), first.state_dict()))
    resumed = small_model()
    resumed.load_state_dict(saved[0])
    second = Fp8AdamW(resumed.parameters(), **OPTIONS)
    second.load_state_dict(saved[1])
    assert all(state["exp_avg_codes"].dtype == E4M3 for state in second.state.values())
    train(second, resumed, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = small_model()
    frozen = next(model[2].parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    train(Fp8AdamW(model.parameters(), **OPTIONS), model, range(2))
    assert torch.equal(frozen, before)


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp32 master weights, got torch.bfloat16"):
        Fp8AdamW(nn.Linear(2, 2).bfloat16().parameters())


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = Fp8AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()


def test_a_closure_is_evaluated_with_gradients() -> None:
    model = small_model()
    optimizer = Fp8AdamW(model.parameters())

    def closure() -> Tensor:
        loss: Tensor = model(torch.ones(1, 24)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert optimizer.state_bytes > 0
