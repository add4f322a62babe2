from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from nvila.data.conversation import Encoded
from nvila.data.sampling import GroupSampler
from nvila.errors import ConfigError


def make_groups(count: int, size: int = 3) -> list[list[Encoded]]:
    return [
        [
            Encoded(ids=(group, number), labels=(-100, number), images=(f"{group}",), media_end=1)
            for number in range(size)
        ]
        for group in range(count)
    ]


def steps(count: int, **kwargs: int) -> list[list[list[Encoded]]]:
    values = {"images_per_step": 4, "samples_per_image": 2, "seed": 3} | kwargs
    size = values.pop("num_groups", 6)
    return list(islice(GroupSampler(make_groups(size), **values), count))


def images(step: list[list[Encoded]]) -> list[str]:
    return [group[0].images[0] for group in step]


def test_every_image_comes_once_in_every_pass_in_a_new_order() -> None:
    seen = [image for step in steps(12) for image in images(step)]
    passes = [seen[start : start + 6] for start in range(0, 48, 6)]
    assert all(sorted(one) == list("012345") for one in passes)
    assert len({tuple(one) for one in passes}) > 4


def test_a_row_holds_distinct_samples_of_one_image_up_to_the_limit() -> None:
    for limit, size in ((1, 1), (2, 2), (9, 3)):
        for group in (group for step in steps(5, samples_per_image=limit) for group in step):
            assert len(group) == size
            assert len({sample.ids for sample in group}) == size
            assert len({sample.images for sample in group}) == 1


def test_samples_of_an_image_are_drawn_anew_on_every_visit() -> None:
    drawn = Counter(sample.ids[1] for step in steps(60, samples_per_image=1) for group in step for sample in group)
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.values()) > 50


def test_the_processes_together_see_what_one_process_sees() -> None:
    whole = steps(9)
    for world in (2, 4):
        shares = [steps(9, rank=rank, world=world) for rank in range(world)]
        for number, step in enumerate(whole):
            assert [len(share[number]) for share in shares] == [4 // world] * world
            assert [shares[index % world][number][index // world] for index in range(4)] == step


def test_the_seed_fixes_the_sequence() -> None:
    assert steps(5) == steps(5)
    assert steps(5) != steps(5, seed=4)


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert sorted(images(steps(1, num_groups=2)[0])) == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("images_per_step", "world", "advice"), [(5, 2, "such as 4"), (7, 3, "such as 6"), (1, 4, "such as 4")]
)
def test_batch_that_cannot_be_dealt_is_refused_with_one_that_can(images_per_step: int, world: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"images_per_step={images_per_step} .* {world} processes.*{advice}"):
        steps(1, images_per_step=images_per_step, world=world)


def test_empty_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data set of a training stage is empty.*curation\.keep_rate"):
        steps(1, num_groups=0)
