"""Measuring what is deployed, as its clients see it; made to be run again and again."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import Any, List  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.evaluate_model import evaluate_model
from nvila_pipelines.components.finish import finish
from nvila_pipelines.graphs.profile import Profile


def build(profile: Profile) -> Any:
    """Return the pipeline with its tasks placed as a profile says."""
    place = profile.place

    @dsl.pipeline(name="nvila-evaluate-endpoint", description="Measure an endpoint, or a model, on benchmark tasks.")
    def evaluate_endpoint(
        endpoint: str,
        tasks: str = "builtin",
        options: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
    ) -> None:
        """Evaluate an endpoint.

        Args:
            endpoint: WHAT: address of an OpenAI endpoint, or models:/NAME@ALIAS.
            tasks: WHAT: names and tags of tasks, separated by commas.
            options: HOW: more words of `nvila evaluate`, as a list, such as ["--limit", "200"].
        """
        this = {"job": dsl.PIPELINE_JOB_NAME_PLACEHOLDER, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        ending = place(finish(run_id="", **this), "finish")
        with dsl.ExitHandler(ending, name="every step"):
            measured = evaluate_model(model=endpoint, tasks=tasks, options=options, **this)
            place(measured, "evaluate-model")

    return evaluate_endpoint
