"""Any causal language model as a scorer, for records of text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nvila.curation.encoding import Outcome, context_of, encode_all, score_all
from nvila.curation.problems import Problem
from nvila.curation.scoring import score_rows
from nvila.curation.windows import FrameSampling, Window
from nvila.data.collation import Batch
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import Sample
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN
from nvila.errors import CapabilityError, CheckpointError

# For language models without a chat template: the turns as lines.
_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)


@dataclass(slots=True)
class TextScorer:
    """A causal language model of any family, for records without media."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: nn.Module

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: str) -> TextScorer:
        """Load a folder with AutoModelForCausalLM; nothing is downloaded and no code of the folder runs."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from nvila.checkpoints.layouts import NVILA, detect_layout

        if (folder / "llm").is_dir() and detect_layout(folder) != NVILA:
            raise CheckpointError(
                f"{folder} is a released checkpoint", f"convert it first: nvila convert {folder} DST --to {NVILA}"
            )
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as e:
            reason = str(e).strip().partition("\n")[0]
            raise CheckpointError(f"no language model in {folder}: {reason}", "point at a saved one") from e
        model, report = loaded
        if wrong := sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]):
            raise CheckpointError(f"the weights in {folder} lack {wrong[0]}", "make the model again")
        model.eval().to(device)
        return cls(model, _prepared(tokenizer, folder), _head(model))

    @property
    def sampling(self) -> FrameSampling | None:
        """It takes no videos."""
        return None

    def score(self, window: Window, max_tokens: int) -> list[Outcome]:
        """See `Scorer.score`."""
        template = cast("PreTrainedTokenizerBase", _TextTemplate(self.tokenizer))
        encoder = ConversationEncoder(template, 0, sys.maxsize)
        samples = [
            Problem(status="bad_media", reason="a language model takes no images and videos")
            if isinstance(sample, Sample) and _has_media(sample)
            else sample
            for sample in window.samples
        ]
        blind = Window(records=window.records, samples=samples, images={}, videos={})
        outcomes = encode_all(blind, encoder, context_of(self.model.config, self.tokenizer))
        pad = self.tokenizer.pad_token_id
        return score_all(outcomes, max_tokens, lambda rows: score_rows(rows, self._hidden, self.head, pad))

    def _hidden(self, batch: Batch) -> Tensor:
        # Without positions, which not all families take: rows are padded on the right and count by themselves.
        device = self.model.device
        outputs = self.model.base_model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.long().to(device), use_cache=False
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden


class _TextTemplate:
    """A tokenizer whose chat template gets every content as one text, which templates of language models expect."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
        flat = [
            {"role": message["role"], "content": "".join(part.get("text", "") for part in message["content"])}
            for message in messages
        ]
        return self._tokenizer.apply_chat_template(flat, **kwargs)


def _prepared(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Give a tokenizer what the encoder asks for; the ids of the media tokens are never used."""
    if not tokenizer.is_fast:
        raise CapabilityError(
            f"the tokenizer in {folder} does not say which characters a token covers", "save it as tokenizer.json"
        )
    known = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _PLAIN_TEMPLATE
    return tokenizer


def _head(model: PreTrainedModel) -> nn.Module:
    """Return what makes the model's logits of its hidden states."""
    from nvila.language_head import ShapedHead, build_head
    from nvila.parts import check_head

    head: nn.Module = cast("nn.Module", model.get_output_embeddings())
    with torch.device("meta"):
        shaped = build_head(model.config)
    if isinstance(shaped, ShapedHead):
        check_head(model)
        shaped.weight = cast("nn.Linear", head).weight
        return shaped
    return head


def _has_media(sample: Sample) -> bool:
    return any(part.type != "text" for message in sample.messages for part in message.content)
