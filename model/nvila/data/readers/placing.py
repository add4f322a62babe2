"""Which medium stands where in a conversation.

`<image>` and `<video>` in what people asked are places of media. As many markers as media of a kind: each medium goes
to its marker. No marker: the media go to the front of the first question, as the published models were trained.
Anything else cannot be told. What the assistant wrote is never a place; neither is text beside parts that are media.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from nvila.data.readers.problems import RecordError
from nvila.data.readers.shapes import KINDS, MediaKind, Medium, Piece, Turn

_MARKERS: dict[str, MediaKind] = {"<image>": "image", "<video>": "video", "<vila/video>": "video"}
_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))


def place_media(turns: Sequence[Turn], media: Mapping[MediaKind, Sequence[object]]) -> list[Turn]:
    """Put the media of a record's fields into its turns.

    Args:
        turns: The conversation, with markers in its texts.
        media: What the fields hold of each kind, in order.

    Returns:
        The turns without markers; every medium has its value. White space at the ends of a text is gone, unless the
        turn was written in parts.

    Raises:
        RecordError: There are media and markers, but not as many.
    """
    parts_say_it = any(isinstance(piece, Medium) for turn in turns for piece in turn.pieces) or not any(media.values())
    cut = [_cut(turn) if turn.role == "user" and not (turn.in_parts and parts_say_it) else turn for turn in turns]
    rests = {kind: iter(media[kind]) for kind in KINDS}
    leading: list[Piece] = []
    for kind in KINDS:
        places = sum(_is_place(piece, kind) for turn in cut for piece in turn.pieces)
        if not places:
            leading += [Medium(kind, value) for value in rests[kind]]
        elif places != len(media[kind]):
            raise RecordError(f"{_many(places, f'<{kind}> marker')} but {_many(len(media[kind]), kind)}")
    placed: list[Turn] = []
    for turn in cut:
        pieces = [_filled(piece, rests) for piece in turn.pieces]
        if turn.role == "user" and leading:
            pieces, leading = [*leading, *pieces], []
        placed.append(Turn(turn.role, tuple(pieces) if turn.in_parts and parts_say_it else _stripped(pieces)))
    if leading:
        raise RecordError("no question that the media belong to")
    return placed


def _cut(turn: Turn) -> Turn:
    """Take the markers out of the texts of a turn."""
    pieces: list[Piece] = []
    for piece in turn.pieces:
        if isinstance(piece, Medium):
            pieces.append(piece)
            continue
        end = 0
        for found in _MARKER.finditer(piece):
            pieces += [piece[end : found.start()], Medium(_MARKERS[found[0]], None)]
            # The model ends every medium with a line feed of its own.
            end = found.end() + piece.startswith("\n", found.end())
        pieces.append(piece[end:])
    return Turn(turn.role, tuple(pieces), turn.in_parts)


def _is_place(piece: Piece, kind: MediaKind) -> bool:
    return isinstance(piece, Medium) and piece.kind == kind and piece.value is None


def _filled(piece: Piece, rests: Mapping[MediaKind, Iterator[object]]) -> Piece:
    if isinstance(piece, Medium) and piece.value is None:
        return Medium(piece.kind, next(rests[piece.kind]))
    return piece


def _stripped(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Drop the white space at the ends of a turn, also behind media that begin it, and texts of nothing."""
    kept = list(pieces)
    for index, piece in enumerate(kept):
        if isinstance(piece, str):
            kept[index] = stripped = piece.lstrip()
            if stripped:
                break
    while kept and isinstance(last := kept[-1], str):
        kept[-1] = last.rstrip()
        if kept[-1]:
            break
        kept.pop()
    return tuple(piece for piece in kept if piece != "")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
