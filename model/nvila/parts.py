"""A new NVILA from a vision tower and a language model of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nvila.configuration import NVILAConfig
from nvila.data.tokenizers import (
    IMAGE_TOKEN,
    RELEASED_CHAT_TEMPLATE,
    TURN_END,
    TURN_START,
    VIDEO_TOKEN,
    token_id,
)
from nvila.errors import CapabilityError, ConfigError, nearest
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.time_tokens import add_time_tokens
from nvila.vision.projectors import MultimodalProjector

# How each family looks at images and videos; a mapping of fields of NVILAConfig.
VARIANTS: dict[str, dict[str, Any]] = {
    "nvila": {"image_aspect_ratio": "dynamic_s2", "mm_projector_type": "mlp_downsample"},
    "nvila-lite": {"image_aspect_ratio": "dynamic", "mm_projector_type": "mlp_downsample_3x3_fix"},
    "nvila-video": {
        "image_aspect_ratio": "resize",
        "mm_projector_type": "mlp_downsample_2x2_fix",
        "video_pool_sizes": [[8, 1, 1]],
        "num_time_tokens": 100,
        "num_video_frames": 256,
    },
    "basic": {"image_aspect_ratio": "resize", "mm_projector_type": "mlp_downsample_2x2_fix"},
}
_PAD = "[PAD]"
Part = PreTrainedModel | PreTrainedConfig | Mapping[str, Any] | str | Path


def build_from_parts(
    vision: Part,
    language: Part,
    variant: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Assemble a model and its processor; see `NVILAForConditionalGeneration.from_parts`."""
    if variant not in VARIANTS:
        raise ConfigError(f"unknown variant '{variant}'", nearest(variant, VARIANTS))
    if tokenizer is None:
        if not isinstance(language, str | Path):
            raise ConfigError("there is no tokenizer", "pass tokenizer=..., or a folder with one as language")
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(language, local_files_only=True))
    fields = VARIANTS[variant] | overrides
    tower, causal = load_tower(vision, dtype), load_decoder(language, dtype)
    check_head(causal)
    num_words = len(tokenizer)
    time_token_ids = prepare_tokenizer(tokenizer, int(fields.get("num_time_tokens", 0)))
    resize_rows(causal, num_words, len(tokenizer))
    text_config = causal.config
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = NVILAConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_id=token_id(tokenizer, IMAGE_TOKEN),
        video_token_id=token_id(tokenizer, VIDEO_TOKEN),
        image_end_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"][-1],
        time_token_ids=time_token_ids,
        **fields,
    )
    model = join(config, tower, causal)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, NVILAProcessor.from_config(config, tokenizer)


def load_tower(part: Part, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return a SigLIP vision tower without its pooling head.

    Raises:
        CapabilityError: It is not of that kind.
    """
    model = _load(part, AutoModel, "siglip_vision_model", dtype)
    tower = getattr(model, "vision_model", model)  # a whole SigLIP has a text tower beside it
    if not hasattr(getattr(tower, "encoder", None), "layers") or not hasattr(tower, "embeddings"):
        raise CapabilityError(f"'{model.config.model_type}' is no SigLIP-style tower", "use a siglip_vision_model")
    if getattr(tower, "use_head", False):  # it sees the last layer, which NVILA does not use
        tower.use_head = tower.config.vision_use_head = False
        del tower.head
    return cast("PreTrainedModel", tower)


def load_decoder(part: Part, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return a causal language model."""
    return _load(part, AutoModelForCausalLM, "qwen2", dtype)


def check_head(causal: PreTrainedModel) -> None:
    """Check that a decoder's logits are what a head of ours makes of its hidden states.

    Raises:
        CapabilityError: They are not.
    """
    from nvila.language_head import build_head

    name = causal.config.model_type
    given: Any = causal.get_output_embeddings()
    if not isinstance(given, nn.Linear) or getattr(given, "bias", None) is not None:
        raise CapabilityError(f"the head of '{name}' is no plain linear layer", "use another language model")
    with torch.device("meta"):
        head = build_head(causal.config)
    head.weight = given.weight
    ids = torch.arange(4, device=given.weight.device).unsqueeze(0) % given.out_features
    training = causal.training
    with torch.inference_mode():
        causal.eval()
        expected = causal(input_ids=ids, use_cache=False).logits
        found = head(causal.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    causal.train(training)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise CapabilityError(f"'{name}' treats its logits in a way that is not known here", "use another one")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, num_time_tokens: int = 0) -> list[int]:
    """Give a tokenizer the turn, media, padding and time tokens that it lacks, and the chat template.

    Returns:
        Ids of the time tokens.
    """
    known = tokenizer.get_vocab()
    wanted = [token for token in (TURN_START, TURN_END, IMAGE_TOKEN, VIDEO_TOKEN) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": _PAD})
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = RELEASED_CHAT_TEMPLATE
    return add_time_tokens(tokenizer, num_time_tokens) if num_time_tokens else []


def resize_rows(causal: PreTrainedModel, num_words: int, size: int) -> None:
    """Resize both embeddings to `size` rows; rows beyond the `num_words` that had a token become their mean."""
    embedding = cast("nn.Embedding", causal.get_input_embeddings())
    head = cast("nn.Linear", causal.get_output_embeddings())
    tied = head.weight is embedding.weight
    embedding.weight = _resized(embedding.weight, num_words, size)
    embedding.num_embeddings = size
    if embedding.padding_idx is not None and embedding.padding_idx >= size:
        embedding.padding_idx = None
    head.weight = embedding.weight if tied else _resized(head.weight, num_words, size)
    head.out_features = size
    causal.config.vocab_size = size


def join(config: NVILAConfig, tower: PreTrainedModel, causal: PreTrainedModel) -> NVILAForConditionalGeneration:
    """Put existing modules into a new model; only the projector gets new weights."""
    with torch.device("meta"):  # no memory for what is replaced
        model = NVILAForConditionalGeneration(config)
    head = cast("nn.Linear", causal.get_output_embeddings())
    projector = MultimodalProjector(config.mm_projector_type, config.mm_channels, config.text_config.hidden_size)
    std = getattr(config.text_config, "initializer_range", 0.02)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
    model.model.vision_tower = tower
    model.model.mm_projector = projector.to(head.weight.device, head.weight.dtype)
    model.model.language_model = causal.base_model
    model.lm_head.weight = head.weight
    model.tie_weights()
    model.eval()
    return model


def byte_tokenizer(config: NVILAConfig) -> PreTrainedTokenizerFast:
    """Build a tokenizer that knows bytes and the special tokens of a configuration, under its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # In this order the bytes have the ids 0 to 255 of every tokenizer of GPT-2's line, Qwen's among them.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    special = {IMAGE_TOKEN: config.image_token_id, VIDEO_TOKEN: config.video_token_id}
    text = config.text_config
    special[TURN_END] = text.eos_token_id if isinstance(text.eos_token_id, int) else text.eos_token_id[0]
    special[TURN_START] = special[TURN_END] - 1
    special[_PAD] = text.pad_token_id
    times = {config.time_token_format.replace("{t}", str(t)): id_ for t, id_ in enumerate(config.time_token_ids)}
    backend = Tokenizer(models.BPE({**vocabulary, **special, **times}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=_PAD,
        additional_special_tokens=[TURN_START, IMAGE_TOKEN, VIDEO_TOKEN],
        chat_template=RELEASED_CHAT_TEMPLATE,
        model_max_length=getattr(config, "model_max_length", 8192),
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in times])
    return tokenizer


def _load(part: Part, auto: Any, default_type: str, dtype: torch.dtype | None) -> PreTrainedModel:
    if isinstance(part, PreTrainedModel):
        return part
    if isinstance(part, str | Path):
        if not Path(part).is_dir():
            raise ConfigError(f"{part} is no folder", "download the checkpoint first and pass its folder")
        options = {} if dtype is None else {"dtype": dtype}
        return cast("PreTrainedModel", auto.from_pretrained(part, local_files_only=True, **options))
    if isinstance(part, Mapping):
        raw = dict(part)
        part = AutoConfig.for_model(raw.pop("model_type", default_type), **raw)
    model = auto.from_config(deepcopy(part))
    return cast("PreTrainedModel", model if dtype is None else model.to(dtype))


def _resized(weight: Tensor, num_words: int, size: int) -> nn.Parameter:
    if len(weight) == size and num_words >= size:
        return cast("nn.Parameter", weight)
    kept = min(num_words, size, len(weight))
    with torch.no_grad():
        mean = weight[:kept].float().mean(0, keepdim=True).to(weight.dtype)
        rows = torch.cat([weight[:kept], mean.expand(size - kept, -1)])
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
