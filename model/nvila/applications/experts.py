"""Medical images with experts (VILA-M3): the model names an expert, the expert answers, the model goes on.

An answer may hold a trigger `<NAME(args)>`. The expert of that name gets the image, and what it finds (a picture with
its mask, and a text) comes back as a new turn of the user; the model then answers.

python -m nvila.applications.experts DIR writes generated data: pictures of cells, and how many there are.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import CapabilityError, ConfigError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

Chat = list[dict[str, Any]]
_TRIGGER = re.compile(r"<(?P<name>[A-Z][A-Z0-9_]*)\((?P<args>[^()<>]*)\)>")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_SIZE = 64


@dataclass(frozen=True, slots=True)
class Trigger:
    """A call of an expert: its name, and its arguments by place."""

    name: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What an expert found: a text, and a picture of it if there is one."""

    text: str
    picture: Image | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """Somebody who looks at an image.

    Args:
        name: Name in triggers.
        about: What it does, for the prompt that lists experts.
        look: Does it; the arguments are those of the trigger.
    """

    name: str
    about: str
    look: Callable[[Image, Sequence[str]], Finding]


def parse_trigger(text: str) -> Trigger | None:
    """Read the first trigger of an answer; None where there is none.

    Example:
        >>> parse_trigger("let me look. <CELLS(count)>")
        Trigger(name='CELLS', args=('count',))
    """
    found = _TRIGGER.search(text)
    if found is None:
        return None
    args = tuple(word.strip() for word in found["args"].split(",") if word.strip())
    return Trigger(found["name"], args)


class ExpertRegistry:
    """Experts by name.

    Raises:
        ConfigError: Two have one name.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        self._experts: Mapping[str, Expert] = {expert.name: expert for expert in experts}
        if len(self._experts) < len(experts):
            raise ConfigError("two experts have one name", "give each a name of its own")

    def prompt(self) -> str:
        """Return the lines that tell a model of the experts."""
        return "\n".join(f"<{one.name}(args)>: {one.about}" for one in self._experts.values())

    def ask(self, trigger: Trigger, image: Image) -> Finding:
        """Let an expert look.

        Raises:
            ConfigError: There is none of this name.
        """
        if trigger.name not in self._experts:
            raise ConfigError(f"there is no expert {trigger.name}", nearest(trigger.name, self._experts))
        return self._experts[trigger.name].look(image, trigger.args)


@dataclass(frozen=True, slots=True)
class Consultation:
    """How a question was answered: the first answer, what an expert found if one was asked, and the last answer."""

    first: str
    trigger: Trigger | None
    finding: Finding | None
    answer: str


def consult(answer: Callable[[Chat], str], experts: ExpertRegistry, image: Image, question: str) -> Consultation:
    """Answer a question about an image in one pass, or in two where the model asks for an expert.

    An expert that does not exist costs the second pass only: the first answer stands.

    Args:
        answer: Lets a model answer a conversation in chat-message form.
        experts: Whom it may ask.
        image: The image.
        question: The question.
    """
    chat: Chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    first = answer(chat)
    trigger = parse_trigger(first)
    if trigger is None:
        return Consultation(first, None, None, first)
    try:
        finding = experts.ask(trigger, image)
    except ConfigError:
        return Consultation(first, trigger, None, first)
    chat.append({"role": "assistant", "content": [{"type": "text", "text": first}]})
    back: list[dict[str, Any]] = [{"type": "text", "text": finding.text}]
    if finding.picture is not None:
        back.insert(0, {"type": "image", "image": finding.picture})
    chat.append({"role": "user", "content": back})
    return Consultation(first, trigger, finding, answer(chat))


def segment_cells(image: Image, args: Sequence[str] = ()) -> Finding:
    """Find dark cells on a pale ground: Otsu's threshold, small specks removed, connected parts counted.

    Args:
        image: The image.
        args: Not used; one segmentation answers all.

    Raises:
        CapabilityError: scikit-image is not installed.
    """
    import numpy as np
    from PIL import Image as Images

    try:
        from skimage.filters import threshold_otsu
        from skimage.measure import label, regionprops
    except ImportError as e:
        raise CapabilityError("the expert CELLS needs scikit-image", "pip install 'nvila[tune]'") from e
    pixels = np.asarray(image.convert("RGB"))
    gray = np.asarray(image.convert("L"))
    if int(gray.max()) - int(gray.min()) < 32:
        return Finding("the expert found no cells.", image)
    marked = label(gray <= threshold_otsu(gray))
    cells = [region for region in regionprops(marked) if region.area >= 12]
    mask = np.isin(marked, [region.label for region in cells])
    overlay = pixels.copy()
    overlay[mask] = (overlay[mask] * 0.4 + np.array([0, 255, 0]) * 0.6).astype(np.uint8)
    return Finding(f"the expert found {number_word(len(cells))} cells.", Images.fromarray(overlay))


CELLS = Expert(name="CELLS", about="segments cells in a microscope image and counts them", look=segment_cells)
LOCAL_EXPERTS = ExpertRegistry([CELLS])


def number_word(count: int) -> str:
    """Return a small number as a word."""
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def write_data(directory: Path, pictures: int, seed: int = 0) -> Path:
    """Write pictures of cells with two samples each: the trigger, and the answer after the expert; returns the file."""
    if pictures < 1:
        raise ConfigError(f"pictures is {pictures}", "use 1 or more")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(pictures):
        choose = random.Random(f"cells {seed} {number}")
        count = choose.randint(1, 6)
        picture = draw_cells(choose, count)
        finding = segment_cells(picture)
        assert finding.picture is not None
        names = [f"images/{number}.png", f"images/{number}-mask.png"]
        for name, one in zip(names, (picture, finding.picture), strict=True):
            one.save(directory / name)
        asked = [{"type": "image", "path": names[0]}, {"type": "text", "text": "how many cells are there?"}]
        call = [{"role": "user", "content": asked}, _said("<CELLS(count)>")]
        back = [{"type": "image", "path": names[1]}, {"type": "text", "text": finding.text}]
        whole = [*call, {"role": "user", "content": back}, _said(number_word(count))]
        for kind, messages in (("trigger", call), ("answer", whole)):
            lines.append(json.dumps({"id": f"{kind}-{number}", "source": kind, "messages": messages}))
    file = directory / "data.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def draw_cells(choose: random.Random, count: int) -> Image:
    """Draw some cells that do not touch."""
    from PIL import Image as Images
    from PIL import ImageDraw

    picture = Images.new("RGB", (_SIZE, _SIZE), (235, 225, 230))
    draw = ImageDraw.Draw(picture)
    places = choose.sample([(x, y) for x in range(3) for y in range(3)], count)
    for column, row in places:
        radius = choose.randint(4, 7)
        x, y = 11 + 21 * column + choose.randint(-2, 2), 11 + 21 * row + choose.randint(-2, 2)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(90, 40, 120))
    return picture


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def main() -> int:
    """Write generated data."""
    parser = argparse.ArgumentParser(description="Write generated pictures of cells.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write_data(args.directory, args.pictures, args.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
