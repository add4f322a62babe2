"""Which model a server answers with: the facts that tie an answer back to the registry and the artifact store."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvila.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LINEAGE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Name, registry version and artifact digest of the served model.

    Args:
        name: What clients send as `model` and what stands in the V1 and V2 paths.
        version: Version in the model registry; "unregistered" when served from a bare directory.
        digest: Digest of the artifact that holds the weights; "unknown" when nobody computed one.
        created: Unix time from which the model is offered.
    """

    name: str
    version: str = "unregistered"
    digest: str = "unknown"
    created: int = 0

    def __post_init__(self) -> None:
        # All three end up in URLs, HTTP headers and metric labels, so their alphabet is closed here once.
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"model name {self.name!r} is not usable in a URL", "use letters, digits, '.', '_', '-'")
        for field, value in (("version", self.version), ("digest", self.digest)):
            if not _LINEAGE.fullmatch(value):
                raise ConfigError(
                    f"model {field} {value!r} is not usable in a header",
                    "use up to 128 letters, digits, '.', '_', ':', '-'",
                )

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of OpenAI responses: equal weights and version give an equal value."""
        return f"v{self.version}-{self.digest.removeprefix('sha256:')[:16]}"

    def headers(self) -> dict[str, str]:
        """The lineage headers of every response."""
        return {"x-nvila-model-version": self.version, "x-nvila-model-digest": self.digest}
