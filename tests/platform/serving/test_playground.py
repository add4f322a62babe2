"""The playground in a real browser: an image, a streamed answer, figures, tiles; by keyboard, and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from nvila_platform.serving import RunningServer, start_server
from nvila_platform.serving.playground import policy

# Starting a browser and a model takes minutes on a crowded machine.
pytestmark = pytest.mark.timeout(600)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[RunningServer]:
    with start_server(tiny_model, "tiny", version="3", digest="sha256:cafe", timeout_s=300.0) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, tiny: RunningServer) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(f"{tiny.base_url}/playground")
    yield page
    context.close()
    # A policy that blocks the page's own script or styles shows here, too.
    assert [one for one in problems if "favicon" not in one and "400" not in one] == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.effect_noise((128, 64), 80).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_page_may_load_nothing_but_itself(server: RunningServer) -> None:
    answer = httpx.get(f"{server.base_url}/playground", trust_env=False)
    allowed = answer.headers.get_list("content-security-policy")
    assert allowed == [policy(answer.text)]
    assert "default-src 'none'" in allowed[0]
    assert "unsafe-inline" not in allowed[0]
    assert "http" not in answer.text.replace("http-equiv", "")


def test_tiles_are_those_of_the_model(server: RunningServer, tiny: RunningServer, tiny_processor: Any) -> None:
    images = tiny_processor.image_processor
    expected = images.plan(128, 64, tile=images.tiles_images).grids
    found = httpx.get(f"{tiny.base_url}/playground/tiles?width=128&height=64", trust_env=False).json()["grids"]
    assert found == [[grid.columns, grid.rows] for grid in expected]
    assert httpx.get(f"{server.base_url}/playground/tiles?width=9&height=9", trust_env=False).json() == {"grids": []}
    assert httpx.get(f"{tiny.base_url}/playground/tiles?width=0&height=9", trust_env=False).status_code == 400


@pytest.mark.slow
def test_an_image_is_asked_about_by_keyboard_alone(page: Any, photo: Path) -> None:
    page.set_input_files("#file", str(photo))
    page.wait_for_selector("#media .medium img")
    page.wait_for_selector("#media canvas", state="attached")
    page.keyboard.type("what color is the shape ?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.answer .facts")
    facts = page.text_content(".turn.answer .facts")
    assert "visual" in facts
    assert "first text after" in facts
    assert page.text_content(".turn.answer p").strip()
    assert page.text_content("#model").startswith("version 3")
    assert page.input_value("#text") == ""
    page.uncheck("#tiles")
    assert page.is_hidden(".turn.user canvas")


@pytest.mark.slow
def test_a_refusal_is_shown_and_the_chat_goes_on(page: Any) -> None:
    page.fill("#tokens", "1000000")
    page.fill("#text", "what color")
    page.click("#send")
    page.wait_for_selector(".turn.bad .facts", state="attached")
    assert "tokens were asked for" in page.text_content(".turn.bad p")
    page.fill("#tokens", "5")
    page.fill("#text", "what color")
    page.click("#send")
    page.wait_for_selector(".turn.answer:not(.bad) .facts", state="attached")


@pytest.mark.slow
def test_it_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#send", "#text", "#add"):
        assert page.is_visible(name)
