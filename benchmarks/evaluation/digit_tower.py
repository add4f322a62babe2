"""A vision tower that knows handwritten digits before it meets a language model, as SigLIP knows pictures.

It learns to name the digit whose middle is in a patch, on tiles with small digits. All models of a benchmark start
from the tower of their seed, so that they differ in what is compared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from nvila.data.digits_vqa import DigitsVQA

_NONE = 10
_NONE_WEIGHT = 0.1
_BATCH, _LR = 64, 2e-3


def pretrained_tower(
    folder: Path, config: Mapping[str, Any], sides: Sequence[int], *, seed: int, steps: int, inverted: bool
) -> tuple[Path, dict[str, float]]:
    """Train a tower, or take the one that is there.

    Args:
        folder: Where it is.
        config: Of the tower.
        sides: Sides in pixels of the digits, one of which is drawn for every tile.
        seed: Of weights and tiles.
        steps: Optimizer steps.
        inverted: Black digits on white, as on pages; else white on black, as in clips.

    Returns:
        The folder, and what the training took and reached.
    """
    import json

    if (folder / "pretraining.json").exists():
        return folder, json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    vision = SiglipVisionModel(SiglipVisionConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    head = nn.Linear(vision.config.hidden_size, _NONE + 1)
    tiles = Tiles(config["image_size"], config["patch_size"], sides, inverted)
    parameters = [*vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps, pct_start=0.1)
    weight = torch.ones(_NONE + 1)
    weight[_NONE] = _NONE_WEIGHT
    noise = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for step in range(steps):
        pixels, labels = tiles.draw(_BATCH, noise, "train")
        logits = head(vision(pixel_values=pixels).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"{folder.name}: {step}/{steps}, loss {loss.item():.3f}", flush=True)
    found = {
        "seconds": round(time.process_time() - started, 1),
        "patch_accuracy": round(_accuracy(vision, head, tiles), 4),
    }
    vision.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{folder.name}: {found}", flush=True)
    return folder, found


class Tiles:
    """Tiles with digits at random places; a digit may reach over the edge."""

    def __init__(self, size: int, patch: int, sides: Sequence[int], inverted: bool) -> None:
        self._digits = DigitsVQA()
        self._members = {split: self._digits.members(split) for split in ("train", "test")}
        self._size, self._patch, self._sides, self._inverted = size, patch, sides, inverted
        self._pictures: dict[tuple[int, int], Tensor] = {}

    def draw(self, count: int, noise: torch.Generator, split: str) -> tuple[Tensor, Tensor]:
        """Return pixels (B, 3, h, w) and the digit, or none, of every patch (B, N)."""
        size, rows = self._size, self._size // self._patch
        ink = torch.zeros(count, size, size)
        labels = torch.full((count, rows, rows), _NONE)

        def number(high: int) -> int:
            return int(torch.randint(high, (), generator=noise))

        members = self._members[split]
        for tile in range(count):
            side = self._sides[number(len(self._sides))]
            for _ in range(1 + number(3)):
                left, top = (number(size + side) - side for _ in range(2))
                chosen = members[number(len(members))]
                x0, y0, x1, y1 = max(0, left), max(0, top), min(size, left + side), min(size, top + side)
                if x1 > x0 and y1 > y0:
                    patch = self._picture(chosen, side)[y0 - top : y1 - top, x0 - left : x1 - left]
                    ink[tile, y0:y1, x0:x1] = patch
                middle = (top + side // 2, left + side // 2)
                if all(0 <= at < size for at in middle):
                    labels[tile, middle[0] // self._patch, middle[1] // self._patch] = self._digits.digit(chosen)
        grey = (1 - 2 * ink) if self._inverted else (2 * ink - 1)
        return grey[:, None].expand(-1, 3, -1, -1), labels.flatten(1)

    def _picture(self, number: int, side: int) -> Tensor:
        import numpy as np
        from PIL import Image

        if (number, side) not in self._pictures:
            # Drawn at 12 pixels and brought to size, as a page is drawn and then scaled.
            drawn = self._digits.picture(number, 12 if self._inverted else 40)
            scaled = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
            self._pictures[number, side] = torch.from_numpy(scaled / 255)
        return self._pictures[number, side]


@torch.inference_mode()
def _accuracy(vision: SiglipVisionModel, head: nn.Linear, tiles: Tiles) -> float:
    """Return how many patches with a digit are named right, on digits that training did not see."""
    pixels, labels = tiles.draw(256, torch.Generator().manual_seed(1), "test")
    guessed = head(vision(pixel_values=pixels).last_hidden_state)[..., :_NONE].argmax(-1)
    shown = labels != _NONE
    return float((guessed[shown] == labels[shown]).float().mean())
