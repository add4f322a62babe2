from __future__ import annotations

import math
import re

import pytest
import torch
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from nvila.data.tokenizers import build_word_tokenizer, token_id
from nvila.errors import ConfigError, DataError
from nvila.losses import chunked_cross_entropy
from nvila.time_tokens import (
    add_time_tokens,
    decode_times,
    encode_times,
    interval_iou,
    parse_interval,
    soft_targets,
    time_tokens,
)


@pytest.mark.parametrize(
    ("seconds", "duration", "token"),
    [
        ("<0>", 60, "<t0>"),
        ("<30>", 60, "<t50>"),  # 49.5 goes to the even neighbour
        ("<60>", 60, "<t99>"),
        ("<0.5>", 99, "<t0>"),
        ("<1.5>", 99, "<t2>"),
        ("<2.5>", 99, "<t2>"),
        ("<61>", 60, "<t99>"),
    ],
)
def test_seconds_become_the_nearest_token(seconds: str, duration: float, token: str) -> None:
    assert encode_times(f"at {seconds}, red.", duration) == f"at {token}, red."


@pytest.mark.parametrize(
    ("token", "duration", "seconds"),
    [
        ("<t0>", 60, "<0.0>"),
        ("<t50>", 60, "<30.3>"),
        ("<t99>", 60, "<60.0>"),
        ("<t1>", 60, "<0.61>"),
        ("<t100>", 60, "<60.0>"),
        ("<t12345>", 7.5, "<7.5>"),
    ],
)
def test_tokens_become_seconds_again(token: str, duration: float, seconds: str) -> None:
    assert decode_times(f"at {token}, red.", duration) == f"at {seconds}, red."


def test_every_token_survives_the_way_through_seconds() -> None:
    for duration in (3.7, 60, 5400):
        text = " ".join(time_tokens(100))
        assert encode_times(decode_times(text, duration), duration) == text


def test_all_moments_are_replaced_and_other_brackets_stay() -> None:
    assert encode_times("<1><2> <b> <-3> <4.> 5 <image>", 99) == "<t1><t2> <b> <-3> <4.> 5 <image>"
    assert decode_times("<t1><t2> t3 <tx> <t>", 99) == "<1.0><2.0> t3 <tx> <t>"


def test_number_and_spelling_of_the_tokens_are_settings() -> None:
    assert encode_times("<30>", 60, 11, "[T-{t}]") == "[T-5]"
    assert decode_times("[T-5] [T-11]", 60, 11, "[T-{t}]") == "<30.0> <60.0>"
    assert time_tokens(2, "[T-{t}]") == ["[T-0]", "[T-1]"]


def test_added_tokens_are_single_ordinary_tokens_that_decoding_keeps() -> None:
    tokenizer = build_word_tokenizer(["red"], model_max_length=64)
    size = len(tokenizer)
    ids = add_time_tokens(tokenizer, 100)
    assert ids == list(range(size, size + 100))
    assert add_time_tokens(tokenizer, 100) == ids  # nothing is added twice
    assert len(tokenizer) == size + 100
    encoded = tokenizer("<t7><t99> red").input_ids
    assert encoded == [size + 7, size + 99, token_id(tokenizer, "red")]
    assert re.sub(r"\s", "", str(tokenizer.decode(encoded, skip_special_tokens=True))) == "<t7><t99>red"


def test_neighbours_in_time_share_the_target() -> None:
    soft = soft_targets(list(range(500, 600)), std=1.0)
    middle = soft.weights[50]
    assert [round(float(middle[50 + d]), 4) for d in range(4)] == [0.3989, 0.2420, 0.0540, 0.0044]
    torch.testing.assert_close(middle[40:50], middle[51:61].flip(0))
    # At the ends the same shape is cut and scaled up again.
    cut = [math.exp(-d * d / 2) for d in range(100)]
    torch.testing.assert_close(soft.weights[0], torch.tensor(cut) / sum(cut))
    torch.testing.assert_close(soft.weights.sum(1), torch.ones(100))
    assert soft.ids.tolist() == list(range(500, 600))


@pytest.mark.parametrize("std", [0.0, 1e-200, 1e-3, 0.05])
def test_a_narrow_target_is_the_ordinary_cross_entropy(std: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8), torch.randn(40, 8)
    targets = torch.arange(28, 40)  # the ends too
    soft = soft_targets(list(range(30, 40)), std=std)
    found = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=5, reduction="none", soft=soft)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, reduction="none"))


def test_a_near_miss_costs_less_than_a_wide_one() -> None:
    soft = soft_targets(list(range(10, 20)))
    logits = 5 * torch.eye(20)  # with the identity as head, row i says token i
    losses = [
        float(chunked_cross_entropy(logits[[said]], torch.eye(20), torch.tensor([14]), soft=soft))
        for said in (14, 15, 16, 17)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[1] - 0.5


@pytest.mark.parametrize(
    ("answer", "interval"),
    [
        ("<t0> <t99> the whole", (0, 60)),
        ("it happens from <t10> to <t50>, again at <t70>", (6.06, 30.3)),
        ("<t50> <t10>", (6.06, 30.3)),
        ("<12.5> to <20>", (12.5, 20)),
        ("<12.5> to <t50>", (12.5, 30.3)),
        ("<10> to <1000>", (10, 60)),
        ("<t10> only", (0, 60)),
        ("no idea", (0, 60)),
        ("", (0, 60)),
    ],
)
def test_an_answer_names_the_span_of_its_first_two_moments(answer: str, interval: tuple[float, float]) -> None:
    assert parse_interval(answer, 60) == pytest.approx(interval)


@pytest.mark.parametrize(
    ("first", "second", "iou"),
    [
        ((0, 1), (2, 3), 0.0),
        ((2, 3), (0, 1), 0.0),
        ((1, 5), (1, 5), 1.0),
        ((0, 10), (4, 6), 0.2),
        ((0, 6), (4, 10), 0.2),
        ((3, 3), (3, 3), 0.0),
    ],
)
def test_overlap_of_spans(first: tuple[float, float], second: tuple[float, float], iou: float) -> None:
    assert interval_iou(first, second) == pytest.approx(iou)


@pytest.mark.parametrize("duration", [0, -1, math.nan, math.inf])
def test_a_duration_must_be_a_positive_number(duration: float) -> None:
    for function in (encode_times, decode_times, parse_interval):
        with pytest.raises(DataError, match=r"duration of a video is .* seconds"):
            function("<1>", duration)


def test_wrong_settings_of_time_tokens_are_named() -> None:
    with pytest.raises(ConfigError, match=r"time_token_format is '<t>'.*\{t\}"):
        time_tokens(100, "<t>")
    for function in (encode_times, decode_times, parse_interval):
        with pytest.raises(ConfigError, match="num_time_tokens is 1"):
            function("<1>", 60, 1)
    for std in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="soft_ce_std is"):
            soft_targets([1, 2], std)
