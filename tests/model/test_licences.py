"""Licences of weights that are made of other weights."""

from __future__ import annotations

import pytest

from nvila.licences import combined, is_non_commercial


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ([], "unknown"),
        (["mit"], "mit"),
        (["mit", "apache-2.0"], "apache-2.0"),
        (["Apache-2.0", "gemma"], "gemma"),
        (["llama3", "gemma", "mit"], "gemma and llama3"),
        (["apache-2.0", ""], "unknown"),
        (["gemma", "unknown"], "unknown"),
        # What is known to forbid something is said, even where the rest is not known.
        (["cc-by-nc-4.0", "unknown"], "cc-by-nc-4.0"),
    ],
)
def test_the_stricter_licence_holds(licences: list[str], expected: str) -> None:
    assert combined(licences) == expected


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        ("cc-by-nc-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("gemma and cc-by-nc-4.0", True),
        ("qwen-research", True),
        ("nvidia-oneway-noncommercial-license", True),
        ("fair-noncommercial-research-license", True),
        ("apple-amlr", True),
        ("gemma and apple-amlr", True),
        ("apache-2.0", False),
        ("cc-by-4.0", False),
        ("gemma", False),
        ("unknown", False),
        ("openrail", False),
        ("ncsa", False),
    ],
)
def test_licences_that_forbid_earning_money_are_known_by_name(licence: str, forbids: bool) -> None:
    assert is_non_commercial(licence) is forbids
