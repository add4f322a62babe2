"""Questions to a Prometheus, over its HTTP API."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request

from nvila.errors import ConfigError, InfrastructureError

_TIMEOUT_S = 15
_LONGEST_ANSWER = 1 << 20


class Prometheus:
    """One Prometheus, or anything that answers like it.

    Args:
        url: Its address, such as `http://prometheus-operated.monitoring.svc:9090`.
        token: Bearer token; empty for none.

    Raises:
        ConfigError: The address is none of the web.
    """

    def __init__(self, url: str, token: str = "") -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of Prometheus", "write http://HOST:9090")
        self._url, self._token = url.rstrip("/"), token

    def value(self, query: str) -> float | None:
        """Return the number that a query gives; None where it gives none.

        Raises:
            ConfigError: The query is refused, or gives several numbers.
            InfrastructureError: Prometheus cannot be reached or does not answer.
        """
        data = urllib.parse.urlencode({"query": query}).encode()
        request = urllib.request.Request(f"{self._url}/api/v1/query", data=data)  # noqa: S310  # checked above
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                found = json.loads(answer.read(_LONGEST_ANSWER))
            result = found["data"]["result"]
        except urllib.error.HTTPError as e:
            with e:
                said = e.read(500).decode("utf-8", "replace")
            if e.code in (400, 401, 403, 404, 422):
                raise ConfigError(f"Prometheus at {self._url} refuses: {e.code} {said}", "check its address") from e
            raise InfrastructureError(f"Prometheus at {self._url} failed with {e.code}", "try again later") from e
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InfrastructureError(f"Prometheus at {self._url} does not answer: {e}", "try again later") from e
        if len(result) > 1:
            raise ConfigError(f"the query gives {len(result)} numbers: {query}", "aggregate them")
        value = float(result[0]["value"][1]) if result else math.nan
        return None if math.isnan(value) else value
