"""Methods, their names, and the rates that they give to parts."""

from __future__ import annotations

import re

import pytest

from nvila.errors import ConfigError
from nvila.tuning.methods import TuneMethod, default_rate, learning_rates, parse_method


def test_two_words_train_the_projector_fully() -> None:
    assert parse_method("ln+qlora") == TuneMethod(vision="ln", projector="full", language="qlora")
    assert parse_method("lora+frozen+dora").name == "lora+frozen+dora"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("ln", "'ln' is no method", "VISION\\+LANGUAGE"),
        ("ln+loro", "language is 'loro'", "did you mean 'lora'"),
        ("qlora+lora", "vision is 'qlora'", "lora"),
        ("frozen+frozen+frozen", "all frozen", "at least one"),
    ],
)
def test_wrong_methods_are_named(text: str, message: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_method(text)
    assert re.search(fix, error.value.hint)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0)])
def test_numbers_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        TuneMethod(**{field: value})  # type: ignore[arg-type]  # one field at a time


def test_each_part_has_its_own_rate() -> None:
    method = TuneMethod(vision="ln", projector="full", language="lora")
    assert learning_rates(method, 1e-3, ratio=50) == {"vision": 2e-5, "projector": 1e-3, "language": 1e-3}
    given = learning_rates(method, 1e-3, vision=3e-5, projector=7e-5)
    assert given == {"vision": 3e-5, "projector": 7e-5, "language": 1e-3}


def test_frozen_parts_have_no_rate() -> None:
    method = TuneMethod(vision="frozen", language="lora")
    assert "vision" not in learning_rates(method, 1e-3)
    with pytest.raises(ConfigError, match="vision has a learning rate, but is frozen"):
        learning_rates(method, 1e-3, vision=1e-4)


def test_default_rate_is_larger_for_adapters_and_narrow_decoders() -> None:
    lora, full = parse_method("ln+lora"), parse_method("full+full")
    assert default_rate(lora, 3584) == pytest.approx(2e-4)
    assert default_rate(full, 3584) == pytest.approx(2e-5)
    assert default_rate(lora, 896) == pytest.approx(8e-4)
    assert default_rate(lora, 16) == 2e-3


def test_methods_survive_json() -> None:
    method = TuneMethod(vision="lora", language="dora", rank=4, only=("*.layers.0.*",))
    assert TuneMethod.from_dict(method.to_dict()) == method


def test_what_is_small_is_an_adapter() -> None:
    assert parse_method("ln+qlora").is_adapter
    assert not parse_method("full+lora").is_adapter
    assert not parse_method("ln+full").is_adapter
