"""API keys, a proxy's word, and rates."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from nvila.errors import ConfigError
from nvila_platform.serving.addresses import HostRules
from nvila_platform.serving.auth import AccessRules, Gatekeeper, KeyFile, RateLimiter, main, read_keys
from nvila_platform.serving.limits import Event, Receive, Scope, Send
from nvila_platform.serving.options import ServerOptions


def line(name: str, key: str, rate: str = "") -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate}".strip()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(gate: Gatekeeper, path: str = "/openai/v1/models", *headers: tuple[str, str]) -> tuple[int, dict[str, str]]:
    sent: list[Event] = []

    async def receive() -> Event:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: Event) -> None:
        sent.append(event)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    asyncio.run(gate({"type": "http", "path": path, "headers": raw, "client": ("10.0.0.9", 1)}, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    if sent[0]["status"] != 200:
        found["code"] = json.loads(sent[1]["body"])["error"]["code"]
    return sent[0]["status"], found


async def callers(scope: Scope, _receive: Receive, send: Send) -> None:
    headers = [(b"caller", scope.get("nvila.caller", "nobody").encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def gate(rules: AccessRules) -> Gatekeeper:
    return Gatekeeper(callers, rules, lambda _code: None)


def test_a_key_that_was_made_opens_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ann", "--per-minute", "30"]) == 0
    written = capsys.readouterr()
    key = written.err.strip().rpartition(" ")[2]
    (tmp_path / "keys").write_text(f"# a comment\n\n{written.out}")
    assert key not in (tmp_path / "keys").read_text()
    made = gate(AccessRules(key_file=tmp_path / "keys"))
    assert ask(made, "/openai/v1/models", ("authorization", f"Bearer {key}")) == (200, {"caller": "ann"})
    assert ask(made)[0] == 401
    assert read_keys(tmp_path / "keys")[0].per_minute == 30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        "ann",
        "ann secret",
        f"{line('ann', 'k')} fast",
        f"{line('ann', 'k')} 0",
        f"{line('a b', 'k')} 3",
    ],
)
def test_key_files_that_cannot_be_used_name_the_line_and_not_its_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert "secret" not in str(caught.value)


def test_a_key_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(line("ann", "one"))
    keys = KeyFile(path, clock)
    for text, known in ((f"{line('ann', 'two')} 5", "two"), ("broken", "two"), (line("ann", "three"), "three")):
        path.write_text(text)
        clock.now += 2
        assert keys.find(known) is not None
    assert keys.find("one") is None


def test_the_proxys_word_is_taken_from_its_header_alone(tmp_path: Path) -> None:
    made = gate(AccessRules(trusted_header="X-Forwarded-User"))
    assert ask(made, "/openai/v1/models", ("x-forwarded-user", "ann")) == (200, {"caller": "ann"})
    assert ask(made)[1]["code"] == "not_authenticated"
    twice = (("x-forwarded-user", "ann"), ("x-forwarded-user", "root"))
    assert ask(made, "/openai/v1/models", *twice)[0] == 401
    assert ask(made, "/openai/v1/models", ("x-forwarded-user", "a b\n"))[0] == 401


def test_probes_are_let_through(tmp_path: Path) -> None:
    made = gate(AccessRules(trusted_header="X-User"))
    assert ask(made, "/v2/health/ready") == (200, {"caller": "nobody"})
    assert ask(made, "/health/")[0] == 401


def test_strangers_are_counted_by_their_address() -> None:
    made = gate(AccessRules(per_minute=6))
    assert [ask(made)[0] for _ in range(2)] == [200, 429]
    assert ask(made)[1]["code"] == "rate_limited"


def test_rates_allow_bursts_and_come_back() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.take("a", 12) for _ in range(3)] == [0, 0, 5]
    assert limiter.take("b", 12) == 0
    clock.now += 5
    assert [limiter.take("a", 12) for _ in range(2)] == [0, 5]
    clock.now += 3600
    assert [limiter.take("a", 12) for _ in range(3)] == [0, 0, 5]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AccessRules(key_file=Path("k"), trusted_header="X"), "both"),
        (lambda: AccessRules(trusted_header="a b"), "no header name"),
        (lambda: AccessRules(per_minute=0), "rate limit"),
        (lambda: ServerOptions(production=True), "without a key"),
        (lambda: ServerOptions(drain_s=-1), "drain"),
        (lambda: HostRules(hosts=("a/b",)), "host name"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=says):
        make()
