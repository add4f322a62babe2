"""`nvila bench quantize`: all forms of a small model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.quantization.config import QuantizationConfig
from nvila_pipelines.quantization.comparison import HEAD, Form, Ratio, form_row, forms_of


def test_every_form_is_measured_against_the_wide_model(
    nvila: Callable[..., Any], model_folder: Path, data_file: Path
) -> None:
    words = ("--data", data_file, "--samples", "2", "--eval-samples", "4")
    done = nvila("bench", "quantize", model_folder, *words, "--vision", "none", "--json")
    assert done.code == 0, done.err
    forms = {form["name"]: form for form in done.last_json["forms"]}
    assert list(forms) == [
        "wide",
        "language w4a16, rounded",
        "language w4a16, calibrated",
        "vision int8 + language int8, rounded",
        "vision fp8 + language fp8, rounded",
    ]
    assert forms["wide"]["loss_points"] == 0.0
    assert forms["language w4a16, calibrated"]["layer_error"] > 0
    assert forms["language w4a16, rounded"]["layer_error"] is None
    for name, form in forms.items():
        assert form["num_bytes"] < forms["wide"]["num_bytes"] or name == "wide"
        for speed in (form["ttft"], form["decode"]):
            assert 0 < speed["low"] <= speed["ratio"] <= speed["high"]


def test_a_form_is_one_row_of_the_table() -> None:
    speed = Ratio(value=12.5, ratio=1.5, low=1.25, high=1.75)
    form = Form(
        name="vision w8a8, calibrated",
        num_bytes=2048,
        answers=0.975,
        loss_points=0.5,
        loss_low=-0.25,
        loss_high=1.25,
        p_value=0.4,
        layer_error=0.0123,
        ttft=speed,
        decode=speed,
    )
    row = form_row(form)
    assert len(row) == len(HEAD)
    assert row[1:6] == ("2.0 KiB", "97.50%", "0.50 (-0.25 to 1.25)", "0.0123", "12.5 ms")
    assert row[6:] == ("1.50 (1.25 to 1.75)", "12.5", "1.50 (1.25 to 1.75)")


def test_forms_of_a_pair_are_each_alone_and_both() -> None:
    names = [name for name, _, _ in forms_of(QuantizationConfig())]
    assert names[:3] == ["wide", "vision w8a8, rounded", "vision w8a8, calibrated"]
    assert "vision w8a8 + language w4a16, calibrated" in names
    assert len(names) == len(set(names)) == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no subject is named"),
        (("quantise", "m"), "did you mean 'quantize'?"),
        (("quantize",), "no model is named"),
        (("quantize", "a", "b"), "two models are named: a and b"),
        (("quantize", "a"), "there is no data to compare on"),
        (("quantize", "a", "--data", "easy-vqa", "--eval-samples", "0"), "nothing can be compared"),
        (("quantize", "nowhere", "--data", "easy-vqa"), "model folder nowhere does not exist"),
    ],
    ids=["nothing", "typo", "no-model", "two", "no-data", "no-samples", "no-such-model"],
)
def test_what_is_wrong_is_said(nvila: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    done = nvila("bench", *words)
    assert done.code == 2
    assert message in done.err
