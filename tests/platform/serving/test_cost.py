"""What requests cost before anything is decoded, and how that bounds what is let in."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from nvila_platform.serving.cost import Cost, VisualRates, estimate, rates_of
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.media import MediaSource
from nvila_platform.serving.metrics import ServingMetrics
from nvila_platform.serving.queue import EngineQueue
from nvila_platform.serving.served import Served, Version

RATES = VisualRates(single_image=1000, image=100, frame=10)
IMAGE = MediaSource(kind="image", urls=("x",), param="p")
VIDEO = MediaSource(kind="video", urls=("x",), param="p", num_frames=32)


@pytest.mark.parametrize(
    ("sources", "visual"),
    [([], 0), ([IMAGE], 1000), ([IMAGE] * 3, 300), ([VIDEO], 320), ([IMAGE, VIDEO, VIDEO], 1640)],
)
def test_a_video_costs_more_than_its_first_frame(sources: list[MediaSource], visual: int) -> None:
    cost = estimate(RATES, ["x" * 40, ""], sources, answers=2, limit=50)
    assert cost == Cost(text=12, visual=visual, answer=100)
    assert cost.total == 112 + visual


def test_rates_come_from_the_models_own_processor(tiny_processor: Any) -> None:
    class Engine:
        processor = tiny_processor

    rates = rates_of(Engine())
    assert rates.num_frames == tiny_processor.video_processor.num_frames
    assert rates.single_image >= rates.image > 0
    assert rates.frame > 0


def test_the_queue_is_bounded_by_cost_and_says_how_much_is_visual(words: ModuleType) -> None:
    registry = CollectorRegistry()
    queue = EngineQueue(
        capacity=9, max_cost=100, timeout_s=5.0, metrics=ServingMetrics(ModelIdentity(name="words"), registry)
    )
    queue.start(Served(Version(identity=ModelIdentity(name="words")), words.WordsEngine()))

    def load() -> float | None:
        return registry.get_sample_value("nvila:visual_load_tokens", {"model_name": "words"})

    async def check() -> None:
        with queue.admit(Cost(text=5, visual=60)), queue.admit(Cost(text=20, visual=10)):
            assert load() == 70
            with pytest.raises(ApiError) as caught:
                queue.admit(Cost(text=6))
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            assert caught.value.retry_after_s
            queue.admit(Cost(text=5)).__exit__(None, None, None)
        assert load() == 0
        # Nothing else is in: what is too large for company is served alone.
        with queue.admit(Cost(visual=1000)):
            assert load() == 1000

    asyncio.run(check())
    queue.close()
