"""The class that lmms-eval makes and asks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms

from nvila.errors import ConfigError, DataError
from nvila.evaluation.asking import Piece, Question
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.task import GenerationSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What lmms-eval's own models take where a task says nothing.
_DEFAULT_NEW_TOKENS = 1024
# Markers that tasks leave in texts; media stand in front of the text.
_MARKERS = ("<image>", "<video>")


class Nvila(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """NVILA for lmms-eval, with greedy decoding.

    Args:
        pretrained: Folder of the model, wide or quantized.
        dtype: `fp32` or `bf16`; a quantized folder has its own.
        device: `cpu` or `cuda`.
        batch_size: Questions answered together.
        num_frames: Frames sampled from a video; 0 takes the model's number.
        **kwargs: What lmms-eval gives every model; anything else is refused.

    Raises:
        ConfigError: An argument is unknown or has a value that cannot be used.
        CheckpointError: The model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str = "fp32",
        device: str = "cpu",
        batch_size: int | str = 1,
        num_frames: int | str = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        from nvila.assembly import load_model
        from nvila.quantization.saved import is_quantized

        if unknown := sorted(set(kwargs) - {"max_batch_size"}):
            raise ConfigError(
                f"--model_args has {unknown[0]}, which NVILA does not take", "pretrained, dtype, num_frames"
            )
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype}", f"use {' or '.join(_DTYPES)}")
        options: dict[str, Any] = {} if is_quantized(Path(pretrained)) else {"dtype": _DTYPES[dtype]}
        model, processor = load_model(Path(pretrained), **options)
        self._answerer = ModelAnswerer(model.to(device), processor)  # type: ignore[arg-type]
        self._batch_size, self._num_frames = int(batch_size), int(num_frames) or None

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests in their order.

        Raises:
            DataError: A request holds what NVILA cannot look at, such as sound, or its prompt is too long.
        """
        from tqdm import tqdm

        answers: list[str] = []
        with tqdm(total=len(requests), desc="NVILA", disable=self.rank != 0) as bar:
            for settings, batch in self._batches(requests):
                said = self._answerer.answer([self._question(request) for request in batch], settings)
                answers += [_cut(text, settings.stop) for text in said]
                for request, text in zip(batch, answers[-len(batch) :], strict=True):
                    self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), text)
                bar.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("NVILA answers one question at a time; tasks of several rounds are not offered")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("NVILA generates answers; tasks that compare likelihoods are not offered")

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[GenerationSettings, list[Any]]]:
        """Yield runs of requests with equal settings, at most a batch each."""
        batch: list[Any] = []
        settings: GenerationSettings | None = None
        for request in requests:
            own = self._settings(request.args[1])
            if batch and (own != settings or len(batch) == self._batch_size):
                assert settings is not None
                yield settings, batch
                batch = []
            batch.append(request)
            settings = own
        if batch and settings is not None:
            yield settings, batch

    def _settings(self, wanted: Mapping[str, Any]) -> GenerationSettings:
        stops = wanted.get("until") or []
        return GenerationSettings(
            max_new_tokens=int(wanted.get("max_new_tokens") or _DEFAULT_NEW_TOKENS),
            stop=[stops] if isinstance(stops, str) else [str(stop) for stop in stops],
            num_frames=self._num_frames,
        )

    def _question(self, request: Any) -> Question:
        text, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for marker in _MARKERS:
            text = text.replace(marker, "")
        pieces = (*map(_piece, visuals), Piece("text", text.strip()))
        return Question(index=doc_id, id=str(doc_id), pieces=pieces, reference={}, group=None, digest="")


def _piece(visual: Any) -> Piece:
    """Return a picture as encoded bytes, and a video by its path."""
    from PIL import Image

    if isinstance(visual, Image.Image):
        buffer = io.BytesIO()
        visual.convert("RGB").save(buffer, "PNG")
        return Piece("image", buffer.getvalue())
    if isinstance(visual, str | Path):
        return Piece("video", Path(visual))
    raise DataError(f"NVILA cannot look at a {type(visual).__name__}", "leave this task out")


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
