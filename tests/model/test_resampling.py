from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.processing import pixel_levels
from nvila.vision.resampling import levels, resample

BICUBIC = Image.Resampling.BICUBIC


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (2, 3), (90, 60), (60, 90), (300, 40), (64, 64)])
@pytest.mark.parametrize("target", [(28, 28), (112, 56), (56, 140)])
def test_values_are_those_of_pillow_within_two_levels(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(*size)
    columns_first = image.resize((target[0], size[1]), BICUBIC).resize(target, BICUBIC)
    found = resample(levels(image), *target)
    assert found.shape == (3, target[1], target[0])
    apart = (found.int() - levels(columns_first).permute(2, 0, 1).int()).abs()
    assert int(apart.max()) <= 2
    assert float((apart > 0).float().mean()) < 0.02


def test_a_picture_of_the_wanted_size_is_taken_as_it_is() -> None:
    image = noise(28, 28)
    assert torch.equal(resample(levels(image), 28, 28), levels(image).permute(2, 0, 1))


def test_the_result_is_the_callers_own() -> None:
    image = noise(28, 28)
    for size in (28, 14):
        resample(levels(image), size, size).zero_()
    assert np.array_equal(np.asarray(image), np.asarray(noise(28, 28)))


def test_training_scales_as_answering_does() -> None:
    image = noise(90, 60)
    assert torch.equal(pixel_levels(image, 28), resample(levels(image), 28, 28))
