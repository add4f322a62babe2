from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from nvila.data.collation import Batch, collate
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.packing import collate_packed, flatten, pack
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.errors import CapabilityError, ConfigError, DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.packed_attention import PACKED_SDPA, joins_rows, use_packed_attention
from nvila.training.loop import model_inputs


def plain(length: int, mark: int = 0) -> Encoded:
    return Encoded(ids=(mark,) * length, labels=(-100,) * length, images=(), media_end=0)


@given(lengths=st.lists(st.integers(1, 20), max_size=30))
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_sample_once_and_leave_little_room(lengths: list[int]) -> None:
    samples = [plain(length, mark) for mark, length in enumerate(lengths)]
    rows = pack(samples, 20)
    marks = [[sample.ids[0] for sample in row] for row in rows]
    assert sorted(mark for row in marks for mark in row) == list(range(len(lengths)))
    assert marks == sorted(map(sorted, marks))
    sizes = [sum(len(sample.ids) for sample in row) for row in rows]
    assert max(sizes, default=0) <= 20
    # A row is only begun by a sample that fits into none there is, so no two rows would fit into one.
    assert all(first + second > 20 for first, second in combinations(sizes, 2))
    assert pack(samples, 20) == rows


def test_the_fullest_row_with_room_is_filled_first() -> None:
    rows = pack([plain(2, 0), plain(5, 1), plain(7, 2), plain(3, 3)], 10)
    assert [[sample.ids[0] for sample in row] for row in rows] == [[0, 1], [2, 3]]


def test_a_sample_longer_than_a_row_is_named_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"sample 1 has 21 tokens, more than the 20 of a packed row.*max_length"):
        pack([plain(3), plain(21)], 20)


@pytest.fixture(scope="module")
def samples(encoder: ConversationEncoder) -> list[Encoded]:
    """Six samples: with an image, with another, without, and two that are equal."""
    return [
        encoder(vqa_sample(id="s", source="s", image=image, question=question, answer=answer))
        for image, question, answer in (
            ("a", "what color is the shape?", "red"),
            (None, "is there a circle?", "yes yes\nyes"),
            ("b", "what shape is in the image?", "the red circle"),
            ("a", "what color is the shape?", "red"),
            ("c", "describe the image.", "blue rectangle"),
            (None, "what?", "no"),
        )
    ]


def pairs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }


def lengths(batch: Batch) -> dict[str, Any]:
    return dict(flatten(batch).model_inputs())


def positions_alone(batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "labels", "position_ids", "use_cache")
    return {name: value for name, value in lengths(batch).items() if name in names}


BACKENDS = [("eager", pairs), ("sdpa", pairs), (PACKED_SDPA, lengths), (PACKED_SDPA, pairs), ("sdpa", positions_alone)]
IDS = ["eager", "sdpa", "lengths", "lengths-given-pairs", "positions"]


def with_attention(model: NVILAForConditionalGeneration, attention: str) -> NVILAForConditionalGeneration:
    changed = copy.deepcopy(model)
    if attention == PACKED_SDPA:
        use_packed_attention(changed.model.language_model)
    else:
        changed.model.language_model.set_attn_implementation(attention)
    assert changed.model.language_model.config._attn_implementation == attention
    return changed


def loss_and_gradients(
    model: NVILAForConditionalGeneration, weighted_losses: Sequence[tuple[Tensor, float]]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = torch.stack([loss * weight for loss, weight in weighted_losses]).sum()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("attention", "inputs"), BACKENDS, ids=IDS)
@pytest.mark.parametrize("max_length", [40, 128])
def test_packed_rows_equal_the_token_weighted_samples(
    max_length: int,
    attention: str,
    inputs: Callable[[Batch], dict[str, Any]],
    samples: list[Encoded],
    model: NVILAForConditionalGeneration,
    tiles: PixelCache,
) -> None:
    batch = collate_packed(pack(samples, max_length), pad_token_id=0, pad_to_multiple_of=16)
    assert batch.input_ids.shape[0] == (1 if max_length == 128 else 4)
    changed = with_attention(model, attention)
    packed = changed(**inputs(batch), pixel_values=tiles(batch.images)).loss
    found, by_parameter = loss_and_gradients(changed, [(packed, 1.0)])

    weighted = []
    for sample in samples:
        logits = model(
            input_ids=torch.tensor([sample.ids]), pixel_values=tiles(sample.images) if sample.images else None
        ).logits
        loss = F.cross_entropy(logits[0, :-1], torch.tensor(sample.labels[1:]), ignore_index=-100)
        weighted.append((loss, sample.num_supervised / sum(other.num_supervised for other in samples)))
    expected, by_sample = loss_and_gradients(model, weighted)
    model.zero_grad()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert by_parameter.keys() == by_sample.keys()
    for name, gradient in by_sample.items():
        torch.testing.assert_close(by_parameter[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("attention", "inputs"), BACKENDS, ids=IDS)
def test_no_sample_sees_another(
    attention: str,
    inputs: Callable[[Batch], dict[str, Any]],
    samples: list[Encoded],
    model: NVILAForConditionalGeneration,
) -> None:
    batch = collate_packed([samples], pad_token_id=0)
    given_ = inputs(batch)
    embeds = model.get_input_embeddings()(given_.pop("input_ids")).detach().requires_grad_()
    del given_["labels"]
    hidden = with_attention(model, attention).model(inputs_embeds=embeds, **given_).last_hidden_state
    start = 0
    for sample in samples:
        own = slice(start, start + len(sample.ids))
        [influence] = torch.autograd.grad(hidden[:, own].square().sum(), embeds, retain_graph=True)
        touched = influence.abs().sum((0, 2)) > 0
        assert bool(touched[own].all())
        assert int(touched.sum()) == len(sample.ids)
        start = own.stop


def test_a_packed_row_by_hand() -> None:
    first = Encoded(ids=(5, 6, 7), labels=(5, -100, 7), images=("a",), media_end=2)
    second = Encoded(ids=(8, 9), labels=(-100, 9), images=("b",), media_end=1, videos=("v",))
    batch = collate_packed([[first, second], [second]], pad_token_id=1, pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 1, 1], [8, 9, 1, 1, 1, 1, 1, 1]]
    # A first token has nothing of its own before it, so it is no label whatever the sample says.
    assert batch.labels.tolist() == [[-100, -100, 7, -100, 9, -100, -100, -100], [-100, 9, *[-100] * 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, *[0] * 6]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, -1, -1, -1], [1, 1, *[-1] * 6]]
    assert (batch.images, batch.videos, batch.num_samples) == (("a", "b", "b"), ("v", "v"), 3)
    flat = flatten(batch)
    assert flat.input_ids.tolist() == [[5, 6, 7, 8, 9, 8, 9]]
    assert flat.labels.tolist() == [[-100, -100, 7, -100, 9, -100, 9]]
    assert flat.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert (flat.cu_seqlens.tolist(), flat.cu_seqlens.dtype, flat.max_seqlen) == ([0, 3, 5, 7], torch.int32, 3)


def test_a_row_of_one_a_padded_row_and_generation_are_those_of_sdpa(
    samples: list[Encoded], model: NVILAForConditionalGeneration
) -> None:
    joined = with_attention(model, PACKED_SDPA).eval()
    plain_ = with_attention(model, "sdpa").eval()
    ids = torch.tensor([sample.ids[:6] for sample in samples if not sample.images])
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for mask in (None, padded):
        torch.testing.assert_close(
            joined(input_ids=ids, attention_mask=mask).logits[:, 2:],
            plain_(input_ids=ids, attention_mask=mask).logits[:, 2:],
        )
        found, expected = (
            one.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            for one in (joined, plain_)
        )
        assert torch.equal(found, expected)


def test_decoders_with_windows_keep_their_attention(model: NVILAForConditionalGeneration) -> None:
    changed = with_attention(model, "sdpa").model.language_model
    changed.config.layer_types = ["sliding_attention", *changed.config.layer_types[1:]]
    use_packed_attention(changed)
    assert not joins_rows(changed)
    changed.config.layer_types = ["full_attention"] * len(changed.config.layer_types)
    use_packed_attention(changed)
    assert joins_rows(changed)


def test_training_joins_rows_unless_samples_share_a_beginning(samples: list[Encoded]) -> None:
    packed = collate_packed(pack(samples, 40), pad_token_id=0)
    flat = model_inputs(packed, {}, flat=True)
    assert isinstance(flat["input_ids"], Tensor)
    assert flat["input_ids"].shape == (1, sum(len(sample.ids) for sample in samples))
    assert "attention_mask" not in flat
    assert "attention_mask" in model_inputs(packed, {})
    sharing = collate([[samples[0], samples[3]]], pad_token_id=0)
    assert "attention_mask" in model_inputs(sharing, {}, flat=True)


def test_wrong_uses_of_packing_are_named(samples: list[Encoded]) -> None:
    with pytest.raises(ConfigError, match="pad_to_multiple_of is 0"):
        collate_packed([samples], pad_token_id=0, pad_to_multiple_of=0)
    sharing = collate([[samples[0], samples[3]]], pad_token_id=0)
    with pytest.raises(CapabilityError, match=r"share a prefix.*sdpa"):
        flatten(sharing)


@pytest.mark.gpu
def test_flash_attention_gives_the_packed_loss_of_sdpa(
    samples: list[Encoded], fresh_model: NVILAForConditionalGeneration, tiles: PixelCache
) -> None:
    pytest.importorskip("flash_attn")
    batch = collate_packed(pack(samples, 128), pad_token_id=0)
    pixels = tiles(batch.images).to("cuda", torch.bfloat16)
    model = torch.nn.Module.to(fresh_model, "cuda", torch.bfloat16)
    losses = []
    for attention, inputs in (("sdpa", pairs(batch)), ("flash_attention_2", lengths(batch))):
        model.model.language_model.set_attn_implementation(attention)
        on_device = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        losses.append(model(**on_device, pixel_values=pixels).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)
