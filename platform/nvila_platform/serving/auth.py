"""Who may ask: API keys, or a header of a proxy that has checked; and how often.

The key file holds one line a key: `NAME SHA256 [REQUESTS_PER_MINUTE]`. Keys are random, so a plain SHA-256 keeps them:
there is nothing to guess. `python -m nvila_platform.serving.auth NAME` makes a key and its line.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import math
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvila.errors import ConfigError
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import AsgiApp, Receive, Scope, Send, send_json

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = "nvila-"
_RELOAD_S = 1.0
_MAX_CLIENTS = 10_000
# Open to everybody who can reach the port: probes and Prometheus carry no keys, and neither tells of any request.
_OPEN_PATHS = frozenset({"/health", "/metrics", "/playground", "/v2/health/live", "/v2/health/ready"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One entry of a key file.

    Args:
        name: Whose key it is; logged instead of the key.
        digest: SHA-256 of the key.
        per_minute: Requests a minute; None for the server's own limit.
    """

    name: str
    digest: bytes
    per_minute: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRules:
    """How callers are known.

    Args:
        key_file: File of API keys; read again when it changes.
        trusted_header: Header in which a proxy names the caller it has checked.
        per_minute: Requests a minute of one caller; None for any number.

    Raises:
        ConfigError: Both ways are given, or a value cannot be used.
    """

    key_file: Path | None = None
    trusted_header: str | None = None
    per_minute: float | None = None

    def __post_init__(self) -> None:
        if self.key_file is not None and self.trusted_header is not None:
            raise ConfigError("both API keys and a trusted header are given", "use one of them")
        if self.trusted_header is not None and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", self.trusted_header):
            raise ConfigError(f"'{self.trusted_header}' is no header name", "use X-Forwarded-User or the like")
        if self.per_minute is not None and not self.per_minute > 0:
            raise ConfigError(f"the rate limit is {self.per_minute}", "give requests a minute, above 0")

    @property
    def closed(self) -> bool:
        """Whether strangers are turned away."""
        return self.key_file is not None or self.trusted_header is not None


def read_keys(path: Path) -> list[ApiKey]:
    """Read a key file.

    Raises:
        ConfigError: It cannot be read or has a line of another shape; the line's number is named, not its text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"key file {path} cannot be read: {e}", "give a text file with a line a key") from e
    keys = [_key(line.split(), path, number) for number, line in enumerate(lines, start=1) if _counts(line)]
    if not keys:
        raise ConfigError(f"key file {path} holds no keys", "python -m nvila_platform.serving.auth NAME makes one")
    return keys


class KeyFile:
    """The keys of a file, which may change while they are used.

    Args:
        path: The file.
        clock: Monotonic seconds.

    Raises:
        ConfigError: It cannot be used now. Later, a file that cannot be used leaves the keys as they were.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._keys = read_keys(path)
        self._stamp = _stamp(path)
        self._checked_at = clock()

    def find(self, token: str) -> ApiKey | None:
        """Return the entry of a key; takes the same time whether there is one."""
        self._refresh()
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked_at < _RELOAD_S:
            return
        self._checked_at = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as e:
            logger.warning("%s; the keys from before stay", e)
        else:
            logger.info("key file %s was read again: %d keys", self._path, len(self._keys))


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class RateLimiter:
    """So many requests a minute of each caller, in bursts of up to a sixth of them.

    Args:
        clock: Monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, _Bucket] = field(default_factory=OrderedDict)

    def take(self, caller: str, per_minute: float) -> int:
        """Count a request.

        Returns:
            0 if it may pass, else the seconds after which one may.
        """
        now = self.clock()
        burst = max(1.0, per_minute / 6)
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = _Bucket(burst, now)
            if len(self._buckets) > _MAX_CLIENTS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(caller)
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        if bucket.tokens < 1:
            return max(1, math.ceil((1 - bucket.tokens) * 60 / per_minute))
        bucket.tokens -= 1
        return 0


class Gatekeeper:
    """Turns away who may not ask, before a body is read.

    Args:
        app: The wrapped ASGI application.
        rules: How callers are known.
        on_reject: Called with the error code, for the reject counter.
    """

    def __init__(self, app: AsgiApp, rules: AccessRules, on_reject: Callable[[str], None]) -> None:
        self._app = app
        self._rules = rules
        self._on_reject = on_reject
        self._keys = None if rules.key_file is None else KeyFile(rules.key_file)
        self._limiter = RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of the ASGI protocol."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            try:
                self._check(scope)
            except ApiError as e:
                self._on_reject(e.code)
                # The body is not read, so the connection cannot carry another request.
                headers = {"connection": "close", **e.headers}
                if e.status == 401:
                    headers["www-authenticate"] = "Bearer"
                await send_json(send, e.status, e.body_for(scope["path"]), headers)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        caller, per_minute = self._caller(scope)
        scope["nvila.caller"] = caller
        if per_minute is None:
            return
        wait_s = self._limiter.take(caller, per_minute)
        if wait_s:
            message = f"more than {per_minute:g} requests a minute; try again in {wait_s} s"
            raise ApiError(429, "rate_limited", message, retry_after_s=wait_s)

    def _caller(self, scope: Scope) -> tuple[str, float | None]:
        if self._keys is not None:
            key = self._keys.find(_bearer(scope))
            if key is None:
                raise ApiError(401, "invalid_api_key", "the API key is not known; send Authorization: Bearer KEY")
            return key.name, key.per_minute or self._rules.per_minute
        if self._rules.trusted_header is not None:
            name = _header(scope, self._rules.trusted_header)
            if not _NAME.fullmatch(name):
                raise ApiError(401, "not_authenticated", "the proxy in front of this server names no caller")
            return name, self._rules.per_minute
        client = scope.get("client")
        return (str(client[0]) if client else "unknown"), self._rules.per_minute


def main(argv: Sequence[str] | None = None) -> int:
    """Make a key: the key itself on standard error, its line for the key file on standard output."""
    parser = argparse.ArgumentParser(prog="python -m nvila_platform.serving.auth", description="Make an API key.")
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--per-minute", type=float, help="requests a minute")
    args = parser.parse_args(argv)
    if not _NAME.fullmatch(args.name):
        parser.error("a name has letters, digits, '.', '_', '@' and '-'")
    key = _PREFIX + secrets.token_urlsafe(32)
    rate = "" if args.per_minute is None else f" {args.per_minute:g}"
    sys.stderr.write(f"key of {args.name}, shown only now: {key}\n")
    sys.stdout.write(f"{args.name} {hashlib.sha256(key.encode()).hexdigest()}{rate}\n")
    return 0


def _counts(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _key(words: list[str], path: Path, number: int) -> ApiKey:
    rate = _rate(words[2]) if len(words) == 3 else None
    wrong = len(words) not in (2, 3) or not _NAME.fullmatch(words[0]) or not _SHA256.fullmatch(words[1])
    if wrong or (len(words) == 3 and rate is None):
        raise ConfigError(f"key file {path}, line {number} is no key", "write NAME SHA256 [REQUESTS_PER_MINUTE]")
    return ApiKey(name=words[0], digest=bytes.fromhex(words[1]), per_minute=rate)


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def _stamp(path: Path) -> tuple[float, int]:
    try:
        found = path.stat()
    except OSError:
        return (0.0, 0)
    return (found.st_mtime, found.st_size)


def _bearer(scope: Scope) -> str:
    kind, _, token = _header(scope, "authorization").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _header(scope: Scope, name: str) -> str:
    wanted = name.lower().encode()
    values = [value for found, value in scope["headers"] if found.lower() == wanted]
    # Two of them: one may be the caller's own, so none counts.
    return values[0].decode("latin-1") if len(values) == 1 else ""


if __name__ == "__main__":
    sys.exit(main())
