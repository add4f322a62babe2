"""Checkpoints as scorers: what a window of records is under an NVILA model, or under any causal language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch

from nvila.curation.encoding import Outcome
from nvila.curation.nvila_scorer import NvilaScorer
from nvila.curation.text_scorer import TextScorer
from nvila.curation.windows import FrameSampling, Window
from nvila.errors import CheckpointError

NVILA = "nvila"
DType = Literal["fp32", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Scorer(Protocol):
    """A checkpoint that gives the likelihood of answers."""

    @property
    def sampling(self) -> FrameSampling | None:
        """How it samples videos; None when it takes none."""

    def score(self, window: Window, max_tokens: int) -> list[Outcome]:
        """Score the records of a window, or say why one has no score.

        Args:
            window: Records with their media.
            max_tokens: Budget of a batch, padding included.

        Raises:
            ResourceError: A batch does not fit into the device's memory.
        """


def load_scorer(folder: Path, *, dtype: DType, device: str) -> Scorer:
    """Load a checkpoint as a scorer: an NVILA model, or any other causal language model for records of text.

    Args:
        folder: Model folder with safetensors.
        dtype: Type of weights and activations.
        device: Where it runs, such as `cpu` or `cuda:0`.

    Raises:
        CheckpointError: It is no complete model, needs code of its own, or is a released layout to convert first.
        CapabilityError: Its tokenizer or its head is of a kind that cannot be used.
    """
    from nvila.assembly import check_model_files

    check_model_files(folder)
    if model_type(folder) == NVILA:
        return NvilaScorer.load(folder, dtype=DTYPES[dtype], device=device)
    return TextScorer.load(folder, dtype=DTYPES[dtype], device=device)


def sampling_of(folder: Path) -> FrameSampling | None:
    """Return how a checkpoint samples videos, without loading its weights; None for language models.

    Raises:
        CheckpointError: It is no model.
    """
    from nvila.inspection import load_processor

    if model_type(folder) != NVILA:
        return None
    video = load_processor(str(folder)).video_processor
    return FrameSampling(video.num_frames, video.fps)


def model_type(folder: Path) -> str:
    """Return the kind of a model folder as its configuration names it.

    Raises:
        CheckpointError: It has no configuration that can be read.
    """
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {e}", "make the model again") from e
