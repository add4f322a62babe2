"""What is left of an interrupted run: every block that was quantized, so that the next run goes on behind it.

A block is a safetensors file, and beside it a line of JSON with its digest and the errors of its layers. The JSON comes
last, by a rename, so a block without one, or one whose bytes are others, is quantized again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from nvila.progress import Reporter
from nvila.quantization.calibrated import LayerError
from nvila.quantization.config import Part, Scheme
from nvila.quantization.saved import fill_state, flat_state
from nvila.quantization.schemes import quantize_linears


@dataclass(frozen=True, slots=True)
class PartStates:
    """The finished blocks of one part.

    Args:
        folder: Where they are; belongs to one model, one data set and one set of options.
        part: The part.
        scheme: Its scheme.
        group_size: Inputs that share a 4-bit scale.
    """

    folder: Path
    part: Part
    scheme: Scheme
    group_size: int

    def save(self, number: int, block: nn.Module, errors: Sequence[LayerError]) -> None:
        """Keep a block that was just quantized."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        weights, note = self._paths(number)
        save_file({name: tensor.contiguous() for name, tensor in flat_state(block).items()}, weights)
        text = json.dumps({"sha256": _sha256(weights), "errors": [asdict(one) for one in errors]})
        partial = note.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, note)

    def load(self, number: int, block: nn.Module, reporter: Reporter) -> list[LayerError] | None:
        """Put a kept block's weights into the wide block; returns its errors, or None when there is nothing to use."""
        from safetensors.torch import load_file

        weights, note = self._paths(number)
        if not note.is_file():
            return None
        try:
            kept = json.loads(note.read_text(encoding="utf-8"))
            if kept["sha256"] != _sha256(weights):
                raise ValueError("its digest is another")
            errors = [LayerError(**one) for one in kept["errors"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            reporter.notice(f"{weights.name} is damaged and made again: {e}")
            return None
        quantize_linears(block, self.scheme, self.group_size)
        fill_state(block, load_file(weights))
        return errors

    def _paths(self, number: int) -> tuple[Path, Path]:
        name = f"{self.part}-{number:04}"
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"


def forget(folder: Path) -> None:
    """Remove what was kept, when the result is whole."""
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
