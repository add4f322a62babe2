"""The OpenAPI document's part about bodies that our routes read themselves, to answer with errors of their own."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from nvila_platform.serving.schema import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest)


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Return what a route says of its body and of its errors."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Add the schemas of the bodies to the document; it is made when somebody asks for it."""
    document = app.openapi

    def with_bodies() -> dict[str, Any]:
        made = document()
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for kind in _BODIES:
            schema = kind.model_json_schema(ref_template=_REF)
            schemas |= schema.pop("$defs", {})
            schemas[kind.__name__] = schema
        return made

    app.openapi = with_bodies  # type: ignore[method-assign]  # as FastAPI documents it
