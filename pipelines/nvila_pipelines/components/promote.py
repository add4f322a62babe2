"""Kubeflow component: promote."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote(
    model: str,
    alias: str,
) -> str:
    """Move an alias of the registry to a version; what was champion becomes `previous`.

    Args:
        model: Address of the version.
        alias: Alias to move.

    Returns:
        Address of the version by number.
    """
    from nvila_pipelines.steps.verb import move_alias

    return move_alias(model, alias)
