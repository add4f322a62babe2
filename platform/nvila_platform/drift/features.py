"""Numbers that describe a request without saying what is in it: sizes, brightness, lengths.

Nothing here can be turned back into a picture or a text, and only the bin that a number falls into is ever kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Name -> what it is, for people.
FEATURES = {
    "images": "images of a request",
    "megapixels": "size of an image, megapixels",
    "aspect": "width of an image over its height",
    "brightness": "mean brightness of an image, 0 to 1",
    "contrast": "standard deviation of an image's brightness",
    "prompt_letters": "letters of a prompt",
    "answer_letters": "letters of an answer",
}
OUTPUTS = ("answer_letters",)
_SIDE = 32
_DIGITS = 6

Values = dict[str, list[float]]


def request_features(prompt: str, images: Sequence[Image.Image]) -> Values:
    """Describe what comes in.

    Args:
        prompt: Text of all turns.
        images: The decoded images.
    """
    found: Values = {"images": [float(len(images))], "prompt_letters": [float(len(prompt))]}
    for image in images:
        for name, value in image_features(image).items():
            found.setdefault(name, []).append(value)
    return found


def answer_features(letters: int) -> Values:
    """Describe what goes out.

    Args:
        letters: Length of the answer.
    """
    return {"answer_letters": [float(letters)]}


def image_features(image: Image.Image) -> dict[str, float]:
    """Describe one image; brightness by a thumbnail, so that a large one costs as little as a small one."""
    import numpy as np
    from PIL import Image as PilImage

    width, height = image.size
    small = image.convert("L").resize((_SIDE, _SIDE), PilImage.Resampling.BOX)
    levels = np.asarray(small, dtype=np.float64) / 255
    found = {
        "megapixels": width * height / 1e6,
        "aspect": width / height,
        "brightness": float(levels.mean()),
        "contrast": float(levels.std()),
    }
    # What is left over from adding floats is no difference between images.
    return {name: round(value, _DIGITS) for name, value in found.items()}
