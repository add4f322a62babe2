"""From tokens to text that may be sent: nothing that could still change or turn out to be a stop text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# Of the tokens sent already, this many are decoded again with new ones: enough for any character and for what
# tokenizers do between words.
_CONTEXT = 6


class AnswerText:
    """Decodes an answer piece by piece and holds back what may become a stop text or a half character.

    Only the tokens since the last certain place are decoded, so a long answer does not become slower by its length.

    Args:
        tokenizer: Tokenizer of the model.
        stop: Texts that end the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text is in `_text`
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._ids.append(token)
        text = self._decoded()
        if text is None:
            return ""
        # A stop text that ended earlier would have been found then.
        longest = max((len(stop) for stop in self._stop), default=0)
        found = [at for stop in self._stop if (at := text.find(stop, max(0, len(self._text) - longest))) >= 0]
        self._text = text
        if found:
            self.stopped = True
            self._text = text[: min(found)]
            return self._send(len(self._text))
        return self._send(len(text) - self._held_back(text))

    def rest(self) -> str:
        """Return what was held back, when the answer ends without a stop text."""
        if self._settled < len(self._ids):
            self._text = self._whole(self._ids)
        return self._send(len(self._text))

    def _decoded(self) -> str | None:
        """Return the text of all tokens, or None while it ends in half a character."""
        start = max(0, self._settled - _CONTEXT)
        before = self._decode(self._ids[start : self._settled])
        after = self._decode(self._ids[start:])
        if after.endswith("\ufffd"):
            return None
        self._settled = len(self._ids)
        if start == 0:
            return after.lstrip()
        if not after.startswith(before):  # a tokenizer that rewrites what it said
            return self._whole(self._ids)
        grown = self._text + after[len(before) :]
        return grown if self._text else grown.lstrip()

    def _whole(self, ids: list[int]) -> str:
        return self._decode(ids).lstrip()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _held_back(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _send(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        return piece
