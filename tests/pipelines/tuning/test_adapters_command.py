"""`nvila adapters`: show and merge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.pipelines.conftest import Nvila

from nvila.assembly import load_model


@pytest.fixture
def adapter(nvila: Nvila, base: Path, pictures: Path) -> Path:
    done = nvila("tune", base, pictures, "--steps", 2, "--rank", 4, "--no-register", "--json")
    assert done.code == 0, done.err
    return Path(done.last_json["path"])


@pytest.mark.slow
def test_an_adapter_is_shown_and_merged(nvila: Nvila, base: Path, adapter: Path) -> None:
    shown = nvila("adapters", "show", adapter, "--json").last_json
    assert shown["method"] == "ln+full+lora"
    assert shown["base"] == str(base)
    done = nvila("adapters", "merge", adapter, "whole")
    assert done.code == 0, done.err
    load_model(Path("whole"))
    again = nvila("adapters", "merge", adapter, "whole")
    assert again.code == 2
    assert "whole exists" in again.err
    assert "is no adapter" in nvila("adapters", "show", "whole").err


@pytest.mark.slow
def test_another_base_is_refused(nvila: Nvila, base: Path, adapter: Path) -> None:
    other = Path("other")
    shutil.copytree(base, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    done = nvila("adapters", "merge", adapter, "whole", "--base", other)
    assert done.code == 1
    assert "belongs to a base with digest" in done.err
    assert not Path("whole").exists()
