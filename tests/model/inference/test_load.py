"""What a load measures: answers in order whatever the number of streams, and times that can be true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image

from nvila.data.records import Message
from nvila.errors import DataError
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.load import Prompt, percentile, run_engine, run_generate

Ask = Callable[..., list[Message]]
GREEDY = SamplingParams(max_tokens=6)


@pytest.fixture
def prompts(ask: Ask, pictures: dict[str, Image.Image]) -> list[Prompt]:
    return [Prompt(messages=ask(key), media=pictures) for key in "abcab"]


@pytest.mark.parametrize("streams", [1, 3, 9])
def test_answers_are_those_of_generate_in_order(
    streams: int, build_engine: Callable[..., Engine], prompts: list[Prompt]
) -> None:
    engine = build_engine(blocks=200)
    run = run_engine(engine, prompts, GREEDY, streams=streams)
    base = run_generate(engine, prompts, GREEDY)
    assert [trace.token_ids for trace in run.traces] == [trace.token_ids for trace in base.traces]
    for one in (run, base):
        assert one.tokens_per_s == sum(len(trace.token_ids) for trace in one.traces) / one.seconds
        for trace in one.traces:
            assert 0 < trace.first_token_s <= one.seconds
            assert len(trace.gaps_s) == len(trace.times) - 1
            assert all(gap >= 0 for gap in trace.gaps_s)
    # The second questions about a picture come last; of nine streams all begin at once, and chance decides.
    if streams < len(prompts):
        assert sum(trace.usage.cached_tokens for trace in run.traces if trace.usage is not None) > 0


def test_a_prompt_that_cannot_be_answered_ends_the_load(
    build_engine: Callable[..., Engine], prompts: list[Prompt], ask: Ask
) -> None:
    engine = build_engine(blocks=200)
    bad = Prompt(messages=ask("nowhere"), media={})
    with pytest.raises(DataError, match="'nowhere'"):
        run_engine(engine, [*prompts, bad], GREEDY, streams=2)
    assert engine.stats().running == engine.stats().waiting == 0


def test_percentiles_of_few_values() -> None:
    assert percentile([3.0], 95) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50) == 3.0
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
