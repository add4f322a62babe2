"""One process that scores its share of a data set, started by a launcher or being a rank of torchrun."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nvila_pipelines.curation.spec import ScoringSpec, open_stream

if TYPE_CHECKING:
    from nvila.curation.scorers import DType, Scorer
    from nvila.curation.scoring_run import ScoringRun, Size
    from nvila.curation.shards import Shards
    from nvila.progress import Reporter


def shards_of(out: Path, spec: ScoringSpec) -> Shards:
    """Return the shards of a directory."""
    from nvila.curation.shards import SHARDS, Shards

    return Shards(directory=out / SHARDS, size=spec.shard_size, digest=spec.digest)


def scoring_run(
    out: Path, spec: ScoringSpec, reporter: Reporter, *, rank: int, world: int, sequential: bool, max_bad: float
) -> ScoringRun:
    """Prepare one process's part of scoring; models are loaded when there is something to score."""
    import torch

    from nvila.curation.scorers import load_scorer, sampling_of
    from nvila.curation.scoring_run import ScoringRun

    _hush()
    torch.set_num_threads(spec.threads)
    folders: dict[Size, Path] = {"small": Path(spec.small), "large": Path(spec.large)}
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if spec.device == "cuda" else spec.device
    samplings = (sampling_of(folder) for folder in folders.values())

    def load(size: Size) -> Scorer:
        return load_scorer(folders[size], dtype=cast("DType", spec.dtype), device=device)

    return ScoringRun(
        stream=open_stream(spec.data),
        load=load,
        samplings=frozenset(sampling for sampling in samplings if sampling is not None),
        shards=shards_of(out, spec),
        batch_tokens=spec.batch_tokens,
        sequential=sequential,
        rank=rank,
        world=world,
        max_bad=max_bad,
        total=spec.records,
        reporter=reporter,
    )


def _hush() -> None:
    """Keep the bars and the notes of libraries out of the progress that is shown."""
    # The tokenizer warns of answers longer than the context, which are set aside with their length.
    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree", "transformers.tokenization_utils_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def own_rank(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun says; (0, 1) without it."""
    values = os.environ if environ is None else environ
    return int(values.get("RANK", "0")), int(values.get("WORLD_SIZE", "1"))


def main(path: str) -> None:
    """Score what a specification for launched processes says."""
    from nvila_platform.telemetry import EventLog

    order = json.loads(Path(path).read_text(encoding="utf-8"))
    out = Path(order["out"])
    spec = ScoringSpec.load(out)
    assert spec is not None, "written before the processes start"
    rank, world = own_rank()
    with EventLog(Path(order["events"]), step=f"curate {rank}" if world > 1 else "curate") as reporter:
        run = scoring_run(
            out, spec, reporter, rank=rank, world=world, sequential=order["sequential"], max_bad=order["max_bad"]
        )
        run.run()
        if order["features"]:
            run.run_features()


if __name__ == "__main__":
    main(sys.argv[1])
