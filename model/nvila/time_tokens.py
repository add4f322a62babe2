"""Time tokens: moments of a video as words of the vocabulary, for temporal localisation.

A video of any duration is divided by `n` tokens `<t0>` ... `<t(n-1)>` from its beginning to its end. In the text that
users and data sets write, a moment is its number of seconds in angle brackets, such as `<12.5>`. The scheme is that
of LITA, with a loss that gives a near miss some credit.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase

from nvila.errors import ConfigError, DataError
from nvila.losses import SoftTargets

NUM_TIME_TOKENS = 100
TIME_TOKEN_FORMAT = "<t{t}>"
_SECONDS = re.compile(r"<(\d+(?:\.\d+)?)>")


class Interval(NamedTuple):
    """A span of a video in seconds."""

    start: float
    end: float


def time_tokens(n: int = NUM_TIME_TOKENS, token_format: str = TIME_TOKEN_FORMAT) -> list[str]:
    """Return the tokens in the order of the moments they stand for.

    Raises:
        ConfigError: `token_format` has no place for the number, or there are fewer than two tokens.
    """
    if "{t}" not in token_format:
        raise ConfigError(f"time_token_format is '{token_format}'", "write {t} where the number goes, as in <t{t}>")
    _check_count(n)
    return [token_format.replace("{t}", str(t)) for t in range(n)]


def add_time_tokens(
    tokenizer: PreTrainedTokenizerBase, n: int = NUM_TIME_TOKENS, token_format: str = TIME_TOKEN_FORMAT
) -> list[int]:
    """Add the time tokens that a tokenizer lacks; resize the model's embeddings afterwards.

    They are ordinary tokens, not special ones: decoding keeps them in the answer.

    Args:
        tokenizer: Changed in place.
        n: Number of tokens.
        token_format: Their spelling, with `{t}` for the number.

    Returns:
        The ids in order of time, for `time_token_ids` of the configuration.

    Raises:
        ConfigError: `token_format` has no place for the number, or there are fewer than two tokens.
    """
    tokens = time_tokens(n, token_format)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(ids, list)
    return ids


def encode_times(text: str, duration: float, n: int = NUM_TIME_TOKENS, token_format: str = TIME_TOKEN_FORMAT) -> str:
    """Replace every `<seconds>` of a text by its time token; moments behind the end become the last one.

    Args:
        text: Text with moments such as `<12.5>`.
        duration: Length of the video in seconds.
        n: Number of time tokens.
        token_format: Their spelling.

    Raises:
        DataError: The duration is not positive.
        ConfigError: There are fewer than two tokens.

    Example:
        >>> encode_times("from <0> to <30>", duration=60)
        'from <t0> to <t50>'
    """
    _check_duration(duration)
    _check_count(n)

    def token(match: re.Match[str]) -> str:
        # round() takes halves to the even number, as the data of released checkpoints was made.
        t = min(n - 1, round(float(match[1]) / duration * (n - 1)))
        return token_format.replace("{t}", str(t))

    return _SECONDS.sub(token, text)


def decode_times(text: str, duration: float, n: int = NUM_TIME_TOKENS, token_format: str = TIME_TOKEN_FORMAT) -> str:
    """Replace every time token of a text by `<seconds>`; numbers that no token has become the end.

    Args:
        text: Text with time tokens.
        duration: Length of the video in seconds.
        n: Number of time tokens.
        token_format: Their spelling.

    Raises:
        DataError: The duration is not positive.
        ConfigError: There are fewer than two tokens.

    Example:
        >>> decode_times("from <t0> to <t50>", duration=60)
        'from <0.0> to <30.3>'
    """
    _check_duration(duration)
    _check_count(n)

    def seconds(match: re.Match[str]) -> str:
        t = int(match[1])
        return f"<{round(t * duration / (n - 1), 2) if t < n else float(duration)}>"

    return re.sub(re.escape(token_format).replace(r"\{t\}", r"(\d+)"), seconds, text)


def soft_targets(time_token_ids: list[int] | Tensor, std: float = 1.0) -> SoftTargets:
    """Return targets that spread every time token over its neighbours in time.

    Token t asks for exp(-(t - t')^2 / (2 std^2)) of every token t', scaled to sum to 1.

    Args:
        time_token_ids: Ids in order of time.
        std: Width in tokens; 0 is the ordinary cross entropy.

    Raises:
        ConfigError: The width is negative.
    """
    if not std >= 0:
        raise ConfigError(f"soft_ce_std is {std}", "use 0 (no neighbours) or more")
    ids = torch.as_tensor(time_token_ids, dtype=torch.long)
    steps = torch.arange(len(ids), dtype=torch.float64)
    distance = (steps.unsqueeze(1) - steps).abs()
    # Divided before it is squared, so that no width, however small, makes 0 / 0 of the diagonal.
    weights = torch.exp(-((distance / std) ** 2) / 2) if std else torch.eye(len(ids), dtype=torch.float64)
    return SoftTargets(ids, (weights / weights.sum(1, keepdim=True)).float())


def parse_interval(
    answer: str, duration: float, n: int = NUM_TIME_TOKENS, token_format: str = TIME_TOKEN_FORMAT
) -> Interval:
    """Read the span that an answer names: its first two moments, in order and inside the video.

    An answer with fewer than two moments names the whole video.

    Args:
        answer: Text with time tokens or `<seconds>`.
        duration: Length of the video in seconds.
        n: Number of time tokens.
        token_format: Their spelling.

    Raises:
        DataError: The duration is not positive.
        ConfigError: There are fewer than two tokens.
    """
    moments = [float(found) for found in _SECONDS.findall(decode_times(answer, duration, n, token_format))]
    if len(moments) < 2:
        return Interval(0.0, float(duration))
    start, end = sorted(min(float(duration), moment) for moment in moments[:2])
    return Interval(start, end)


def interval_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Overlap of two spans over what they cover together; 0 when they cover nothing."""
    overlap = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - overlap
    return overlap / union if union > 0 else 0.0


def _check_duration(duration: float) -> None:
    if not 0 < duration < float("inf"):
        raise DataError(f"the duration of a video is {duration} seconds", "time tokens need its true length")


def _check_count(n: int) -> None:
    if n < 2:
        raise ConfigError(f"num_time_tokens is {n}", "use 2 or more: the first is the beginning, the last the end")
