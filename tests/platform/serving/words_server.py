"""A deterministic engine that answers in words, and a server process around it.

One word is one token. The last user message steers it:

- `greet` answers with what the model folder's file `greeting` says,
- `params` answers with the sampling parameters it was given,
- `roles` with the roles of the conversation,
- `count N` with N words, `slow N` with one word each 50 ms,
- `refuse` and `crash` fail at once, `crash later` after the first word,
- anything else with the sizes of the images and the question itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila.data.records import Message
from nvila.errors import CheckpointError, DataError
from nvila.inference.engine import Delta, SamplingParams, Usage

if TYPE_CHECKING:
    from nvila_platform.serving.media import Medium

VISUAL_TOKENS = 16
PAUSE_S = 0.05


class WordsGeneration:
    """One answer, produced word by word."""

    def __init__(self, words: list[str], params: SamplingParams, usage: Usage, pause_s: float, crash: bool) -> None:
        self.usage = usage
        self.closed = False
        self._words = words
        self._params = params
        self._pause_s = pause_s
        self._crash = crash

    def deliver(self, to: Callable[[Delta], None]) -> None:
        for delta in self:
            to(delta)

    def __iter__(self) -> Iterator[Delta]:
        for index, word in enumerate(self._words):
            if self.closed:
                return
            time.sleep(self._pause_s)
            if self._crash and index:
                raise RuntimeError("secret /etc/path")
            self.usage = Usage(
                prompt_tokens=self.usage.prompt_tokens,
                visual_tokens=self.usage.visual_tokens,
                completion_tokens=index + 1,
            )
            last = index + 1 == len(self._words)
            full = index + 1 == self._params.max_tokens
            reason: Literal["stop", "length"] | None = (
                "stop" if last or word in self._params.stop else "length" if full else None
            )
            text = "" if word in self._params.stop else word if index == 0 else f" {word}"
            yield Delta(text=text, finish_reason=reason)
            if reason:
                return

    def close(self) -> None:
        self.closed = True


class WordsEngine:
    """The engine; keeps what it was asked for the tests to look at."""

    max_length = 4096

    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting
        self.generations: list[WordsGeneration] = []
        self.asked: list[str] = []
        self.adapted: dict[str, WordsEngine] = {}

    @classmethod
    def load(cls, path: Path, adapters: Mapping[str, Path]) -> WordsEngine:
        while (path / "wait").exists():
            time.sleep(0.02)
        if (path / "damaged").exists():
            raise CheckpointError("model.safetensors is damaged", "fetch it again")
        if (path / "mute").exists():
            raise RuntimeError("secret /etc/path")
        made = cls(path.joinpath("greeting").read_text() if (path / "greeting").exists() else "hello")
        made.adapted = {name: cls.load(folder, {}) for name, folder in adapters.items()}
        return made

    def adapter(self, name: str) -> WordsEngine:
        return self.adapted[name]

    def stream(
        self, messages: Sequence[Message], images: Mapping[str, Medium], params: SamplingParams
    ) -> WordsGeneration:
        text = messages[-1].text
        self.asked.append(text)
        if text == "refuse":
            raise DataError("the prompt has 9000 tokens, the model takes 4096", "shorten it")
        if text == "crash":
            raise RuntimeError("secret /etc/path")
        keys = [part.value for message in messages for part in message.content if part.type != "text"]
        command, _, rest = text.partition(" ")
        if command in ("count", "slow"):
            words = [str(number) for number in range(int(rest))]
        elif text == "greet":
            words = [self.greeting]
        elif text == "params":
            words = [repr(params)]
        elif text == "roles":
            words = [message.role for message in messages]
        else:
            words = [_described(images[key]) for key in keys] + text.split()
        prompt = sum(len(message.text.split()) for message in messages) + VISUAL_TOKENS * len(keys)
        usage = Usage(prompt_tokens=prompt, visual_tokens=VISUAL_TOKENS * len(keys), completion_tokens=0)
        pause_s = PAUSE_S if command == "slow" else 0.0
        generation = WordsGeneration(words, params, usage, pause_s, crash=text == "crash later")
        self.generations.append(generation)
        return generation


def _described(medium: Medium) -> str:
    frames = getattr(medium, "frames", None)
    return f"{medium.size[0]}x{medium.size[1]}" + ("" if frames is None else f"x{len(frames)}")


if __name__ == "__main__":
    from nvila_platform.serving.server import main

    sys.exit(main(load=WordsEngine.load))
