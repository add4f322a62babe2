from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nvila.errors import ConfigError
from nvila.vision.projectors import (
    PROJECTORS,
    MultimodalProjector,
    num_output_tokens,
    space_to_channel,
)

Array = npt.NDArray[np.float32]


def fold_cells(x: Array, rate: int) -> Array:
    """Fold cells by walking over the grid, one position at a time."""
    b, tokens, c = x.shape
    n = round(tokens**0.5)
    m = -(-n // rate)
    out = np.zeros((b, m * m, rate * rate * c), dtype=x.dtype)
    for row in range(n):
        for column in range(n):
            cell, inside = (row // rate) * m + column // rate, (row % rate) * rate + column % rate
            out[:, cell, inside * c : (inside + 1) * c] = x[:, row * n + column]
    return out


@given(n=st.integers(1, 9), rate=st.integers(1, 4), c=st.integers(1, 3), b=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_space_to_channel_equals_a_walk_over_the_grid(n: int, rate: int, c: int, b: int) -> None:
    x = np.random.default_rng(n * 100 + rate).normal(size=(b, n * n, c)).astype(np.float32)
    np.testing.assert_array_equal(space_to_channel(torch.from_numpy(x), rate).numpy(), fold_cells(x, rate))


@pytest.mark.parametrize(("rate", "tokens"), [(2, 256), (3, 121)])
def test_a_tile_of_448_pixels_leaves_as_many_tokens_as_published(rate: int, tokens: int) -> None:
    assert space_to_channel(torch.zeros(1, 32 * 32, 8), rate).shape == (1, tokens, rate * rate * 8)
    name = {2: "mlp_downsample_2x2_fix", 3: "mlp_downsample_3x3_fix"}[rate]
    assert num_output_tokens(name, 32) == tokens


def test_short_grid_is_padded_with_zeros_at_bottom_and_right() -> None:
    x = torch.arange(1.0, 17.0).view(1, 16, 1)
    y = space_to_channel(x, 3)
    assert y.tolist() == [
        [
            [1, 2, 3, 5, 6, 7, 9, 10, 11],
            [4, 0, 0, 8, 0, 0, 12, 0, 0],
            [13, 14, 15, 0, 0, 0, 0, 0, 0],
            [16, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
    ]


def test_grid_that_is_not_square_is_refused() -> None:
    with pytest.raises(ConfigError, match="square token grid, got 12 tokens"):
        space_to_channel(torch.zeros(1, 12, 4), 2)


@pytest.mark.parametrize(
    ("name", "channels", "width", "parameters"),
    [
        (name, channels, width, count)
        for name, channels, counts in (
            ("mlp_downsample_2x2_fix", 1152, (4_942_592, 9_449_472, 29_376_512, 49_826_816)),
            ("mlp_downsample_2x2_fix", 3456, (13_218_560, 23_623_680, 62_425_088, 97_031_168)),
            ("mlp_downsample", 1152, (4_942_592, 9_449_472, 29_376_512, 49_826_816)),
            ("mlp_downsample_3x3_fix", 1152, (39_764_096, 43_533_696, 61_101_440, 79_782_272)),
            ("mlp_downsample_3x3_fix", 3456, (332_673_920, 340_867_200, 372_590_720, 401_888_384)),
        )
        for width, count in zip((896, 1536, 3584, 5120), counts, strict=True)
    ],
)
def test_parameter_counts_are_those_of_released_checkpoints(
    name: str, channels: int, width: int, parameters: int
) -> None:
    with torch.device("meta"):
        projector = MultimodalProjector(name, channels, width)
    assert sum(p.numel() for p in projector.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mlp_downsample_2x2_fix", {1: (16,), 2: (6, 16), 4: (6, 6)}),
        ("mlp_downsample_3x3_fix", {1: (36,), 2: (12, 36), 4: (12,), 5: (6, 12), 7: (6, 6)}),
        (
            "mlp_downsample_3x3_s2",
            {1: (36,), 2: (12, 36), 4: (12,), 5: (4, 12), 7: (4,), 8: (1, 4), 10: (1,), 11: (6, 1), 13: (6, 6)},
        ),
        (
            "mlp_downsample_3x3_s2_new",
            {
                **{1: (36,), 2: (16, 36), 4: (16,), 5: (8, 16), 7: (8,), 8: (4, 8)},
                **{10: (4,), 11: (1, 4), 13: (1,), 14: (6, 1), 16: (6, 6)},
            },
        ),
        ("mlp1x_gelu", {0: (6, 4)}),
        ("mlp2x_gelu", {0: (6, 4), 2: (6, 6)}),
        ("mlp4x_gelu", {0: (6, 4), 2: (6, 6), 4: (6, 6), 6: (6, 6)}),
    ],
)
def test_parameter_names_and_shapes_are_those_of_released_checkpoints(
    name: str, keys: dict[int, tuple[int, ...]]
) -> None:
    state = MultimodalProjector(name, 4, 6).state_dict()
    weights = {key: tuple(value.shape) for key, value in state.items() if key.endswith("weight")}
    assert weights == {f"layers.{index}.weight": shape for index, shape in keys.items()}
    assert {key.removesuffix("bias") for key in state if key.endswith("bias")} == {
        key.removesuffix("weight") for key in weights
    }


@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_gives_the_number_of_tokens_it_announces(name: str) -> None:
    for grid in (3, 4, 6):
        projector = MultimodalProjector(name, 6, 6)
        assert projector(torch.randn(2, grid * grid, 6)).shape == (2, num_output_tokens(name, grid), 6)


def test_linear_projector_has_no_index_in_its_names() -> None:
    state = MultimodalProjector("linear", 4, 6).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"layers.weight": (6, 4), "layers.bias": (6,)}


def test_identity_has_no_parameters_and_needs_equal_widths() -> None:
    projector = MultimodalProjector("identity", 4, 4)
    x = torch.randn(1, 9, 4)
    assert not projector.state_dict()
    assert projector(x) is x
    with pytest.raises(ConfigError, match="cannot turn 4 channels into the 6"):
        MultimodalProjector("identity", 4, 6)


@pytest.mark.parametrize("name", ["mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2_new"])
def test_three_scale_projectors_announce_the_tokens_they_leave(name: str) -> None:
    assert num_output_tokens(name, 32) == 121


def test_depth_of_a_plain_mlp_is_read_from_its_name() -> None:
    assert num_output_tokens("mlp3x_gelu", 32) == 1024
    for name in ("mlp0x_gelu", "mlp100x_gelu", "mlpx_gelu", "mlp2x_gelu "):
        with pytest.raises(ConfigError, match=f"unknown projector '{name}'"):
            num_output_tokens(name, 32)


def test_features_may_lie_in_memory_in_any_order() -> None:
    x = torch.randn(2, 3, 16).transpose(1, 2)
    assert torch.equal(space_to_channel(x, 2), space_to_channel(x.contiguous(), 2))


def test_activation_is_the_exact_gelu_and_norms_use_the_usual_epsilon() -> None:
    for name in PROJECTORS:
        for module in MultimodalProjector(name, 6, 6).modules():
            assert not isinstance(module, nn.GELU) or module.approximate == "none"
            assert not isinstance(module, nn.LayerNorm) or module.eps == 1e-5


def test_unknown_projector_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown projector 'mlp_downsampel'.*did you mean 'mlp_downsample'"):
        MultimodalProjector("mlp_downsampel", 4, 6)
