"""`/playground`: one page to try the served model in, without anything loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response

from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.service import ChatService

if TYPE_CHECKING:
    from nvila.vision.tiling import Grid

_LONGEST_SIDE = 65_535
_PAGE = "playground.html"
_BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def playground_router(service: ChatService) -> APIRouter:
    """Return the route of the page."""
    router = APIRouter()
    page = files("nvila_platform.serving").joinpath(_PAGE).read_text(encoding="utf-8")
    page = page.replace("{{model}}", service.identity.name)
    headers = {"content-security-policy": policy(page)}

    async def playground() -> Response:
        return HTMLResponse(page, headers=headers)

    async def tiles(width: int, height: int) -> Response:
        grids = tile_grids(service.queue.served.engine, width, height)
        return JSONResponse({"grids": [[grid.columns, grid.rows] for grid in grids]})

    router.add_api_route("/playground/tiles", tiles, methods=["GET"], response_model=None)
    router.add_api_route("/playground", playground, methods=["GET"], response_model=None)
    return router


def tile_grids(engine: object, width: int, height: int) -> Sequence[Grid]:
    """Ask the model's own processor how it would cut a single image; an engine without one cuts nothing.

    Raises:
        ApiError: The sizes are those of no image.
    """
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        raise ApiError(400, "invalid_parameter", "width and height must be those of an image")
    images: Any = getattr(getattr(engine, "processor", None), "image_processor", None)
    if images is None:
        return ()
    grids: Sequence[Grid] = images.plan(width, height, tile=images.tiles_images).grids
    return grids


def policy(page: str) -> str:
    """Return a policy under which the page's own script and styles run, and nothing else does."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _BLOCK.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src data: blob:",
            "media-src blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
