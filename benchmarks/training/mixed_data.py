"""Short and long training samples about real easy-VQA pictures, as a folder in LLaVA form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from nvila.data import easy_vqa
from nvila.data.records import Sample


def questions() -> list[tuple[str, str]]:
    """All questions of the set with their answers."""
    return [(sample.question, sample.answer) for sample in easy_vqa.questions("train")]


def write_data(folder: Path, count: int, seed: int) -> None:
    """Write LLaVA-format samples: six in ten are one question, three a dialogue about a picture, one a long text."""
    folder.mkdir()
    draw = random.Random(seed)
    by_image: dict[str, list[Sample]] = {}
    for sample in easy_vqa.questions("train"):
        by_image.setdefault(sample.images[0], []).append(sample)
    files = dict(easy_vqa.image_files("train"))
    keys = sorted(by_image)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as out:
        for number in range(count):
            key, kind = draw.choice(keys), draw.random()
            asked = draw.sample(by_image[key], 1) if kind < 0.6 else list(by_image[key])
            if kind >= 0.9:
                asked = [draw.choice(by_image[draw.choice(keys)]) for _ in range(draw.randint(15, 25))]
            turns = [
                {"from": who, "value": text}
                for one in asked
                for who, text in (("human", one.question), ("gpt", one.answer))
            ]
            record: dict[str, Any] = {"id": str(number), "conversations": turns}
            if kind < 0.9:
                name = f"{key.replace('/', '-')}.png"
                (folder / name).write_bytes(files[key].read_bytes())
                turns[0]["value"] = f"<image>{turns[0]['value']}"
                record["image"] = name
            out.write(json.dumps(record) + "\n")
