"""What can be known to be wrong with a training run before minutes of work are spent on it."""

from __future__ import annotations

from nvila.errors import ConfigError
from nvila_pipelines.recipe import Recipe


def check_trainable(recipe: Recipe) -> None:
    """Check that a recipe names its data, and that this machine can do what it asks for.

    Raises:
        ConfigError: A stage names no data, has no room for an image, or a base model is no folder.
        CapabilityError: FP8 is asked of a backend that is not here, or a base model is of a kind that does not fit.
        CheckpointError: A base model cannot be read.
    """
    for name, stage in recipe.train.stages.items():
        if stage.data is None:
            raise ConfigError(
                f"train.stages.{name}.data is not set: recipe {recipe.name} leaves the data to you",
                f"add data.registry=FILE train.stages.{name}.data=NAME, or try the tiny twin with --tiny",
            )
    from nvila.base_models import with_local_bases
    from nvila.training.planning.plan import check_room
    from nvila.training.precision import choose_backend

    config = recipe.train_config()
    if config.precision.name == "fp8":
        choose_backend(config.precision.fp8)
    check_room(config.model, config.stages)
    with_local_bases(config.model)
