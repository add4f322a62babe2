"""What the tests of the command line share."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def all_closed() -> Iterator[None]:
    """Fail where a test leaves a connection to the collector, which would blame whoever runs by then."""
    gc.collect()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(one.message) for one in seen if "socket" in str(one.message)] == []
