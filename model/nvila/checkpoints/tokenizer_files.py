"""The files beside the weights: tokenizer, generation settings, image processor, licence.

Our layout holds a processor made for our classes. The tokenizer files it was made from stay beside it, unchanged, so
that converting back gives them back.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.checkpoints.documents import documents_of
from nvila.checkpoints.layouts import HF, NVILA, VILA
from nvila.checkpoints.shards import read_json, write_json
from nvila.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nvila.configuration import NVILAConfig

KEPT_FOLDER = "source_files"
SENTINEL_TOKEN = "<vila/sentinel>"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# Where each layout keeps the tokenizer and the settings of the image processor.
_TOKENIZER_FOLDER = {NVILA: "", VILA: "llm", HF: ""}
_PREPROCESSOR_FOLDER = {NVILA: KEPT_FOLDER, VILA: "vision_tower", HF: ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """What the configuration has to know of a tokenizer.

    Attributes:
        fields: Fields of `NVILAConfig` with ids of tokens.
        length: Number of tokens, so the least number of embedding rows.
        added: Media tokens that were missing.
    """

    fields: dict[str, int]
    length: int
    added: list[str]


def tokenizer_folder(layout: str, root: Path) -> Path:
    """Return where a checkpoint keeps its tokenizer."""
    return root / _TOKENIZER_FOLDER[layout]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from files, never from the network and never with code that lies beside it.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} is missing", "add the files of the tokenizer")
    with tempfile.TemporaryDirectory() as alone:
        # Beside a config.json, transformers prefers the class that it knows for that model to the one that was saved.
        _copy(folder, Path(alone), TOKENIZER_FILES)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                alone, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # the Rust tokenizer raises plain Exception
            raise CheckpointError(f"cannot load the tokenizer in {folder}: {e}", "download its files again") from e
    return tokenizer


def media_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the fields of the media tokens that a tokenizer has."""
    from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN

    known = tokenizer.get_vocab()
    names = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    return {field: known[token] for field, token in names.items() if token in known}


def add_media_tokens(tokenizer: PreTrainedTokenizerBase, *, sentinel: bool) -> TokenFacts:
    """Add media tokens that are missing, in the order in which the original code does.

    Args:
        tokenizer: Changed in place.
        sentinel: Whether the model is to have the original code's mark of answers, which ours does without.

    Raises:
        CheckpointError: The tokenizer has no single token for a line feed.
    """
    from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN

    known = tokenizer.get_vocab()
    wanted = [*([SENTINEL_TOKEN] if sentinel else []), IMAGE_TOKEN, VIDEO_TOKEN]
    missing = [token for token in wanted if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    line_feed = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(line_feed) != 1:
        raise CheckpointError(
            f"the tokenizer writes a line feed as {len(line_feed)} tokens", "use a tokenizer with a token for it"
        )
    ids = {**media_token_ids(tokenizer), "image_end_token_id": line_feed[0]}
    return TokenFacts(fields=ids, length=len(tokenizer), added=missing)


def copy_files(layout: str, root: Path, to: str, out: Path, *, kept: bool) -> None:
    """Copy what is not weights and not configuration of the model.

    Args:
        layout: Layout of the source.
        root: Its folder.
        to: Layout of the target.
        out: Its folder.
        kept: Whether a source in our layout gives back the tokenizer files that it keeps for this.
    """
    tokenizer = root / KEPT_FOLDER if layout == NVILA and kept else tokenizer_folder(layout, root)
    target = out / KEPT_FOLDER if to == NVILA else tokenizer_folder(to, out)
    _copy(tokenizer, target, TOKENIZER_FILES)
    if layout == NVILA and not kept:
        _make_portable(target / "tokenizer_config.json")
    _copy(root / _PREPROCESSOR_FOLDER[layout], out / _PREPROCESSOR_FOLDER[to], (PREPROCESSOR_FILE,))
    _copy(tokenizer_folder(layout, root), tokenizer_folder(to, out), (GENERATION_FILE,))
    _copy(root, out, tuple(path.name for path in documents_of(root)))


def write_processor(out: Path, config: NVILAConfig, tokenizer: PreTrainedTokenizerBase, *, released: bool) -> None:
    """Write the processor of our layout, and generation settings where the source had none.

    Args:
        out: Where to write.
        config: Configuration of the model.
        tokenizer: Its tokenizer, with the media tokens.
        released: Whether the model comes from the original code, whose template cannot place media among text.
    """
    from nvila.assembly import build_processor
    from nvila.data.tokenizers import RELEASED_CHAT_TEMPLATE

    if released or not tokenizer.chat_template:
        tokenizer.chat_template = RELEASED_CHAT_TEMPLATE
    processor = build_processor(config, tokenizer)
    source = out / KEPT_FOLDER / PREPROCESSOR_FILE
    settings = read_json(source) if source.is_file() else {}
    for part in (processor.image_processor, processor.video_processor):
        part.image_mean = settings.get("image_mean", part.image_mean)
        part.image_std = settings.get("image_std", part.image_std)
    processor.save_pretrained(out)
    if not (out / GENERATION_FILE).is_file():
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        write_json(out / GENERATION_FILE, {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad})


def write_preprocessor(out: Path, image_size: int) -> None:
    """Write the settings of a SigLIP image processor, where the source had none."""
    path = out / PREPROCESSOR_FILE
    if not path.exists():
        settings = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        }
        write_json(path, settings)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _make_portable(path: Path) -> None:
    """Name a class that other versions of transformers know, and no processor of ours."""
    config = read_json(path)
    config.pop("processor_class", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)
