from __future__ import annotations

import pickle

import pytest

from nvila.errors import ERRORS, ConfigError, InfrastructureError, NvilaError, error_from_dict, nearest


@pytest.mark.parametrize("cls", ERRORS.values(), ids=lambda cls: str(cls.code))
def test_error_survives_the_way_between_processes(cls: type[NvilaError]) -> None:
    error = cls("field x is 3", "use 4")
    for copy in (error_from_dict(error.to_dict()), pickle.loads(pickle.dumps(error))):  # noqa: S301  # our own bytes
        assert type(copy) is cls
        assert (copy.message, copy.hint, str(copy)) == ("field x is 3", "use 4", "field x is 3 (use 4)")


def test_every_subclass_is_in_the_table_under_its_own_code() -> None:
    assert set(ERRORS.values()) == {NvilaError, *NvilaError.__subclasses__()}
    assert all(code == cls.code for code, cls in ERRORS.items())


@pytest.mark.parametrize(
    ("code", "exit_code", "http_status", "retryable"),
    [
        ("failed", 1, 500, False),
        ("config", 2, 400, False),
        ("data", 1, 400, False),
        ("checkpoint", 1, 500, False),
        ("artifact", 1, 500, False),
        ("capability", 1, 501, False),
        ("resource", 1, 500, False),
        ("gate", 1, 500, False),
        ("infrastructure", 75, 503, True),
    ],
)
def test_exit_code_and_http_status_of_each_error(code: str, exit_code: int, http_status: int, retryable: bool) -> None:
    error = ERRORS[code]("x")
    assert (error.exit_code, error.http_status, error.retryable) == (exit_code, http_status, retryable)


def test_error_without_hint_is_just_its_message() -> None:
    assert str(InfrastructureError("the store is away")) == "the store is away"


def test_unknown_or_empty_payload_becomes_the_base_error() -> None:
    assert type(error_from_dict({"code": "from-the-future", "message": "m"})) is NvilaError
    assert error_from_dict({}).message == "unknown error"


def test_an_error_is_caught_as_its_base() -> None:
    with pytest.raises(NvilaError, match="a message"):
        raise ConfigError("a message")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("quikstart", ["tiny", "quickstart"], "did you mean 'quickstart'?"),
        ("zzz", ["tiny", "quickstart"], "known: quickstart, tiny"),
        ("x", [], "none are known"),
    ],
)
def test_nearest_name(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
    assert nearest(name, iter(known)) == hint
