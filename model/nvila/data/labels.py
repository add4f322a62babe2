"""Which tokens of a conversation are learned: by exact offsets, or as the reference code picks them."""

from __future__ import annotations

from collections.abc import Sequence

from nvila.losses import IGNORE_INDEX

Token = tuple[int, int, int]
"""A token's id and its start and end in the text."""


def offset_labels(tokens: Sequence[Token], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Label the tokens that lie inside a span.

    Args:
        tokens: In the order of the text.
        spans: What is supervised, in the order of the text.
    """
    labels = []
    current = 0
    for token, start, end in tokens:
        while current < len(spans) and spans[current][1] < end:
            current += 1
        inside = current < len(spans) and spans[current][0] <= start
        labels.append(token if inside else IGNORE_INDEX)
    return labels


def greedy_labels(ids: Sequence[int], frame: Sequence[Sequence[int]]) -> list[int]:
    """Label what is left when the text around the answers is crossed out greedily from the left.

    This is how released checkpoints were trained. A line feed inside an answer is taken for the one behind the
    answer's turn: it goes unsupervised and the later one is supervised in its place. `offset_labels` is right.

    Args:
        ids: Tokens of the conversation.
        frame: Tokens between the answers, one list more than answers; the first of each list but the first closes
            the answer's turn.

    Returns:
        The labels; nothing is supervised when the text around the answers is not found.
    """
    closed = [list(piece[1:]) if number else list(piece) for number, piece in enumerate(frame)]
    # A template's last token before an answer can have merged with the answer's first one; then it goes without.
    opened = [piece[:-1] for piece in closed[:-1]] + closed[-1:]
    for pieces in (closed, opened):
        rest = [token for piece in pieces for token in piece]
        labels, found = _cross_out(ids, rest)
        if found:
            return labels
    return [IGNORE_INDEX] * len(ids)


def _cross_out(ids: Sequence[int], rest: Sequence[int]) -> tuple[list[int], bool]:
    labels, position = [], 0
    for token in ids:
        crossed = position < len(rest) and token == rest[position]
        position += crossed
        labels.append(IGNORE_INDEX if crossed else token)
    return labels, position == len(rest)
