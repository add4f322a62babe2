"""The queue in front of the engine: bound, order, cancellation, deadline, failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from nvila.data.records import vqa_sample
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.metrics import ServingMetrics
from nvila_platform.serving.queue import _BROKEN_AFTER, EngineQueue, Slot
from nvila_platform.serving.schema import parse_chat
from nvila_platform.serving.served import Served, Version
from nvila_platform.serving.service import ChatService
from nvila_platform.serving.stream import Stream


class Bench:
    """A queue with its metrics and engine at hand."""

    def __init__(self, words: ModuleType, capacity: int, timeout_s: float, concurrency: int = 1) -> None:
        self.registry = CollectorRegistry()
        metrics = ServingMetrics(ModelIdentity(name="words", version="1", digest="d"), self.registry)
        self.queue = EngineQueue(capacity=capacity, timeout_s=timeout_s, metrics=metrics, concurrency=concurrency)
        self.engine: Any = words.WordsEngine()
        self.queue.start(Served(Version(identity=ModelIdentity(name="words")), self.engine))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"nvila:{name}", {"model_name": "words", **labels}) or 0.0

    def submit(self, slot: Slot, text: str) -> Stream:
        from nvila.inference.engine import SamplingParams

        sample = vqa_sample(id="1", source="test", image=None, question=text, answer=None)
        return slot.submit(sample.messages, {}, SamplingParams(max_tokens=500))

    async def ask(self, text: str) -> str:
        with self.queue.admit() as slot:
            return "".join([delta.text async for delta in self.submit(slot, text)])


@pytest.fixture
def bench(words: ModuleType) -> Iterator[Bench]:
    made = Bench(words, capacity=2, timeout_s=10.0)
    yield made
    made.queue.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(3.0):
        while not condition():
            await asyncio.sleep(0.005)


def test_answers_arrive_piece_by_piece_with_usage_at_the_end(bench: Bench) -> None:
    async def check() -> None:
        with bench.queue.admit() as slot:
            stream = bench.submit(slot, "count 3")
            pieces = [delta async for delta in stream]
        assert [piece.text for piece in pieces] == ["0", " 1", " 2"]
        assert pieces[-1].finish_reason == "stop"
        assert stream.usage.completion_tokens == 3

    asyncio.run(check())
    assert bench.metric("request_success_total", finished_reason="stop") == 1
    assert bench.metric("generation_tokens_total") == 3
    assert bench.metric("prompt_tokens_total") == 2
    assert bench.metric("time_to_first_token_seconds_count") == 1
    assert bench.metric("e2e_request_latency_seconds_count") == 1


def test_a_full_queue_refuses_with_a_time_to_come_back(bench: Bench) -> None:
    async def check() -> None:
        with bench.queue.admit(), bench.queue.admit():
            with pytest.raises(ApiError) as caught:
                bench.queue.admit()
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            assert 1 <= int(caught.value.headers["retry-after"]) <= 60
        assert await bench.ask("count 1") == "0"

    asyncio.run(check())


def test_one_request_runs_and_the_others_wait(bench: Bench) -> None:
    async def check() -> None:
        first = asyncio.create_task(bench.ask("slow 6"))
        await until(lambda: bench.metric("num_requests_running") == 1)
        second = asyncio.create_task(bench.ask("count 1"))
        await until(lambda: bench.metric("num_requests_waiting") == 1)
        assert await first == "0 1 2 3 4 5"
        assert await second == "0"
        # The answer is complete a moment before its request is counted out.
        await until(lambda: bench.metric("num_requests_running") == 0)

    asyncio.run(check())
    assert bench.engine.asked == ["slow 6", "count 1"]
    assert bench.metric("num_requests_running") == bench.metric("num_requests_waiting") == 0


def test_as_many_requests_run_at_once_as_are_allowed(words: ModuleType) -> None:
    bench = Bench(words, capacity=8, timeout_s=10.0, concurrency=3)

    async def check() -> None:
        tasks = [asyncio.create_task(bench.ask("slow 8")) for _ in range(5)]
        await until(lambda: bench.metric("num_requests_running") == 3)
        assert bench.metric("num_requests_waiting") == 2
        assert await asyncio.gather(*tasks) == ["0 1 2 3 4 5 6 7"] * 5
        await until(lambda: bench.metric("num_requests_running") == 0)

    asyncio.run(check())
    bench.queue.close()
    assert not bench.queue.healthy


def test_cancelling_closes_a_request_that_has_nothing_to_say_yet(bench: Bench) -> None:
    """The worker sleeps in the engine; the request's memory must not wait for it to wake up."""
    asleep, closed = threading.Event(), threading.Event()

    class Silent:
        def deliver(self, to: Any) -> None:
            asleep.set()
            assert closed.wait(10)

        def close(self) -> None:
            closed.set()

        usage = None

    bench.engine.stream = lambda *_: Silent()

    async def check() -> None:
        task = asyncio.create_task(bench.ask("anything"))
        await asyncio.to_thread(asleep.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bench.metric("request_success_total", finished_reason="abort") == 1)

    asyncio.run(check())


def test_cancelling_a_running_answer_stops_the_engine(bench: Bench) -> None:
    async def check() -> None:
        task = asyncio.create_task(bench.ask("slow 400"))
        await until(lambda: bench.metric("num_requests_running") == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bench.metric("num_requests_running") == 0)

    asyncio.run(check())
    assert bench.engine.generations[0].closed
    assert bench.metric("request_success_total", finished_reason="abort") == 1


def test_cancelling_a_waiting_request_frees_its_place_at_once(bench: Bench) -> None:
    async def check() -> None:
        first = asyncio.create_task(bench.ask("slow 8"))
        await until(lambda: bench.metric("num_requests_running") == 1)
        second = asyncio.create_task(bench.ask("never asked"))
        await until(lambda: bench.metric("num_requests_waiting") == 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert bench.metric("num_requests_waiting") == 0
        assert bench.metric("num_requests_running") == 1
        with bench.queue.admit():
            await first

    asyncio.run(check())
    assert bench.engine.asked == ["slow 8"]


def test_the_deadline_ends_a_running_answer(words: ModuleType) -> None:
    bench = Bench(words, capacity=2, timeout_s=0.2)

    async def check() -> None:
        with pytest.raises(ApiError) as caught:
            await bench.ask("slow 400")
        assert (caught.value.status, caught.value.kind) == (504, "timeout_error")
        await until(lambda: bench.metric("num_requests_running") == 0)

    asyncio.run(check())
    bench.queue.close()


def test_a_failing_request_harms_no_other(bench: Bench) -> None:
    async def check() -> None:
        with pytest.raises(ApiError, match="9000 tokens") as refused:
            await bench.ask("refuse")
        assert refused.value.status == 400
        with pytest.raises(ApiError) as crashed:
            await bench.ask("crash later")
        assert crashed.value.status == 500
        assert "secret" not in crashed.value.message
        assert await bench.ask("count 2") == "0 1"

    asyncio.run(check())
    assert bench.queue.healthy


def test_an_engine_that_fails_on_everything_is_broken(bench: Bench) -> None:
    async def check() -> None:
        for number in range(2 * _BROKEN_AFTER):
            # One answer between, and the others were the requests' fault.
            if number == _BROKEN_AFTER - 1:
                assert await bench.ask("count 1") == "0"
            elif number < 2 * _BROKEN_AFTER - 1:
                with pytest.raises(ApiError, match="request id"):
                    await bench.ask("crash")
                # Neither mistakes of clients nor those who give up count for it or against it.
                with pytest.raises(ApiError, match="9000 tokens"):
                    await bench.ask("refuse")
                with bench.queue.admit() as slot:
                    bench.submit(slot, "slow 10")
        await until(lambda: bench.metric("num_requests_running") == 0)
        assert not bench.queue.broken
        with pytest.raises(ApiError, match="request id"):
            await bench.ask("crash")
        await until(lambda: bench.queue.broken)
        assert bench.queue.state == "broken"
        with pytest.raises(ApiError) as caught:
            bench.queue.admit()
        assert caught.value.status == 503

    asyncio.run(check())


def test_an_engine_that_hangs_is_broken(words: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(words, capacity=2, timeout_s=0.1)
    monkeypatch.setattr("nvila_platform.serving.queue._HUNG_S", 0.1)
    hanging = threading.Event()
    monkeypatch.setattr(words.WordsGeneration, "deliver", lambda *_: hanging.wait(30))

    async def check() -> None:
        with pytest.raises(ApiError) as caught:
            await bench.ask("count 1")
        assert caught.value.status == 504
        assert not bench.queue.broken
        await until(lambda: bench.queue.broken)

    try:
        asyncio.run(check())
    finally:
        hanging.set()
        bench.queue.close()


def test_before_the_model_is_loaded_requests_are_refused() -> None:
    metrics = ServingMetrics(ModelIdentity(name="words"), CollectorRegistry())
    queue = EngineQueue(capacity=1, timeout_s=1.0, metrics=metrics)
    assert not queue.healthy
    with pytest.raises(ApiError) as caught:
        queue.admit()
    assert (caught.value.status, caught.value.code) == (503, "model_not_ready")
    assert caught.value.retry_after_s


def test_closing_ends_what_runs_and_what_waits(bench: Bench) -> None:
    async def check() -> None:
        tasks = [asyncio.create_task(bench.ask("slow 400")), asyncio.create_task(bench.ask("count 1"))]
        await until(lambda: bench.metric("num_requests_waiting") == 1)
        await asyncio.to_thread(bench.queue.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ApiError)
            assert result.code == "stopping"

    asyncio.run(check())
    assert not bench.queue.healthy


def test_one_slot_serves_several_questions_in_turn(bench: Bench) -> None:
    async def check() -> list[str]:
        with bench.queue.admit() as slot:
            return ["".join([d.text async for d in bench.submit(slot, f"count {n}")]) for n in (1, 2)]

    assert asyncio.run(check()) == ["0", "0 1"]


def test_model_info_names_version_and_digest(bench: Bench) -> None:
    assert bench.metric("model_info", version="1", digest="d") == 1


def test_loading_media_counts_to_the_deadline(words: ModuleType, monkeypatch: pytest.MonkeyPatch, png_url: str) -> None:
    async def for_ever(*_args: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("nvila_platform.serving.decoder_pool.DecoderPool.image", for_ever)
    version, registry = Version(identity=ModelIdentity(name="words")), CollectorRegistry()
    limits = Limits(request_timeout_s=0.2)
    service = ChatService(version, limits, ServingMetrics(version.identity, registry))
    service.start(Served(version, words.WordsEngine()), registry)
    content = [{"type": "image_url", "image_url": {"url": png_url}}]
    request = parse_chat({"model": "words", "messages": [{"role": "user", "content": content}]})

    async def check() -> None:
        with service.queue.admit() as slot, pytest.raises(ApiError) as caught:
            await service.submit(slot, request, request.messages)
        assert (caught.value.status, caught.value.code) == (504, "timeout")

    try:
        asyncio.run(asyncio.wait_for(check(), 10))
    finally:
        service.close()
