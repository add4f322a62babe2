from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.data.token_budget import Row, SampleSizes, TokenBudget, TokenBudgetSampler, row_length, row_tiles
from nvila.errors import CheckpointError, ConfigError

MAX = 40


def make_sizes(lengths: list[int], tiles: list[int] | None = None, groups: list[int] | None = None) -> SampleSizes:
    """Samples; those of one group share all but their last two positions or as much as the shortest allows."""
    group = np.array(groups if groups is not None else range(len(lengths)), np.int64)
    shortest = {number: min(np.array(lengths)[group == number]) for number in set(group.tolist())}
    prefixes = [max(0, int(shortest[number]) - 2) for number in group.tolist()]
    return SampleSizes(
        lengths=np.array(lengths, np.int64),
        tiles=np.array(tiles if tiles is not None else [0] * len(lengths), np.int64),
        prefixes=np.array(prefixes, np.int64),
        groups=group,
    )


def make(sizes: SampleSizes, *, rank: int = 0, world: int = 1, seed: int = 3, **budget: Any) -> TokenBudgetSampler:
    values = {"batch_tokens": 8 * MAX, "micro_batch_tokens": 3 * MAX, "max_length": MAX} | budget
    return TokenBudgetSampler(sizes, TokenBudget(**values), seed=seed, rank=rank, world=world)


@st.composite
def problems(draw: st.DrawFn) -> tuple[SampleSizes, dict[str, Any]]:
    count = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(3, MAX), min_size=count, max_size=count))
    tiles = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    shared = {group: tiles[groups.index(group)] for group in groups}
    sizes = make_sizes(lengths, [shared[group] for group in groups], groups)
    budget = {
        "pack": draw(st.booleans()),
        "samples_per_image": draw(st.integers(1, 4)),
        "tile_positions": draw(st.sampled_from([0, 5])),
        "flat": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }
    return sizes, budget


def epoch(sampler: TokenBudgetSampler, number: int = 0) -> list[list[Row]]:
    batches: list[list[Row]] = []
    while len(batches) < sampler.num_steps(number + 1) - sampler.num_steps(number):
        batches.append(sampler.global_batch(number, len(batches)))
    return batches


def flat(steps: list[list[list[Row]]]) -> list[int]:
    return [index for step in steps for micro in step for row in micro for index in row]


@given(problem=problems(), number=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_every_sample_comes_once_an_epoch_in_rows_and_batches_within_their_limits(
    problem: tuple[SampleSizes, dict[str, Any]], number: int
) -> None:
    sizes, budget = problem
    batches = epoch(make(sizes, **budget), number)
    rows = [row for batch in batches for row in batch]
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(row_length(sizes, row) <= MAX for row in rows)
    cost = budget["tile_positions"]
    work = [sum(row_length(sizes, row) + cost * row_tiles(sizes, row) for row in batch) for batch in batches]
    assert max(work) <= 8 * MAX
    several = [row_length(sizes, row) + cost * row_tiles(sizes, row) for row in rows if len(row) > 1]
    assert max(several, default=0) <= MAX
    if not budget["pack"]:
        assert all(len({int(sizes.groups[index]) for index in row}) == 1 for row in rows)
        assert all(len(row) <= budget["samples_per_image"] for row in rows)


@given(problem=problems(), world=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_processes_together_get_the_global_batches_in_equally_many_micro_batches(
    problem: tuple[SampleSizes, dict[str, Any]], world: int
) -> None:
    sizes, budget = problem
    samplers = [make(sizes, rank=rank, world=world, **budget) for rank in range(world)]
    for batch in epoch(make(sizes, **budget)):
        shares = [next(sampler) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1
        assert sorted(row for share in shares for micro in share for row in micro) == sorted(batch)
        # Each rank has its rows by itself: no micro-batch is over the budget of a forward pass.
        for micro in (micro for share in shares for micro in share if micro):
            lengths = [row_length(sizes, row) for row in micro]
            padded = sum(lengths) if budget["flat"] else len(micro) * max(lengths)
            assert padded + budget["tile_positions"] * sum(row_tiles(sizes, row) for row in micro) <= 3 * MAX
        # Dealing the longest first to whom has least leaves no more than one row between any two.
        weights = [
            [
                row_length(sizes, row) + budget["tile_positions"] * row_tiles(sizes, row)
                for micro in share
                for row in micro
            ]
            for share in shares
        ]
        work = [sum(row) for row in weights]
        assert max(work) - min(work) <= max(max(row, default=0) for row in weights)


@given(problem=problems(), stop=st.integers(0, 12), worlds=st.tuples(st.integers(1, 3), st.integers(1, 3)))
@settings(max_examples=60, deadline=None)
def test_going_on_from_any_state_equals_never_having_stopped(
    problem: tuple[SampleSizes, dict[str, Any]], stop: int, worlds: tuple[int, int]
) -> None:
    sizes, budget = problem
    before, after = worlds
    first = make(sizes, rank=before - 1, world=before, **budget)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    whole = [make(sizes, rank=rank, world=after, **budget) for rank in range(after)]
    for _ in range(stop):
        for sampler in whole:
            next(sampler)
    resumed = [make(sizes, rank=rank, world=after, **budget) for rank in range(after)]
    for sampler in resumed:
        sampler.load_state_dict(state)
    for _ in range(5):
        assert [next(sampler) for sampler in resumed] == [next(sampler) for sampler in whole]


@pytest.mark.parametrize("pack", [True, False])
def test_the_seed_fixes_the_sequence_and_epochs_differ(pack: bool) -> None:
    sizes = make_sizes([5 + number % 20 for number in range(200)])
    one, again, other = (make(sizes, seed=seed, pack=pack) for seed in (1, 1, 2))
    assert epoch(one) == epoch(again)
    assert epoch(one) != epoch(other)
    assert epoch(one, 0) != epoch(one, 1)
    assert [next(one) for _ in range(12)] == [next(again) for _ in range(12)]
    # Shuffled: the first batch is not the first samples, nor the shortest ones.
    assert sorted(flat([next(make(sizes, seed=1, pack=pack))] and [next(again)])) != list(range(20))


def test_packed_rows_are_full_and_sorted_rows_need_little_padding() -> None:
    noise = np.random.default_rng(0)
    sizes = make_sizes(noise.choice([4, 6, 30, 39], 2000).tolist())
    packed = [row for batch in epoch(make(sizes, pack=True, batch_tokens=20 * MAX)) for row in batch]
    assert sum(row_length(sizes, row) for row in packed) / (MAX * len(packed)) > 0.9
    sampler = make(sizes, batch_tokens=20 * MAX)
    used = held = 0
    for _ in range(sampler.num_steps(1)):
        for micro in next(sampler):
            used += sum(row_length(sizes, row) for row in micro)
            held += len(micro) * max(row_length(sizes, row) for row in micro)
    assert used / held > 0.9


def test_batches_of_similar_lengths_come_in_random_order() -> None:
    sizes = make_sizes(np.random.default_rng(0).integers(3, MAX, 2000).tolist())
    means = [np.mean([row_length(sizes, row) for row in batch]) for batch in epoch(make(sizes))]
    rising = sum(later > earlier for earlier, later in pairwise(means))
    assert 0.35 < rising / len(means) < 0.65


def test_samples_of_an_image_share_rows_of_changing_company() -> None:
    sizes = make_sizes([10] * 40, [1] * 40, [number // 8 for number in range(40)])
    sampler = make(sizes, samples_per_image=3)
    rows = [row for batch in epoch(sampler) for row in batch]
    assert Counter(map(len, rows)) == {3: 10, 2: 5}
    assert all(row_length(sizes, row) == 8 + 2 * len(row) and row_tiles(sizes, row) == 1 for row in rows)
    assert sorted(map(sorted, rows)) != sorted(sorted(row) for batch in epoch(sampler, 1) for row in batch)


def test_groups_without_a_common_beginning_stay_apart() -> None:
    sizes = make_sizes([10] * 4, groups=[0] * 4)
    apart = SampleSizes(lengths=sizes.lengths, tiles=sizes.tiles, prefixes=0 * sizes.prefixes, groups=sizes.groups)
    assert {len(row) for row in epoch(make(apart, samples_per_image=4))[0]} == {1}


def test_tiles_count_in_batches_and_in_forward_passes() -> None:
    sizes = make_sizes([10] * 64, [4] * 64)
    light, heavy = make(sizes), make(sizes, tile_positions=10)
    assert len(epoch(light)[0]) == 32
    assert len(epoch(heavy)[0]) == 6
    assert max(len(micro) for micro in next(light)) == 12
    assert max(len(micro) for micro in next(heavy)) == 2


def test_joined_rows_leave_room_for_more_and_may_go_on_as_padded_ones() -> None:
    sizes = make_sizes([40, 20, 20, 20, 20])
    padded, joined = (make(sizes, flat=flat) for flat in (False, True))
    # Three rows of 40 fill 120 positions, and so do one of 40 and four of 20.
    assert sorted(map(len, next(padded))) == [2, 3]
    assert sorted(map(len, next(joined))) == [5]
    padded.load_state_dict(joined.state_dict())


def test_a_process_without_rows_gets_empty_micro_batches() -> None:
    sizes = make_sizes([MAX, MAX, 30])
    shares = [next(make(sizes, rank=rank, world=4, batch_tokens=4 * MAX)) for rank in range(4)]
    assert sorted(len(micro) for share in shares for micro in share) == [0, 1, 1, 1]


def test_a_process_spreads_its_rows_before_it_takes_an_empty_micro_batch() -> None:
    sizes = make_sizes([25, 20, 20, 15])
    shares = [next(make(sizes, rank=rank, world=2, micro_batch_tokens=MAX)) for rank in range(2)]
    # The second process could take both rows at once, but the first one needs two passes.
    assert [[len(micro) for micro in share] for share in shares] == [[1, 1], [1, 1]]


def test_steps_of_epochs_are_counted() -> None:
    sizes = make_sizes([20] * 64)
    sampler = make(sizes)
    assert [sampler.num_steps(epochs) for epochs in (0.1, 0.5, 1, 2.5)] == [1, 2, 4, 10]
    for _ in range(4):
        next(sampler)
    assert sampler.state_dict()["epoch"] == 0
    next(sampler)
    assert sampler.state_dict()["epoch"] == 1


def test_the_size_of_a_forward_pass_may_change_on_a_resume() -> None:
    sizes = make_sizes([20] * 64, [1] * 64, [number // 4 for number in range(64)])
    first, second = (make(sizes, samples_per_image=3, micro_batch_tokens=size) for size in (MAX, 4 * MAX))
    next(first)
    second.load_state_dict(first.state_dict())
    assert sorted(flat([next(first)])) == sorted(flat([next(second)]))


def test_a_state_of_other_data_is_refused() -> None:
    state = make(make_sizes([5, 6, 7])).state_dict()
    for other in (
        make(make_sizes([5, 6, 8])),
        make(make_sizes([5, 6, 7]), seed=4),
        make(make_sizes([5, 6, 7]), pack=True),
    ):
        with pytest.raises(CheckpointError, match="changed since the checkpoint"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("lengths", "world", "budget", "message"),
    [
        ([], 1, {}, "data set of a training stage is empty"),
        ([50], 1, {}, "50 positions, max_length is 40.*raise max_length"),
        (
            [30, 8],
            1,
            {"micro_batch_tokens": 20},
            "micro_batch_tokens is 20.* 30 positions.*micro_batch_tokens=30 or more",
        ),
        ([5], 1, {"micro_batch_tokens": 500}, "micro_batch_tokens 500 is more than batch_tokens 320"),
        ([5], 1, {"max_length": 0}, "max_length is 0"),
        (
            [9],
            1,
            {"micro_batch_tokens": 30, "pack": True},
            "micro_batch_tokens is 30, but rows take up to 40 positions",
        ),
        ([9], 1, {"micro_batch_tokens": 30, "samples_per_image": 2}, "use micro_batch_tokens=40 or more"),
        ([5] * 9, 9, {"pack": True}, "320 cannot be dealt to 9 processes in rows of 40.*batch_tokens=360 or more"),
        (
            [40] * 20,
            9,
            {},
            "dealt to 9 processes: a sample counts for 40.*batch_tokens=360 or more, or at most 8 processes",
        ),
    ],
)
def test_budgets_that_do_not_fit_are_refused_with_one_that_does(
    lengths: list[int], world: int, budget: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(make_sizes(lengths), world=world, **budget)


def test_a_tile_over_the_budget_is_named() -> None:
    with pytest.raises(ConfigError, match=r"positions and 12 tiles counts for 610.*micro_batch_tokens=610"):
        make(make_sizes([10], [12]), tile_positions=50)
