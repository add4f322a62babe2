"""The options of a server become the configuration of its engine."""

from __future__ import annotations

import pytest

from nvila.errors import ConfigError
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.server import engine_config


def test_options_reach_the_engine() -> None:
    config = engine_config(Limits(max_running=3), 0.5, "fused", "off")()
    assert (config.max_running, config.kv_cache_bytes, config.decoder) == (3, 2**29, "fused")
    assert config.compile == "off"


def test_what_is_not_given_is_the_engines_own() -> None:
    config, own = engine_config(Limits(), None, None)(), engine_config(Limits(), 2.0, "transformers")()
    assert (config.decoder, config.compile) == ("auto", "auto")
    assert config.kv_cache_bytes != own.kv_cache_bytes


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_memory_that_is_none_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-gib"):
        engine_config(Limits(), size, None)
