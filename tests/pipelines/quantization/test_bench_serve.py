"""`nvila bench serve`: every way on a small model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.inference.comparison import BASELINE, HEAD, Way, way_row


def test_every_way_is_measured_against_generate(
    nvila: Callable[..., Any], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    # A picture takes four tokens here; with this, questions about one picture share more than a block of the cache.
    lines = data_file.read_text(encoding="utf-8").splitlines()[:6]
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(line.replace("<image>", "<image>" + "shape " * 30) + "\n" for line in lines), encoding="utf-8"
    )
    options = ("--media-dir", data_file.parent, "--requests", "6", "--max-tokens", "5", "--streams", "1,3")
    done = nvila("bench", "serve", model_folder, "--data", long, *options, "--json")
    assert done.code == 0, done.err
    ways = {way["name"]: way for way in done.last_json["ways"]}
    assert list(ways) == [BASELINE, "engine, one at a time", "engine, 3 at once"]
    assert ways[BASELINE]["ratio"] == ways[BASELINE]["low"] == ways[BASELINE]["high"] == 1.0
    for way in ways.values():
        assert way["same_answers"] == 1.0
        assert 0 < way["low"] <= way["ratio"] <= way["high"]
        assert 0 < way["first_token_ms"][0] <= way["first_token_ms"][1]
        # An untrained model may say nothing that is text: then its answer is a single piece.
        # Two pieces may come at once: the last word, and what was held back for stop strings.
        assert way["between_ms"] is None or 0 <= way["between_ms"][0] <= way["between_ms"][1]
    assert ways[BASELINE]["between_ms"] is not None
    # The caches are the engine's; questions of easy-VQA about one picture stand together.
    assert ways[BASELINE]["media_known"] is ways[BASELINE]["prompt_known"] is None
    assert 0 < ways["engine, one at a time"]["prompt_known"] < 1
    assert 0 <= ways["engine, one at a time"]["media_known"] < 1


def test_fewer_conversations_than_wanted_are_named_and_long_ones_left_out(
    nvila: Callable[..., Any], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    lines = data_file.read_text(encoding="utf-8").splitlines()[:2]
    lines[0] = lines[0].replace("<image>", "<image>" + "shape " * 120)
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ("--media-dir", data_file.parent, "--requests", "2", "--max-tokens", "3", "--streams", "1")
    done = nvila("bench", "serve", model_folder, "--data", short, *options)
    assert done.code == 0, done.err
    assert "1 conversations are left out, the last one because the prompt" in done.err
    assert "has 1 conversations that can be asked, not 2" in done.err
    assert "engine, one at a time" in done.out
    assert HEAD[0] in done.out


@pytest.mark.parametrize(
    ("between", "shown"), [((1.25, 2.5), ("1.2 ms", "2.5 ms")), (None, ("-", "-"))], ids=["pieces", "one-piece"]
)
def test_a_way_is_one_row_of_the_table(between: tuple[float, float] | None, shown: tuple[str, str]) -> None:
    way = Way(
        name="engine, 4 at once",
        tokens_per_s=123.45,
        ratio=4.0,
        low=3.5,
        high=4.25,
        first_token_ms=(10.0, 25.5),
        between_ms=between,
        media_known=0.5,
        prompt_known=None,
        same_answers=1.0,
    )
    row = way_row(way)
    assert len(row) == len(HEAD)
    assert row[1:7] == ("123.5", "4.00 (3.50 to 4.25)", "10.0 ms", "25.5 ms", *shown)
    assert row[7:] == ("50.0 %", "-", "100.0 %")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve",), "no model is named"),
        (("serve", "a"), "there is no data to compare on"),
        (("serve", "nowhere", "--data", "easy-vqa"), "model folder nowhere does not exist"),
        (("serve", "a", "--data", "easy-vqa", "--vision", "w8a8"), "--vision is about quantize, not serve"),
        (("quantize", "a", "--data", "easy-vqa", "--streams", "4"), "--streams is about serve, not quantize"),
        (("serve", "a", "--data", "easy-vqa", "--streams", "4,x"), "'x' is no positive whole number"),
    ],
    ids=["no-model", "no-data", "no-such-model", "other-subject", "other-way-round", "streams"],
)
def test_what_is_wrong_is_said(nvila: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    done = nvila("bench", *words)
    assert done.code == 2
    assert message in done.err


def test_data_that_nothing_can_be_asked_of_are_refused(
    nvila: Callable[..., Any], model_folder: Path, data_file: Path
) -> None:
    done = nvila("bench", "serve", model_folder, "--data", data_file, "--max-tokens", "128")
    assert done.code != 0
    assert "can be asked: the prompt leaves room for" in done.err


def test_compile_reaches_the_engine(nvila: Callable[..., Any], model_folder: Path, data_file: Path) -> None:
    done = nvila("bench", "serve", model_folder, "--data", data_file, "--compile", "on")
    assert done.code != 0
    assert "decoder 'auto' is not compiled on cpu" in done.err
