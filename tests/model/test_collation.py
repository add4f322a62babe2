from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvila.data.collation import Batch, collate, pair_mask, shared_prefix_length
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Message, Part, Sample, vqa_sample
from nvila.data.tensors import PixelCache
from nvila.data.tokenizers import IMAGE_TOKEN, token_id
from nvila.modeling import NVILAForConditionalGeneration

Content = Sequence[str]


def conversation(content: Content, answer: str, *more: str) -> Sample:
    """Build a sample; a piece of content that is one letter behind @ is an image."""
    parts = tuple(
        Part(type="image", value=piece[1:]) if piece.startswith("@") else Part(type="text", value=piece)
        for piece in content
    )
    messages = [Message(role="user", content=parts)]
    for number, text in enumerate((answer, *more)):
        role = "assistant" if number % 2 == 0 else "user"
        messages.append(Message(role=role, content=(Part(type="text", value=text),)))  # type: ignore[arg-type]  # a role
    return Sample(id="s", source="s", messages=tuple(messages))


GROUPS: dict[str, list[list[Sample]]] = {
    "questions about one image": [
        [
            conversation(["@a", "what color is the shape?"], "red"),
            conversation(["@a", "what shape is in the image?"], "the red circle\nyes"),
            conversation(["@a", "is there a triangle?"], "no"),
        ],
        [conversation(["@b", "describe the image."], "blue rectangle")],
    ],
    "the same question twice": [[conversation(["@a", "what?"], "red"), conversation(["@a", "what?"], "blue")]],
    "two images": [
        [
            conversation(["@a", "@b", "what color?"], "red"),
            conversation(["@a", "@b", "what shape?"], "circle", "is there a red circle?", "yes"),
        ]
    ],
    "text before the second image": [
        [
            conversation(["@a", "first ", "@b", "what color?"], "red"),
            conversation(["@a", "first second ", "@b", "what shape?"], "circle"),
        ],
        [conversation(["@c", "is there a circle?"], "yes"), conversation(["@c", "is there a red circle?"], "no")],
    ],
    "no images": [[conversation(["is there a circle?"], "yes"), conversation(["is the circle red?"], "no no")]],
    "one sample a row": [
        [conversation(["@a", "what?"], "red")],
        [conversation(["@b", "is there a red circle?"], "no", "what?", "blue")],
        [conversation(["what shape is in the image?"], "circle")],
    ],
    "answers in a prefix": [
        [
            conversation(["@a", "what?"], "red", "is there a circle?", "yes"),
            conversation(["@a", "what?"], "red", "is there a circle?", "no"),
        ]
    ],
}


def inputs_of(batch: Batch, tiles: PixelCache) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": tiles(batch.images) if batch.images else None,
    }


def likelihoods(model: NVILAForConditionalGeneration, batch: Batch, tiles: PixelCache) -> Tensor:
    hidden = model.model(**inputs_of(batch, tiles)).last_hidden_state
    return model.supervised_nll(hidden, batch.labels)[0]


def one_by_one(model: NVILAForConditionalGeneration, groups: Sequence[Sequence[Encoded]], tiles: PixelCache) -> Tensor:
    """Likelihoods of plain rows: no collation, no mask, no positions."""
    out = []
    for encoded in (sample for group in groups for sample in group):
        pixels = tiles(encoded.images) if encoded.images else None
        logits = model(input_ids=torch.tensor([encoded.ids]), pixel_values=pixels).logits[0, :-1]
        targets = torch.tensor(encoded.labels[1:])
        losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        out.append(losses[targets != -100])
    return torch.cat(out)


def gradients(model: NVILAForConditionalGeneration, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROUPS)
def test_shared_rows_equal_samples_taken_one_by_one(
    name: str,
    attention: str,
    model: NVILAForConditionalGeneration,
    encoder: ConversationEncoder,
    tiles: PixelCache,
) -> None:
    groups = [[encoder(sample) for sample in group] for group in GROUPS[name]]
    batch = collate(groups, pad_token_id=0)
    assert batch.input_ids.shape[0] == len(groups)
    changed = copy.deepcopy(model)
    changed.set_attn_implementation(attention)
    assert changed.model.language_model.config._attn_implementation == attention
    packed, plain = likelihoods(changed, batch, tiles), one_by_one(changed, groups, tiles)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    shared, alone = gradients(changed, packed.mean()), gradients(changed, plain.mean())
    assert shared.keys() == alone.keys()
    for key, gradient in alone.items():
        torch.testing.assert_close(shared[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("name", "images", "rows_shared"),
    [
        ("questions about one image", "ab", [True, False]),
        ("two images", "ab", [True]),
        ("text before the second image", "ababc", [False, True]),
        ("no images", "", [True]),
    ],
)
def test_images_are_encoded_once_where_the_row_shares_them(
    name: str, images: str, rows_shared: list[bool], encoder: ConversationEncoder
) -> None:
    groups = [[encoder(sample) for sample in group] for group in GROUPS[name]]
    batch = collate(groups, pad_token_id=0)
    assert batch.images == tuple(images)
    assert [bool(shared_prefix_length(group)) for group in groups] == rows_shared
    image_id = token_id(encoder.tokenizer, IMAGE_TOKEN)
    assert int((batch.input_ids == image_id).sum()) == 4 * len(images)


def test_sharing_saves_the_prefix_of_every_further_sample(encoder: ConversationEncoder) -> None:
    group = [encoder(sample) for sample in GROUPS["questions about one image"][0]]
    shared = shared_prefix_length(group)
    # <|im_start|> user LF, four visual tokens, LF; "what" is common to two of the three only
    assert shared == 8
    batch = collate([group], pad_token_id=0)
    assert batch.num_tokens == sum(len(sample.ids) for sample in group) - 2 * shared
    assert batch.num_supervised == sum(sample.num_supervised for sample in group)
    assert batch.num_samples == 3


def test_a_sample_alone_is_not_split(encoder: ConversationEncoder) -> None:
    encoded = encoder(conversation(["@a", "what?"], "red"))
    assert shared_prefix_length([encoded]) == 0
    batch = collate([[encoded]], pad_token_id=0)
    assert batch.input_ids.tolist() == [list(encoded.ids)]
    assert batch.labels.tolist() == [list(encoded.labels)]
    assert batch.position_ids.tolist() == [list(range(len(encoded.ids)))]
    assert batch.attention_mask.tolist() == [[True] * len(encoded.ids)]


def test_padding_is_behind_and_unsupervised(encoder: ConversationEncoder) -> None:
    long, short = encoder(conversation(["is there a circle?"], "yes")), encoder(conversation(["what?"], "no"))
    batch = collate([[long], [short]], pad_token_id=7)
    padded = len(long.ids) - len(short.ids)
    assert padded > 0
    assert batch.input_ids[1, -padded:].tolist() == [7] * padded
    assert batch.labels[1, -padded:].tolist() == [-100] * padded
    assert batch.num_tokens == len(long.ids) + len(short.ids)
    # Rows of one sample each get by without a mask of pairs, however long they are.
    assert batch.attention_mask.tolist() == [
        [True] * len(long.ids),
        [True] * len(short.ids) + [False] * padded,
    ]
    assert collate([[long, short], [short]], pad_token_id=7).attention_mask.dim() == 4


def allowed(segments: list[int], query: int, key: int) -> bool:
    """Say in words who sees whom: never the future; the prefix, the own sample, oneself."""
    if key > query:
        return False
    return segments[key] == 0 or segments[key] == segments[query]


@given(rows=st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_pair_mask_follows_its_rule(rows: list[list[int]]) -> None:
    mask = pair_mask(torch.tensor(rows))
    assert mask.shape == (len(rows), 1, 5, 5)
    for b, segments in enumerate(rows):
        assert mask[b, 0].tolist() == [[allowed(segments, q, k) for k in range(5)] for q in range(5)]


@pytest.fixture(scope="module")
def make(encoder: ConversationEncoder) -> Callable[[str, str], Encoded]:
    def encode(question: str, answer: str) -> Encoded:
        return encoder(vqa_sample(id="s", source="s", image="a", question=question, answer=answer))

    return encode


def test_the_prefix_ends_before_the_token_that_predicts_the_first_answer(
    make: Callable[[str, str], Encoded],
) -> None:
    group = [make("what?", "red"), make("what?", "blue")]
    shared = shared_prefix_length(group)
    first_label = next(index for index, label in enumerate(group[0].labels) if label != -100)
    assert shared == first_label - 1
    assert collate([group], pad_token_id=0).segments.tolist() == [[0] * shared + [1] * 3 + [2] * 3]


def test_samples_about_other_videos_share_nothing() -> None:
    def about(video: str, label: int) -> Encoded:
        return Encoded(
            ids=(1, 9, 9, 2, 3, label), labels=(-100,) * 5 + (label,), images=("a",), media_end=3, videos=(video,)
        )

    assert shared_prefix_length([about("x", 5), about("x", 6)]) == 4
    assert shared_prefix_length([about("x", 5), about("y", 6)]) == 0
    assert collate([[about("x", 5), about("x", 6)]], pad_token_id=0).videos == ("x",)
    apart = collate([[about("x", 5), about("y", 6)]], pad_token_id=0)
    assert (apart.videos, apart.images) == (("x", "y"), ("a", "a"))


def test_no_token_is_learned_from_the_sample_before_it() -> None:
    """Samples about other images share a row; nothing in it may predict the first token of the second."""
    samples = [Encoded(ids=(5, 6), labels=(5, 6), images=(image,), media_end=0) for image in "ab"]
    assert collate([samples], pad_token_id=0).labels.tolist() == [[-100, 6, -100, 6]]
