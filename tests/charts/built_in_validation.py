"""Validate Kubernetes' own resources strictly, with the schemas that the package kubernetes-validate carries.

The package reads all definitions of a version again for every document; here each version is read once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

Document = dict[str, Any]


@dataclass
class BuiltInSchemas:
    """Schemas of several versions of Kubernetes.

    Args:
        versions: Such as `1.30`; a document must be valid for all of them.
    """

    versions: tuple[str, ...]
    _validators: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    _definitions: dict[str, Any] = field(default_factory=dict)
    _seen: dict[str, list[str]] = field(default_factory=dict)

    def errors(self, document: Document) -> list[str]:
        """Return what is wrong with a document, as `version: path: reason` lines; none when it is valid.

        Raises:
            FileNotFoundError: When a version does not know the kind.
        """
        text = json.dumps(document, sort_keys=True)
        if text not in self._seen:
            # Most rows of a matrix make many documents that were already seen.
            self._seen[text] = [
                f"{version}: {error.json_path}: {error.message}"
                for version in self.versions
                for error in self._validator(version, document["apiVersion"], document["kind"]).iter_errors(document)
            ]
        return self._seen[text]

    def _validator(self, version: str, api_version: str, kind: str) -> Any:
        key = (version, api_version, kind)
        if key not in self._validators:
            folder = f"kubernetes-json-schema/v{version}.0-local-strict"
            # rbac.authorization.k8s.io/v1 is in the file <kind>-rbac-v1.
            group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
            if version not in self._definitions:
                contents = schema_contents(f"{folder}/_definitions.json", version)
                self._definitions[version] = Resource.from_contents(contents) @ Registry()
            schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
            registry = Resource.from_contents(schema) @ self._definitions[version]
            self._validators[key] = jsonschema.Draft202012Validator(schema, registry=registry)
        return self._validators[key]
