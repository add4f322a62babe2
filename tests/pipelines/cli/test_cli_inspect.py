"""`nvila inspect`: the parts of a model, the origin of every token, and the picture of the tiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.new("RGB", (192, 108), (10, 120, 200)).save(path)
    return str(path)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A folder of frames, which counts as a video."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    return str(folder)


def test_parts_are_listed_with_their_parameters(nvila: Callable[..., Any]) -> None:
    done = nvila("inspect", "nvila-lite-8b")
    lines = done.out.splitlines()
    assert (done.code, lines[0]) == (0, "nvila-lite-8b")
    assert [line.split()[0] for line in lines[1:4]] == ["vision", "projector", "language"]
    assert "413,327,088" in lines[1]
    assert "61,101,440" in lines[2]
    assert "7,612,656,128" in lines[3]
    assert "8,087,084,656  16.17 GB in bfloat16" in lines[4]
    assert "prompt:" not in done.out


def test_every_token_of_a_prompt_is_accounted_for(nvila: Callable[..., Any], photo: str, clip: str) -> None:
    done = nvila("inspect", "tiny-nvila-video", "--image", photo, "--video", clip, "--text", "hi there", "--json")
    assert done.code == 0
    prompt = done.last_json["prompt"]
    runs = prompt["runs"]
    assert sum(run["visual"] + run["text"] for run in runs) == prompt["total"]
    assert [run["source"] for run in runs if run["visual"]] == [
        "image 1: one tile",
        "video 1: mean of frames 1-8 of 16",
        "video 1: mean of frames 9-16 of 16",
    ]
    assert "hi there" in runs[-1]["source"]
    assert done.last_json["model"]["parameters"] > 0
    assert done.last_json["tiling_png"] is None


def test_tiles_are_printed_with_their_positions(nvila: Callable[..., Any], photo: str) -> None:
    done = nvila("inspect", "tiny-nvila-lite", "--image", photo)
    assert "81 visual" in done.out
    assert "text is counted in bytes" in done.out
    (first,) = [line for line in done.out.splitlines() if "tile 1 of 8" in line]
    start, stop = (int(number) for number in first.split()[0].split("-"))
    assert stop - start + 1 == 10
    assert "9 + 1  image  image 1: tile 1 of 8, column 1, row 1" in first


def test_tiling_is_drawn(nvila: Callable[..., Any], photo: str, tmp_path: Path) -> None:
    target = tmp_path / "tiling.png"
    done = nvila("inspect", "tiny-nvila", "--image", photo, "--tiling-png", str(target))
    assert (done.code, f"tiling drawn to {target}" in done.out) == (0, True)
    with Image.open(target) as drawn:
        assert (drawn.format, drawn.width > 4 * 360) == ("PNG", True)


def test_text_alone_makes_a_prompt(nvila: Callable[..., Any]) -> None:
    done = nvila("inspect", "tiny-nvila", "--text", "hello", "--json")
    assert done.last_json["prompt"]["visual"] == 0


@pytest.mark.parametrize(
    ("words", "error", "fix"),
    [
        (["nvila-8"], "'nvila-8' is no folder and no preset", "did you mean 'nvila-8b'?"),
        (["tiny-nvila", "--tiling-png", "x.png"], "--tiling-png has no image to draw", "--image"),
        (
            ["tiny-nvila", "--image", "PHOTO", "--tiling-png", "no/folder/x.png"],
            "cannot write no/folder/x.png",
            "exists",
        ),
    ],
)
def test_wrong_usage_is_an_error_with_a_fix(
    words: list[str], error: str, fix: str, nvila: Callable[..., Any], photo: str
) -> None:
    done = nvila("inspect", *(photo if word == "PHOTO" else word for word in words))
    assert done.code == 2
    assert error in done.err
    assert fix in done.err


def test_missing_image_is_named(nvila: Callable[..., Any]) -> None:
    done = nvila("inspect", "tiny-nvila", "--image", "absent.png")
    assert done.code == 1
    assert "absent.png does not exist" in done.err
