"""A deployed service that answers an evaluation's questions as its clients see it: OpenAI chat completions."""

from __future__ import annotations

import base64
import io
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, DataError, InfrastructureError
from nvila.evaluation.answer_log import Answer

if TYPE_CHECKING:
    from openai import OpenAI

    from nvila.evaluation.asking import Piece, Question
    from nvila.evaluation.task import GenerationSettings

DEFAULT_FRAMES = 8
# Where the chat completions of a service are, below the address that people give.
_PLACES = ("", "/openai/v1", "/v1")
_PASSING = frozenset({408, 409, 425, 429})
# Nothing would be answered: the service does not know us, the model or the path.
_HOPELESS = frozenset({401, 403, 404})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_NO_CONNECTION = "connection"
_DIGEST_HEADER = "x-nvila-model-digest"
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A service that was found.

    Args:
        url: Its base address for OpenAI clients.
        model: Name of the model that is asked.
        digest: Digest of the model, of a server of this project; None of others.
    """

    url: str
    model: str
    digest: str | None


@dataclass(slots=True)
class Traffic:
    """What an evaluation sent, counted over all threads."""

    requests: int = 0
    retries: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, *, retries: int, error: str | None) -> None:
        """Count a question, how often it was sent again, and the error that it ended with."""
        with self.lock:
            self.requests += 1 + retries
            self.retries += retries
            if error is not None:
                self.errors[error] = self.errors.get(error, 0) + 1


def find_endpoint(url: str, model: str | None, *, api_key: str = "", timeout_s: float = 30.0) -> Endpoint:
    """Find the chat completions of a service and the model to ask.

    Args:
        url: Address of the server, or the base address of its OpenAI routes.
        model: Name of the model; None takes the only one.
        api_key: Key of the service.
        timeout_s: Longest wait.

    Raises:
        ConfigError: There is no such service or model there, or it refuses the key.
        InfrastructureError: Nothing answers.
    """
    import openai

    for place in _PLACES:
        base = url.rstrip("/") + place
        with _client(base, api_key, timeout_s) as client:
            try:
                cards = list(client.models.list())
            except openai.AuthenticationError as e:
                raise ConfigError(f"{url} refuses the key: {e.message}", "set NVILA_ENDPOINT_API_KEY") from e
            except openai.APIStatusError as e:
                if e.status_code >= 500:
                    raise InfrastructureError(f"{url} answers {e.status_code}", "try again when it is up") from e
                continue
            except openai.APIConnectionError as e:
                raise InfrastructureError(f"nothing answers at {url}: {e}", "check the address, or start it") from e
            except (openai.APIError, ValueError, AttributeError, TypeError):
                continue  # a page of something else
            known = {card.id: card for card in cards}
            if model is None and len(known) != 1:
                raise ConfigError(f"{url} serves {', '.join(known) or 'no model'}", "name one with --served-model")
            name = model or next(iter(known))
            if name not in known:
                raise ConfigError(f"{url} does not serve '{name}'", f"it serves {', '.join(known)}")
            digest = getattr(known[name], "digest", None)
            return Endpoint(url=base, model=name, digest=None if digest in (None, "unknown") else str(digest))
    raise ConfigError(f"{url} has no OpenAI routes", f"they were looked for at {', '.join(_PLACES[1:])} and at {url}")


class EndpointAnswerer:
    """Asks a service, several questions at once.

    What fails for a passing reason (no connection, timeout, 429, 5xx) is sent again after a growing pause. A question
    that cannot be answered in the end is a failure with its reason, never an empty answer.

    Args:
        endpoint: The service.
        api_key: Its key.
        concurrency: Requests at once.
        retries: How often a request is sent again.
        timeout_s: Longest wait for one answer.
        traffic: Counts requests.
        pause: Waits some seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        api_key: str = "",
        concurrency: int = 8,
        retries: int = 3,
        timeout_s: float = 60.0,
        traffic: Traffic | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint, self.traffic = endpoint, traffic or Traffic()
        self._client = _client(endpoint.url, api_key, timeout_s)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="endpoint")
        # Its connections would otherwise be left to the garbage collector, which complains about each.
        self._ended = weakref.finalize(self, _end, self._client, self._pool)
        self._retries, self._pause = retries, pause
        self._jitter = random.Random(0)

    def close(self) -> None:
        """Close the connections; happens by itself when the object is forgotten."""
        self._ended()

    def answer(self, questions: Sequence[Question], settings: GenerationSettings) -> list[Answer]:
        """Ask all questions and return answers, or what went wrong, in their order.

        Raises:
            ConfigError: The service refuses us, or does not know the model any more.
            DataError: The service began to answer with another model.
            InfrastructureError: It cannot be reached.
        """
        answers = list(self._pool.map(lambda question: self._ask(question, settings), questions))
        if answers and all((answer.problem or "").startswith(_NO_CONNECTION) for answer in answers):
            # The service is gone, and samples are not to blame.
            raise InfrastructureError(f"nothing answers at {self.endpoint.url} any more", "run it again: it goes on")
        return answers

    def _ask(self, question: Question, settings: GenerationSettings) -> Answer:
        try:
            content = [part for piece in question.pieces for part in _parts(piece, settings)]
        except DataError as e:
            return Answer(None, str(e))
        for attempt in range(self._retries + 1):
            text, problem, wait = self._send(content, settings)
            if problem is None or wait is None or attempt == self._retries:
                self.traffic.count(retries=attempt, error=problem.partition(":")[0] if problem else None)
                return Answer(text, problem)
            with self.traffic.lock:
                spread = self._jitter.uniform(0.5, 1.0)
            self._pause(max(wait, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * spread))
        raise AssertionError("the last attempt returns")

    def _send(
        self, content: list[dict[str, Any]], settings: GenerationSettings
    ) -> tuple[str | None, str | None, float | None]:
        """Return an answer; or a problem, and how long to wait before trying again, None where that is useless."""
        import openai

        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.endpoint.model,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
                max_tokens=settings.max_new_tokens,
                temperature=0.0,
            )
            completion = raw.parse()
            text = completion.choices[0].message.content
        except openai.APITimeoutError:
            return None, "timeout: no answer in time", 0.0
        except openai.APIConnectionError as e:
            return None, f"{_NO_CONNECTION}: {e.__cause__ or e}", 0.0
        except openai.APIStatusError as e:
            said = e.body.get("message", e.message) if isinstance(e.body, dict) else e.message
            if e.status_code in _HOPELESS:
                refusal = f"{self.endpoint.url} answers {e.status_code}: {said}"
                raise ConfigError(refusal, "check key and model") from e
            problem = f"status {e.status_code}: {said}"
            passing = e.status_code in _PASSING or e.status_code >= 500
            return None, problem, _retry_after(e.response.headers.get("retry-after")) if passing else None
        except (openai.APIError, ValueError, IndexError, AttributeError, TypeError) as e:
            return None, f"malformed: the answer is no chat completion: {e}", 0.0
        if text is None:
            return None, "malformed: the answer has no text", 0.0
        self._check_model(raw.headers.get(_DIGEST_HEADER))
        return text.strip(), None, None

    def _check_model(self, digest: str | None) -> None:
        known = self.endpoint.digest
        if known is not None and digest is not None and digest != known:
            raise InfrastructureError(
                f"{self.endpoint.url} changed its model from {known[:12]} to {digest[:12]} while it was evaluated",
                "run it again when the rollout is over",
            )


def _end(client: OpenAI, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False)
    client.close()


def _client(base_url: str, api_key: str, timeout_s: float) -> OpenAI:
    import openai

    # Retries are counted here, so the client makes none. Proxies of the environment count but for this machine.
    local = any(host in base_url for host in ("//127.0.0.1", "//localhost", "//[::1]"))
    http_client = openai.DefaultHttpxClient(trust_env=not local)
    return openai.OpenAI(
        base_url=base_url, api_key=api_key or "none", timeout=timeout_s, max_retries=0, http_client=http_client
    )


def _parts(piece: Piece, settings: GenerationSettings) -> Iterable[dict[str, Any]]:
    """Return a piece as parts of a message; a video goes as its sampled frames."""
    if piece.kind == "text":
        yield {"type": "text", "text": piece.value}
        return
    for image in [piece.value] if piece.kind == "image" else _frames(piece.value, settings.num_frames):
        kind = next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "png")
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
        yield {"type": "image_url", "image_url": {"url": url}}


def _frames(value: Any, num_frames: int | None) -> Iterable[bytes]:
    from PIL import Image

    from nvila.data.video import Video, load_video

    video = value if isinstance(value, Video) else load_video(value, num_frames=num_frames or DEFAULT_FRAMES)
    for frame in video.frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        yield buffer.getvalue()


def _retry_after(text: str | None) -> float:
    try:
        return max(0.0, min(float(text or 0), _LONGEST_WAIT_S))
    except ValueError:
        return 0.0  # a date; the growing pause serves as well
