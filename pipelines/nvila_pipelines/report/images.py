"""Images of a data set as small data URIs."""

from __future__ import annotations

import base64
import io
import logging
from typing import TYPE_CHECKING

from nvila.data.media import ImageTable
from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

MAX_SIDE = 256
# Below this many pixels a PNG is smaller than a JPEG and shows the model's input exactly.
_PNG_PIXELS = 96 * 96


class Thumbnails:
    """Encodes images of a table, each once."""

    def __init__(self, table: ImageTable) -> None:
        self._table = table
        self._done: dict[str, str] = {}

    def uri(self, key: str) -> str:
        """Return the image as a data URI, or the empty string when it is missing or cannot be decoded."""
        if key not in self._done:
            self._done[key] = self._encode(key)
        return self._done[key]

    def _encode(self, key: str) -> str:
        try:
            image = self._table.image(key)
        except DataError as e:
            logger.warning("the report leaves an image out: %s", e)
            return ""
        return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """Encode an image of at most `MAX_SIDE` pixels a side; decoded and encoded again, so no foreign bytes pass."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    kind = "PNG" if image.width * image.height <= _PNG_PIXELS else "JPEG"
    out = io.BytesIO()
    image.save(out, kind, optimize=True, **({"quality": 80} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
