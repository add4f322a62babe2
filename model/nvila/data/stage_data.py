"""Opening the data of a training stage: from a mixture of data sets to micro-batches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from nvila.data.feeding import BadMedia, BatchFeed, read_bad_media
from nvila.data.media_tiles import MediaReader, StageTiling, stage_processor
from nvila.data.readers.locations import FileSystems
from nvila.data.readers.record import CountedStream
from nvila.data.sample_encoding import SampleEncoder
from nvila.data.sample_store import QUARANTINE, SampleStore, build_store
from nvila.data.token_budget import TokenBudget, TokenBudgetSampler
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class StageData:
    """What a stage learns from, and how.

    Args:
        expression: Data sets: a name, a path, or a mixture of them (`nvila.data.mixtures`).
        budget: What goes into a step.
        tiling: How images are cut; None as the model does.
        num_frames: Frames of a video; None as the model does.
        max_bad: Largest share of samples that may be unusable.
        label_quirk: Labels as the reference code masks them.
        seed: Fixes the order.
    """

    expression: str
    budget: TokenBudget
    tiling: StageTiling | None = None
    num_frames: int | None = None
    max_bad: float = 0.01
    label_quirk: bool = False
    seed: int = 0


def open_stage_data(
    stage: StageData,
    stream: CountedStream,
    processor: NVILAProcessor,
    directory: Path,
    *,
    rank: int = 0,
    world: int = 1,
    filesystems: FileSystems | None = None,
    reporter: Reporter = SILENT,
) -> BatchFeed:
    """Index the data of a stage, unless that was done before, and open it for one process.

    Args:
        stage: What to open.
        stream: What the expression of the stage names.
        processor: The model's processor.
        directory: Where indices of data go.
        rank: This process.
        world: Number of processes.
        filesystems: File systems besides local files.
        reporter: Receives progress and what was set aside.

    Raises:
        ConfigError: The budget cannot be used, or not even one image fits into a row.
        DataError: The data cannot be read, or too much of it cannot be used.
        InfrastructureError: A service that has data does not answer.
    """
    own = stage_processor(processor, tiling=stage.tiling, num_frames=stage.num_frames)
    reader = MediaReader(own)
    reader.check_room(stage.budget.max_length)
    encoder = SampleEncoder(own.tokenizer, reader, stage.budget.max_length, label_quirk=stage.label_quirk)
    folder = index_folder(stage, own, directory)
    store = build_store(
        stream, reader, encoder, folder, max_bad=stage.max_bad, filesystems=filesystems, reporter=reporter
    )
    if store.num_bad and rank == 0:
        reporter.notice(
            f"{store.num_bad} of {len(store) + store.num_bad} samples of {stage.expression} cannot be used and are "
            f"left out; {folder / QUARANTINE} says why"
        )
    bad = BadMedia(folder, total=len(store) + store.num_bad, known=store.num_bad, max_bad=stage.max_bad, rank=rank)
    sampler = TokenBudgetSampler(store.sizes, stage.budget, seed=stage.seed, rank=rank, world=world)
    pad = own.tokenizer.pad_token_id
    return BatchFeed(
        store, sampler, encoder, reader, pad_token_id=own.tokenizer.eos_token_id if pad is None else pad, bad=bad
    )


def index_folder(stage: StageData, processor: NVILAProcessor, directory: Path) -> Path:
    """Return the folder of a stage's index, which has another name for everything that the index depends on."""
    facts = {
        "data": stage.expression,
        "max_length": stage.budget.max_length,
        "max_bad": stage.max_bad,
        "label_quirk": stage.label_quirk,
        "tiling": asdict(processor.image_processor.tiling),
        "frames": [processor.video_processor.num_frames, processor.video_processor.fps],
        "tokens": [processor.num_image_tokens, processor.video_pool_sizes],
        "words": processor.tokenizer.get_vocab(),
        "template": processor.tokenizer.chat_template,
    }
    return directory / hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def quarantine_of(folder: Path) -> list[dict[str, object]]:
    """Return everything that was set aside: first what indexing found, then what turned up in training."""
    lines = (folder / QUARANTINE).read_text(encoding="utf-8").splitlines()
    return [*(json.loads(line) for line in lines), *read_bad_media(folder)]


def tile_positions(model: NVILAForConditionalGeneration) -> int:
    """Estimate how many positions of the decoder cost as much work as one tile in the tower.

    Work is proportional to parameters times positions, attention aside. Ask before parameters are partitioned.
    """
    tower = model.model.vision_tower
    blocks = tower.encoder.layers[: model.config.num_vision_blocks]
    embeddings = sum(parameter.numel() for parameter in model.model.get_input_embeddings().parameters())
    decoder = _num_parameters(model.model.language_model) - embeddings
    patches: int = (model.config.tile_size // model.config.vision_config.patch_size) ** 2
    positions: int = round(patches * _num_parameters(blocks) / max(1, decoder))
    return positions


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


__all__ = ["SampleStore", "StageData", "index_folder", "open_stage_data", "quarantine_of", "tile_positions"]
