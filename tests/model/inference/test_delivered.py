"""Answers that are handed out by whoever runs the step, while the threads that asked for them sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from nvila.data.records import Message
from nvila.inference.answer_text import AnswerText
from nvila.inference.engine import Delta, Engine, Generation, SamplingParams

Pictures = dict[str, Image.Image]
Ask = Callable[..., list[Message]]
Build = Callable[..., Engine]
LONG, SHORT = SamplingParams(max_tokens=60), SamplingParams(max_tokens=3)


class Reader(threading.Thread):
    """A thread that has one answer delivered."""

    def __init__(self, running: Generation, note: Callable[[Delta], None] | None = None) -> None:
        super().__init__(daemon=True)
        self.running = running
        self.pieces: list[Delta] = []
        self.begun = threading.Event()
        self.error: BaseException | None = None
        self._note = note
        self.start()

    def run(self) -> None:
        def take(piece: Delta) -> None:
            self.pieces.append(piece)
            self.begun.set()
            if self._note is not None:
                self._note(piece)

        try:
            self.running.deliver(take)
        except BaseException as e:
            self.error = e

    def ended(self) -> list[Delta]:
        self.join(60)
        assert not self.is_alive()
        return self.pieces


def assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_delivered_and_read_answers_say_the_same_beside_each_other(
    build_engine: Build, generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=48, max_running=5)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(4):
            key = "abcdefgh"[(number + turn) % 8]
            running = engine.stream(ask(key), pictures, SamplingParams(max_tokens=16))
            pieces: list[Delta] = []
            if (number + turn) % 3 == 0:
                next(running)
                running.close()
                continue
            if (number + turn) % 3 == 1:
                running.deliver(pieces.append)
            else:
                pieces += running
            text = engine.processor.tokenizer.decode(running.token_ids, skip_special_tokens=True).lstrip()
            if running.token_ids != generated(ask(key)) or "".join(one.text for one in pieces) != text:
                wrong.append(key)
            assert pieces[-1].finish_reason

    for key in "abcdefgh":
        generated(ask(key))  # the model is not asked beside the engine
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert_empty(engine)


def test_what_was_made_before_is_delivered_first(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine()
    expected = list(build_engine().stream(ask("a"), pictures, LONG))
    waits, other = engine.stream(ask("a"), pictures, LONG), engine.stream(ask("b"), pictures, LONG)
    for _ in range(3):
        next(other)
    other.close()
    pieces: list[Delta] = []
    waits.deliver(pieces.append)
    assert pieces == expected


def test_a_thread_sleeps_through_the_steps_of_another(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    driver = Reader(engine.stream(ask("a"), pictures, LONG))
    assert driver.begun.wait(60)
    sleeper = engine.stream(ask("b"), pictures, SamplingParams(max_tokens=20))
    woken: list[float] = []
    wake: Any = sleeper._request.wake
    wait = wake.wait

    def counted() -> None:
        wait()
        woken.append(time.monotonic())

    wake.wait = counted
    pieces = Reader(sleeper).ended()
    driver.ended()
    assert len(pieces) >= 10
    # At its end, or once before that to run the steps itself.
    assert len(woken) <= 2


def test_somebody_goes_on_when_the_one_who_ran_the_steps_has_his_answer(
    build_engine: Build, ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    for _ in range(5):
        first = Reader(engine.stream(ask("a"), pictures, SHORT))
        others = [Reader(engine.stream(ask(key), pictures, LONG)) for key in "bcd"]
        for one in (first, *others):
            assert one.ended()[-1].finish_reason
    assert_empty(engine)


def test_somebody_goes_on_when_a_step_is_interrupted(
    build_engine: Build, ask: Ask, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(blocks=200)
    step, interrupt = engine._step, threading.Event()

    def interrupted() -> None:
        if interrupt.is_set():
            interrupt.clear()
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(engine, "_step", interrupted)
    first = Reader(engine.stream(ask("a"), pictures, LONG))
    assert first.begun.wait(60)
    second = Reader(engine.stream(ask("b"), pictures, LONG))
    assert second.begun.wait(60)
    interrupt.set()
    first.join(60)
    assert isinstance(first.error, KeyboardInterrupt)
    assert second.ended()[-1].finish_reason
    first.running.close()
    assert_empty(engine)


def test_pieces_of_a_step_are_handed_out_together(
    build_engine: Build, ask: Ask, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(blocks=200)
    log: list[tuple[int, str]] = []
    add = AnswerText.add

    def noted(text: AnswerText, token: int) -> str:
        log.append((engine._steps, "chosen"))
        return add(text, token)

    monkeypatch.setattr(AnswerText, "add", noted)
    running = [engine.stream(ask(key), pictures, LONG) for key in "abc"]
    readers = [Reader(one, lambda _: log.append((engine._steps, "handed out"))) for one in running]
    for one in readers:
        one.ended()
    steps = {step: [what for at, what in log if at == step] for step, _ in log}
    assert sum(whats.count("handed out") > 1 for whats in steps.values()) > 3
    # Sorted like this: all are chosen before the first is handed out.
    assert [whats for whats in steps.values() if whats != sorted(whats)] == []


def test_who_cannot_take_a_piece_loses_his_own_answer_only(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    expected = [one.text for one in build_engine().stream(ask("a"), pictures, LONG)]

    def refuse(piece: Delta) -> None:
        raise ValueError("no")

    good = Reader(engine.stream(ask("a"), pictures, LONG))
    bad = Reader(engine.stream(ask("b"), pictures, LONG), refuse)
    last = Reader(engine.stream(ask("c"), pictures, SamplingParams(max_tokens=1)), refuse)
    assert [one.text for one in good.ended()] == expected
    for one in (bad, last):
        assert len(one.ended()) == 1
        assert isinstance(one.error, ValueError)
    assert_empty(engine)


def test_closing_ends_a_delivery_at_once(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    driver = Reader(engine.stream(ask("a"), pictures, LONG))
    sleeper = Reader(engine.stream(ask("b"), pictures, LONG))
    assert driver.begun.wait(60)
    assert sleeper.begun.wait(60)
    for one in (sleeper, driver):
        one.running.close()
        one.ended()
        assert one.error is None
    assert_empty(engine)
