"""llama.cpp through its Python binding: the peer's own file of the same model, or the same rounded to another form.

Needs `pip install --no-deps llama-cpp-python diskcache`, which compiles for the machine at hand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 512


class LlamaCpp:
    """One model and its cache.

    Args:
        path: GGUF file.
        threads: Threads of prompt and decoding.
        streams: Sequences that are kept at once.
    """

    def __init__(self, path: Path, *, threads: int, streams: int = 1) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 2048 * streams, 2048, _CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = streams
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._at: list[int] = [0] * streams

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forget everything, read prompts and return the next token of each."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._at = [0] * len(prompts)
        found = []
        for row, prompt in enumerate(prompts):
            self._run([(row, token, place == len(prompt) - 1) for place, token in enumerate(prompt)])
            found.append(int(self._logits(len(prompt) - 1).argmax()))
        return found

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Add one token to each sequence and return the next ones."""
        self._run([(row, token, True) for row, token in enumerate(tokens)])
        return [int(self._logits(row).argmax()) for row in range(len(tokens))]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._at = [0]
        rows = []
        for first in range(0, len(ids), _CHUNK):
            chunk = ids[first : first + _CHUNK]
            self._run([(0, token, True) for token in chunk])
            rows += [torch.from_numpy(self._logits(place).copy()) for place in range(len(chunk))]
        return torch.stack(rows)

    def close(self) -> None:
        """Free the peer's memory."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _run(self, tokens: Sequence[tuple[int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (row, token, wanted) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, self._at[row], wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            self._at[row] += 1
        failed = self._api.llama_decode(self._context, batch)
        assert failed == 0, f"llama_decode returned {failed}"

    def _logits(self, place: int) -> Any:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, place), shape=(self.vocabulary,))


def rounded(source: Path, target: Path, form: str) -> Path:
    """Round a GGUF file to another form of llama.cpp's, such as `Q8_0`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    params.allow_requantize = True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert failed == 0, f"llama_model_quantize returned {failed}"
    return target
