"""The searches on planted weights and inputs: what they find must beat rounding, and folds must not change anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.folding import Fold, apply_fold, fold_weights, folds_of, restore_fold
from nvila.quantization.scales import awq_scale, clip_weight, smooth_scale
from nvila.quantization.schemes import quantize_linears, rounded_to_4_bits
from nvila.quantization.statistics import KEPT_ROWS, InputStatistics, watching_inputs

FOLD = Fold("before", ("after",))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(outlier: float, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """Weights of one size, and inputs whose every sixteenth channel is far larger."""
    x = noise(256, inputs, seed=1)
    x[:, ::16] *= outlier
    return noise(48, inputs), x


def product_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (rounded - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("outlier", [10.0, 50.0])
def test_awq_beats_rounding_on_planted_outlier_channels(outlier: float) -> None:
    weight, x = planted(outlier)
    scale, left = awq_scale(FOLD, [weight], x.abs().mean(0), x, 32)
    assert scale is not None
    rounded = product_error(weight, rounded_to_4_bits(weight, 32), x)
    scaled = product_error(weight, rounded_to_4_bits(weight * scale, 32) / scale, x)
    assert scaled < 0.75 * rounded
    assert left == pytest.approx((scaled / rounded) ** 2, rel=1e-4)
    assert float(scale[::16].mean()) > 2 * float(scale[1::16].mean())


def test_awq_leaves_alone_what_no_scale_improves() -> None:
    # Integers on the grid already: any scale moves them off it.
    weight = torch.arange(-7, 9).repeat(32, 4).float()
    scale, left = awq_scale(FOLD, [weight], torch.rand(64) + 0.5, noise(64, 64), 16)
    assert scale is None
    assert left == 1.0


def test_clipping_lowers_the_error_of_a_group_with_one_wild_weight() -> None:
    weight, x = noise(32, 64), noise(512, 64, seed=2)
    weight[:, 5] = 8.0
    x[:, 5] *= 0.01  # large, but nothing reads it
    statistics = InputStatistics(32, len(x))
    statistics.add(x)
    assert statistics.gram is not None
    clipped = weight.clone()
    share = clip_weight(clipped, statistics.gram, 32)
    before = product_error(weight, rounded_to_4_bits(weight, 32), x)
    after = product_error(weight, rounded_to_4_bits(clipped, 32), x)
    assert after < 0.8 * before
    assert 0.4 < share <= 1.0
    assert float(clipped[:, 5].max()) < 8.0


def test_clipping_in_pieces_gives_what_clipping_at_once_does(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = noise(32, 64), noise(128, 64, seed=2)
    gram = x.unflatten(1, (2, 32)).transpose(0, 1)
    gram = gram.transpose(1, 2) @ gram
    whole, pieces = weight.clone(), weight.clone()
    share = clip_weight(whole, gram, 32)
    monkeypatch.setattr("nvila.quantization.schemes.CHUNK_ELEMENTS", 5 * 64)
    assert clip_weight(pieces, gram, 32) == share
    assert torch.equal(whole, pieces)


def test_smoothquant_takes_outliers_out_of_activations() -> None:
    weight, x = planted(100.0)
    scale = smooth_scale([weight], x.abs().amax(0), 0.5)
    expected = x.abs().amax(0).sqrt() / weight.abs().amax(0).sqrt()
    torch.testing.assert_close(scale, expected)
    smooth = (x / scale).abs().amax(0)
    assert float(smooth.max() / smooth.min()) < 0.2 * float(x.abs().amax(0).max() / x.abs().amax(0).min())
    errors = []
    for w, rows in ((weight, x), (weight * scale, x / scale)):
        layer = nn.Sequential(nn.Linear(64, 48, bias=False))
        layer[0].weight = nn.Parameter(w.clone())
        quantize_linears(layer, "w8a8", 32)
        with torch.no_grad():
            errors.append(float((layer(rows) - x @ weight.t()).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_a_channel_that_was_never_seen_is_not_scaled() -> None:
    seen = torch.tensor([0.0, 4.0])
    scale = smooth_scale([torch.ones(3, 2)], seen, 0.5)
    assert scale.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_says_who_takes_the_range(alpha: float) -> None:
    weight, x = planted(10.0)
    seen = x.abs().amax(0)
    expected = seen if alpha == 1.0 else 1 / weight.abs().amax(0)
    torch.testing.assert_close(smooth_scale([weight], seen, alpha), expected)


def blocks(model: NVILAForConditionalGeneration) -> dict[str, nn.Module]:
    changed = copy.deepcopy(model.model)
    return {"language": changed.language_model.layers[0], "vision": changed.vision_tower.encoder.layers[0]}


def run_block(kind: str, block: nn.Module) -> Tensor:
    width = 64 if kind == "language" else 32
    x = noise(2, 9, width, seed=3)
    if kind == "vision":
        found: Tensor = block(x, None)
        return found
    angles = noise(1, 9, 16, seed=4)
    out: Tensor = block(x, position_embeddings=(angles.cos(), angles.sin()))
    return out


@pytest.mark.parametrize(("kind", "names"), [("language", 4), ("vision", 2)])
def test_folding_changes_weights_but_not_the_block(kind: str, names: int, model: NVILAForConditionalGeneration) -> None:
    block = blocks(model)[kind]
    folds = folds_of(block)
    assert len(folds) == names
    for number, fold in enumerate(folds):
        with torch.no_grad():
            before = run_block(kind, block)
            weights = [weight.clone() for weight in fold_weights(block, fold)]
            # With grouped heads there are fewer channels before than after.
            scale = noise(len(weights[0]), seed=number).exp()
            apply_fold(block, fold, scale)
            assert not torch.equal(fold_weights(block, fold)[-1], weights[-1])
            torch.testing.assert_close(run_block(kind, block), before, rtol=1e-4, atol=1e-4)
            restore_fold(block, fold, weights)
            assert torch.equal(run_block(kind, block), before)


def test_grouped_heads_share_the_scale_of_the_values_they_read(model: NVILAForConditionalGeneration) -> None:
    fold = folds_of(blocks(model)["language"])[1]
    assert (fold.before, fold.repeat, fold.head_size) == ("self_attn.v_proj", 2, 16)
    scale = torch.arange(32.0)
    spread = fold.spread(scale)
    assert torch.equal(spread[:16], spread[16:32])  # two heads of queries read the first head of values
    assert spread[32:48].tolist() == list(range(16, 32))
    assert torch.equal(fold.gather(spread), scale)


def test_blocks_of_unknown_names_have_no_folds() -> None:
    assert folds_of(nn.Sequential(nn.Linear(4, 4))) == ()


def test_statistics_of_batches_are_those_of_all_rows() -> None:
    x = noise(3000, 32)
    whole, parts = InputStatistics(16, 3000), InputStatistics(16, 3000)
    whole.add(x)
    for part in x.split(700):
        parts.add(part.unsqueeze(0))
    torch.testing.assert_close(whole.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(parts.mean_abs, whole.mean_abs)
    assert whole.max_abs is not None
    assert parts.max_abs is not None
    assert torch.equal(whole.max_abs, parts.max_abs)
    assert torch.equal(whole.rows, x[::5][:KEPT_ROWS])
    assert torch.equal(parts.rows, whole.rows)
    assert whole.gram is not None
    assert parts.gram is not None
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-3)


def test_layers_that_read_one_tensor_share_statistics() -> None:
    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "o")}
    with watching_inputs(layers, lambda: InputStatistics(None, 20)) as found:
        for seed in range(2):
            x = noise(10, 8, seed=seed)
            layers["o"](layers["q"](x) + layers["k"](x))
    assert found["q"] is found["k"]
    assert found["o"] is not found["q"]
    assert (found["q"].count, found["o"].count) == (20, 20)
    layers["q"](noise(10, 8))
    assert found["q"].count == 20
