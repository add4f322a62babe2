"""Moments in text become time tokens of the video's own length."""

from __future__ import annotations

from nvila.data.builtin import open_builtin
from nvila.tuning.timing import TimedStream


def test_seconds_become_time_tokens() -> None:
    plain = open_builtin("digit-clips-when")
    timed = TimedStream(plain, 100, "<t{t}>")
    before, after = next(plain.records(stop=1)).sample, next(timed.records(stop=1)).sample
    assert before is not None
    assert after is not None
    start, end = (float(word.strip("<>")) for word in before.answer.split())
    assert after.answer == f"<t{round(start / 8 * 99)}> <t{round(end / 8 * 99)}>"
    assert after.question == before.question
    assert timed.count() == plain.count()


def test_records_without_moments_stay() -> None:
    plain = open_builtin("digit-clips")
    assert next(TimedStream(plain, 100, "<t{t}>").records(stop=1)) == next(plain.records(stop=1))
