"""Training alone: data, curation, all stages, and the scores of the result."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import Any, List  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.check import check
from nvila_pipelines.components.curate import curate
from nvila_pipelines.components.data import data
from nvila_pipelines.components.evaluate import evaluate
from nvila_pipelines.components.finish import finish
from nvila_pipelines.components.train import train as train_stages
from nvila_pipelines.graphs.profile import Profile


def build(profile: Profile) -> Any:
    """Return the pipeline with its tasks placed as a profile says."""
    place = profile.place

    @dsl.pipeline(name="nvila-train", description="Curate, train in stages and evaluate; nothing is registered.")
    def train(
        recipe: str = "quickstart",
        overrides: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
        seed: str = "",
        run_id: str = "",
        nodes: int = 0,
        gpus_per_node: int = 0,
    ) -> None:
        """Train the model of a recipe.

        Args:
            recipe: WHAT: name of a built-in recipe, or a resolved one as JSON (`nvila train RECIPE --dry-run --json`).
            overrides: WHAT: fields of the recipe to change, as a list, such as ["train.precision=bf16"].
            seed: WHAT: seed of everything that is drawn; empty leaves the recipe's.
            run_id: RESULT: name of the run; empty takes Kubeflow's.
            nodes: HOW: nodes of the training job; 0 leaves the profile's.
            gpus_per_node: HOW: GPUs of each of them, with one process each; 0 leaves the profile's.
        """
        this = {"job": dsl.PIPELINE_JOB_NAME_PLACEHOLDER, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        size = f"{nodes}x{gpus_per_node}"
        ending = place(finish(run_id=run_id, **this), "finish")
        with dsl.ExitHandler(ending, name="every step"):
            asked = check(
                recipe=recipe,
                **this,
                run_id=run_id,
                overrides=overrides,
                seed=seed,
                size=size,
            )
            checked = place(asked, "check")
            common = {"recipe": checked.outputs["recipe"], "run_id": checked.outputs["run_id"]}
            source = place(data(**common), "data").outputs["result"]
            selection = place(curate(**common, data=source), "curate").outputs["result"]
            wide = place(train_stages(**common, size=size, data=source, selection=selection), "train").outputs["result"]
            place(evaluate(**common, data=source, model=wide), "evaluate")

    return train
