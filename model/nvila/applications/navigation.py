"""Robot navigation: eight frames, an instruction, and a sentence that becomes discrete actions (NaVILA, 2412.04453).

python -m nvila.applications.navigation DIR writes generated data: doors that a robot sees while it moves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["left", "right", "forward", "stop"]
NUM_FRAMES = 8
STEP_CM, TURN_DEGREES = 25, 15
# A sentence that asks for more is taken to be no action: no room is that long.
_MOST_STEPS = 40
_TO_CM = {"cm": 1.0, "m": 100.0}
_ACTION = re.compile(
    r"turn(?:ed|ing)?\s+(?:to\s+the\s+)?(?P<side>left|right)(?:\s+by)?\s+(?P<angle>\d+(?:\.\d+)?)\s*(?:degrees?|deg|°)"
    r"|(?:move|go|walk)\s+forward(?:\s+by)?\s+(?P<length>\d+(?:\.\d+)?)\s*(?P<unit>cm|m)\b"
    r"|(?P<stop>\bstop\b)",
    re.IGNORECASE,
)
_COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 210)}
_SIZE = 64


@dataclass(frozen=True, slots=True)
class Action:
    """What a locomotion policy is asked for.

    Args:
        kind: Which way.
        times: How many steps of 25 cm or turns of 15 degrees; 1 for stop.
    """

    kind: Kind
    times: int = 1


def parse_action(text: str) -> Action | None:
    """Read the first action of a sentence, in whole steps; None where it names none.

    Example:
        >>> parse_action("turn left 40 degrees"), parse_action("move forward 0.75 m")
        (Action(kind='left', times=3), Action(kind='forward', times=3))
    """
    found = _ACTION.search(text)
    if found is None:
        return None
    if found["stop"]:
        return Action("stop")
    if found["side"]:
        side: Kind = "left" if found["side"].lower() == "left" else "right"
        return _action(side, float(found["angle"]) / TURN_DEGREES)
    return _action("forward", float(found["length"]) * _TO_CM[found["unit"].lower()] / STEP_CM)


def sample_frames(num_frames: int, wanted: int = NUM_FRAMES) -> list[int]:
    """Choose frames of an episode so far: the current one last, the history even; a short one repeats its first.

    Example:
        >>> sample_frames(15), sample_frames(2, 4)
        ([0, 2, 4, 6, 8, 10, 12, 14], [0, 0, 0, 1])

    Raises:
        DataError: There are no frames.
    """
    if num_frames < 1:
        raise DataError("an episode has no frames", "give at least the current one")
    if num_frames < wanted:
        return [0] * (wanted - num_frames) + list(range(num_frames))
    return [round(place * (num_frames - 1) / (wanted - 1)) for place in range(wanted)]


def prompt(instruction: str) -> str:
    """Return what is asked beside the frames."""
    return (
        f"these are the frames that the robot has seen, the last one is the current one. its task: {instruction} "
        "say the next action: turn left or right by some degrees, move forward by some cm, or stop."
    )


def write_data(directory: Path, episodes: int, seed: int = 0) -> Path:
    """Write episodes with eight frames each and the next action; returns the JSONL file.

    A door stands left, right or ahead, far or near. The robot turns to it, walks to it, and stops in front of it.

    Raises:
        ConfigError: There are no episodes.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}", "use 1 or more")
    (directory / "frames").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(episodes):
        choose = random.Random(f"navigation {seed} {number}")
        color = choose.choice(sorted(_COLORS))
        angle, distance = choose.choice((-30, -15, 0, 0, 15, 30)), choose.choice((25, 50, 75, 100))
        if angle == 0 and choose.random() < 0.3:
            distance = 0
        seen = [
            (angle + drift, distance + 10 * (NUM_FRAMES - 1 - place)) for place, drift in enumerate(_drifts(choose))
        ]
        names = [f"frames/{number}-{place}.png" for place in range(NUM_FRAMES)]
        for name, (view, away) in zip(names, [*seen[:-1], (angle, distance)], strict=True):
            draw_view(color, view, away).save(directory / name)
        lines.append(
            json.dumps(
                {
                    "id": f"episode-{number}",
                    "images": names,
                    "question": prompt(f"go to the {color} door."),
                    "answer": sentence(angle, distance),
                }
            )
        )
    file = directory / "data.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def sentence(angle: int, distance: int) -> str:
    """Return the action that brings a robot nearer to a door at some degrees (right is positive) and cm."""
    if angle:
        return f"turn {'right' if angle > 0 else 'left'} {abs(angle)} degrees"
    return f"move forward {distance} cm" if distance else "stop"


def draw_view(color: str, angle: float, distance: float) -> Image:
    """Draw what a robot sees of a door: beside the middle by the angle, as large as it is near."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_SIZE, _SIZE), (225, 225, 215))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, _SIZE * 2 // 3, _SIZE, _SIZE), fill=(150, 140, 130))
    half = max(3, round(26 / (1 + distance / 40)))
    middle = _SIZE // 2 + round(_SIZE * math.sin(math.radians(angle)) * 0.8)
    draw.rectangle(
        (middle - half // 2, _SIZE * 2 // 3 - 2 * half, middle + half // 2, _SIZE * 2 // 3), fill=_COLORS[color]
    )
    return image


def _drifts(choose: random.Random) -> Sequence[int]:
    return [choose.choice((-4, 0, 4)) for _ in range(NUM_FRAMES)]


def _action(kind: Kind, times: float) -> Action | None:
    count = round(times)
    return Action(kind, count) if 1 <= count <= _MOST_STEPS else None


def main() -> int:
    """Write generated data."""
    parser = argparse.ArgumentParser(description="Write generated navigation data.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_data(args.directory, args.episodes, args.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
