"""Validate custom resources against their definitions, strictly: an unknown field is an error.

An API server drops fields that a definition does not know, so a misspelt one is lost without a word. Here it fails.
CEL rules (`x-kubernetes-validations`) are not evaluated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
Document = dict[str, Any]

# The API server checks metadata by rules of its own, so definitions leave it open.
METADATA: Schema = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        "namespace": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        "labels": {
            "type": "object",
            "additionalProperties": {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"},
        },
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@dataclass
class CrdSchemas:
    """Definitions in folders of files named `<group>_<plural>.json` or `.yaml`, read when first asked for.

    Args:
        folder: Definitions as their projects publish them.
        also: Further folders.
    """

    folder: Path
    also: tuple[Path, ...] = ()
    _validators: dict[tuple[str, str], jsonschema.Draft202012Validator] = field(default_factory=dict)

    def knows(self, document: Document) -> bool:
        """Whether the folders define this kind of resource in this version."""
        return self._validator(document["apiVersion"], document["kind"]) is not None

    def errors(self, document: Document) -> list[str]:
        """Return what is wrong with a document, as `path: reason` lines; none when it is valid.

        Raises:
            LookupError: When its kind is not defined here.
        """
        validator = self._validator(document["apiVersion"], document["kind"])
        if validator is None:
            raise LookupError(f"no definition of {document['apiVersion']} {document['kind']} in {self.folder}")
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]

    def _validator(self, api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
        key = (api_version, kind)
        if key not in self._validators:
            schema = self._find(api_version, kind)
            if schema is None:
                return None
            self._validators[key] = jsonschema.Draft202012Validator(schema)
        return self._validators[key]

    def _find(self, api_version: str, kind: str) -> Schema | None:
        group, _, version = api_version.rpartition("/")
        found = (path for folder in (self.folder, *self.also) for path in sorted(folder.glob(f"{group}_*.*")))
        for path in found:
            text = path.read_text(encoding="utf-8")
            spec = (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))["spec"]
            if spec["names"]["kind"] != kind:
                continue
            for served in spec["versions"]:
                if served["name"] == version:
                    schema = strict(served["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = METADATA
                    schema["properties"]["apiVersion"] = {"const": api_version}
                    schema["properties"]["kind"] = {"const": kind}
                    schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata", "spec"})
                    return schema
        return None


def strict(schema: Schema) -> Schema:
    """Turn a definition's OpenAPI v3 schema into a JSON schema that refuses unknown fields."""
    out = dict(schema)
    if "properties" in out:
        out["properties"] = {name: strict(child) for name, child in out["properties"].items()}
        if "additionalProperties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    if isinstance(out.get("items"), dict):
        out["items"] = strict(out["items"])
    if isinstance(out.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(out["additionalProperties"])
    if out.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out
