"""Starting the model server as a process and asking it questions, as the pipeline's last step and the tests do."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nvila.errors import ConfigError, DataError, InfrastructureError, NvilaError
from nvila_platform.launch.outcome import left_error
from nvila_platform.scratch import scratch_folder
from nvila_platform.settings import ERROR_FILE

if TYPE_CHECKING:
    from openai import OpenAI

_LOOPBACK = "127.0.0.1"
_TAIL_LINES = 15
_POLL_S = 0.05
_STOP_TIMEOUT_S = 35.0
# Straight to the server: a proxy that the environment names does not know this machine's loopback.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A model server that is ready for requests."""

    base_url: str
    name: str
    pid: int
    log_path: Path

    @property
    def openai_url(self) -> str:
        """The `base_url` for OpenAI clients."""
        return f"{self.base_url}/openai/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, with what ties it to the model that gave it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    model_version: str
    model_digest: str
    request_id: str
    seconds: float


@contextmanager
def start_server(
    model_dir: Path,
    name: str,
    port: int = 0,
    env: Mapping[str, str] | None = None,
    log_path: Path | None = None,
    *,
    version: str | None = None,
    digest: str | None = None,
    host: str = _LOOPBACK,
    timeout_s: float = 120.0,
    module: str = "nvila_platform.serving",
    args: tuple[str, ...] = (),
) -> Iterator[RunningServer]:
    """Serve a model directory in a process of its own for the time of a `with` block.

    The process dies with this one. Leaving the block ends it as a deployment would: running answers are finished.

    Args:
        model_dir: Directory of the model.
        name: Name that clients ask for.
        port: Port to listen on; 0 takes a free one.
        env: Variables added to this process's environment (`Settings.to_env()`).
        log_path: File that the server's output is appended to; None keeps it only for the time of the block.
        version: Registry version to report; None for what the folder says.
        digest: Artifact digest to report; None for what the folder says.
        host: Address to listen on.
        timeout_s: How long loading may take.
        module: What is run; another engine brings its own.
        args: More command line arguments of the module.

    Yields:
        The ready server.

    Raises:
        NvilaError: The server could not start; the same error it ended with, or the log's last lines in the hint.

    Example:
        >>> with start_server(Path("model"), "nvila") as server:  # doctest: +SKIP
        ...     ask(server.base_url, "nvila", "what shape is this?", Path("image.png").read_bytes()).text
    """
    options = ["--model-dir", str(model_dir), "--name", name, "--host", host, "--port", str(port)]
    options += [] if version is None else ["--version", version]
    options += [] if digest is None else ["--digest", digest]
    options += args
    with scratch_folder("nvila-serve") as scratch:
        log = log_path or scratch / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        process = _launch([module, *options, "--port-file", str(scratch / "port")], env or {}, log, scratch)
        try:
            base_url = _wait_ready(process, scratch, host, time.monotonic() + timeout_s, log, start)
            yield RunningServer(base_url=base_url, name=name, pid=process.pid, log_path=log)
        finally:
            _stop(process)


class ChatClient:
    """Asks one server questions over one connection, through the official OpenAI client.

    Args:
        base_url: Address of the server, without a path.
        model: Name of the served model.
        timeout_s: Longest wait for one answer.
    """

    def __init__(self, base_url: str, model: str, *, timeout_s: float = 60.0) -> None:
        self._model = model
        self._client = _openai(base_url, timeout_s)

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, question: str, image: bytes | None = None, *, max_tokens: int = 32) -> Answer:
        """Ask one question, about an image or about nothing.

        Args:
            question: The text.
            image: An encoded image (PNG, JPEG, WebP, GIF, BMP).
            max_tokens: Longest answer.

        Raises:
            DataError: The server refused the request.
            InfrastructureError: The server cannot be reached, is overloaded or failed.
        """
        import openai

        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if image is not None:
            url = f"data:image/{_image_type(image)};base64,{base64.b64encode(image).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        began = time.monotonic()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
                max_tokens=max_tokens,
                temperature=0.0,
            )
            completion = raw.parse()
        except openai.APIStatusError as e:
            raise _refused(e) from e
        except openai.APIError as e:
            raise InfrastructureError(
                f"the model server did not answer: {e}", "is it still running? see its log"
            ) from e
        choice, usage = completion.choices[0], completion.usage
        details = usage.prompt_tokens_details if usage else None
        return Answer(
            text=choice.message.content or "",
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            image_tokens=int(getattr(details, "image_tokens", 0) or 0),
            model_version=raw.headers.get("x-nvila-model-version", ""),
            model_digest=raw.headers.get("x-nvila-model-digest", ""),
            request_id=raw.headers.get("x-request-id", ""),
            seconds=time.monotonic() - began,
        )


def ask(base_url: str, model: str, question: str, image_png: bytes | None = None, *, max_tokens: int = 32) -> Answer:
    """Ask a server one question; for many, keep one `ChatClient`.

    Raises:
        DataError: The server refused the request.
        InfrastructureError: The server cannot be reached, is overloaded or failed.
    """
    with ChatClient(base_url, model) as client:
        return client.ask(question, image_png, max_tokens=max_tokens)


def _openai(base_url: str, timeout_s: float) -> OpenAI:
    import openai

    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"{base_url!r} is not the address of a server", "use http://HOST:PORT")
    http_client = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"{base_url.rstrip('/')}/openai/v1", api_key="none", timeout=timeout_s, http_client=http_client
    )


def _refused(error: object) -> NvilaError:
    status = int(getattr(error, "status_code", 500))
    body = getattr(error, "body", None)
    message = str(body.get("message", error)) if isinstance(body, dict) else str(error)
    if status in (408, 429) or status >= 500:
        return InfrastructureError(
            f"the model server answered {status}: {message}", "try again; its log has the details"
        )
    return DataError(f"the model server refused the request: {message}", "")


def _image_type(image: bytes) -> str:
    known = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
    return next((kind for magic, kind in known.items() if image.startswith(magic)), "png")


def _launch(
    module_and_args: Sequence[str], env: Mapping[str, str], log: Path, scratch: Path
) -> subprocess.Popen[bytes]:
    # The working folder is not a place to import from: a folder named docker/ would shadow the SDK.
    inherited = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | dict(os.environ) | dict(env)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "nvila_platform.launch.child", str(os.getpid()), "SIGTERM", *module_and_args],
            env={**inherited, ERROR_FILE: str(scratch / "error.json")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait_ready(
    process: subprocess.Popen[bytes], scratch: Path, host: str, deadline: float, log: Path, start: int
) -> str:
    port_file = scratch / "port"
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise InfrastructureError("the model server was not ready in time", _hint(log, start))
        port = port_file.read_text(encoding="ascii") if port_file.exists() else ""
        base_url = f"http://{_reachable(host)}:{port}"
        if port and _is_ready(base_url):
            return base_url
        time.sleep(_POLL_S)
    raise _start_failure(process.returncode, scratch / "error.json", log, start)


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return _LOOPBACK
    return f"[{host}]" if ":" in host else host


def _is_ready(base_url: str) -> bool:
    try:
        with _DIRECT.open(f"{base_url}/v2/health/ready", timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _start_failure(code: int, error_path: Path, log: Path, start: int) -> NvilaError:
    left = left_error(error_path)
    if left is not None:
        return left[0]
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return InfrastructureError(f"the model server {ended} before it was ready", _hint(log, start))


def _hint(log: Path, start: int) -> str:
    with log.open("rb") as lines:
        lines.seek(start)
        tail = lines.read().decode("utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join([f"log: {log}", *tail])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
