"""What curation made of the data that a run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nvila_pipelines.training.mixtures import REGISTRY_FILE

if TYPE_CHECKING:
    from nvila.data.mixtures import Registry
    from nvila.data.readers.locations import FileSystems
    from nvila.data.selection_counts import CurationCounts
    from nvila.training.config import TrainConfig

# What the train step calls its own data where the data are a built-in set.
_OWN = frozenset({"selected", "captions", "text", "clips"})


def curation_counts(
    config: TrainConfig, data: Path, selection: Path, registry: Registry, filesystems: FileSystems
) -> CurationCounts:
    """Count what the selections behind the data of all stages keep, drop and set aside.

    Args:
        config: The training run.
        data: Data artifact.
        selection: What the step before training left; without curation there is no table in it.
        registry: Names of data sets, which may bring selections along.
        filesystems: File systems by scheme besides local files.

    Raises:
        ConfigError: A name is unknown.
        DataError: A selection cannot be read.
    """
    from nvila.data.readers.locations import locate
    from nvila.data.selection_counts import count_selections

    own = frozenset() if (data / REGISTRY_FILE).is_file() else _OWN
    named = dict.fromkeys(stage.data for stage in config.stages if stage.data not in own)
    leaves = [leaf for name in named for leaf in registry.expand(name)]
    return count_selections([locate(str(selection), filesystems), *(one for leaf in leaves for one in leaf.selections)])
