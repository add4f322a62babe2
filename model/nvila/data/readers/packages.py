"""Libraries that only readers need, imported when a data set asks for them."""

from __future__ import annotations

import importlib
from typing import Any

from nvila.errors import CapabilityError


def package(name: str) -> Any:
    """Import a library of the extra `curate`.

    Raises:
        CapabilityError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise CapabilityError(
            f"reading this data set needs the package {name.partition('.')[0]}", "pip install 'nvila[curate]'"
        ) from e
