"""The whole lifecycle as one Kubeflow pipeline."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import Any, List  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.check import check
from nvila_pipelines.components.curate import curate
from nvila_pipelines.components.data import data
from nvila_pipelines.components.evaluate import evaluate
from nvila_pipelines.components.finish import finish
from nvila_pipelines.components.gate import gate
from nvila_pipelines.components.quantize import quantize
from nvila_pipelines.components.register import register
from nvila_pipelines.components.serve import serve
from nvila_pipelines.components.train import train
from nvila_pipelines.graphs.profile import Profile


def build(profile: Profile) -> Any:
    """Return the pipeline with its tasks placed as a profile says."""
    place = profile.place

    @dsl.pipeline(
        name="nvila-lifecycle",
        description="Curate, train in stages, quantize, evaluate, and - when the gate agrees - register and serve.",
    )
    def lifecycle(
        recipe: str = "quickstart",
        overrides: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
        seed: str = "",
        min_accuracy: str = "",
        register_as: str = "",
        run_id: str = "",
        nodes: int = 0,
        gpus_per_node: int = 0,
    ) -> None:
        """Run the lifecycle of one recipe.

        Args:
            recipe: WHAT: name of a built-in recipe, or a resolved one as JSON (`nvila run RECIPE --dry-run --json`).
            overrides: WHAT: fields of the recipe to change, as a list, such as ["train.precision=bf16"].
            seed: WHAT: seed of everything that is drawn; empty leaves the recipe's.
            min_accuracy: GATE: accuracy from 0 to 1 that the quantized model must reach; empty leaves the recipe's.
            register_as: RESULT: name in the model registry; empty leaves the recipe's.
            run_id: RESULT: name of the run, under which reports are filed; empty takes Kubeflow's.
            nodes: HOW: nodes of the training job; 0 leaves the profile's.
            gpus_per_node: HOW: GPUs of each of them, with one process each; 0 leaves the profile's.
        """
        this = {"job": dsl.PIPELINE_JOB_NAME_PLACEHOLDER, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        size = f"{nodes}x{gpus_per_node}"
        ending = place(finish(run_id=run_id, **this), "finish")
        with dsl.ExitHandler(ending, name="every step"):
            checked = place(
                check(
                    recipe=recipe,
                    **this,
                    run_id=run_id,
                    overrides=overrides,
                    seed=seed,
                    min_accuracy=min_accuracy,
                    register_as=register_as,
                    size=size,
                ),
                "check",
            )
            common = {"recipe": checked.outputs["recipe"], "run_id": checked.outputs["run_id"]}
            source = place(data(**common), "data").outputs["result"]
            selection = place(curate(**common, data=source), "curate").outputs["result"]
            wide = place(train(**common, size=size, data=source, selection=selection), "train").outputs["result"]
            small = place(quantize(**common, data=source, model=wide), "quantize").outputs["result"]
            wide_scores = place(evaluate(**common, data=source, model=wide), "evaluate")
            small_scores = place(evaluate(**common, data=source, model=small), "evaluate")
            verdict = place(
                gate(**common, wide=wide_scores.outputs["result"], quantized=small_scores.outputs["result"]), "gate"
            )
            with dsl.If(verdict.outputs["Output"] == True, name="gate passed"):  # noqa: E712  # compiled into a condition
                version = place(register(**common, model=small, verdict=verdict.outputs["result"]), "register")
                place(serve(**common, data=source, model=small, registration=version.outputs["result"]), "serve")

    return lifecycle
