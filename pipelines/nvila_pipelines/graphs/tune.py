"""Tuning a registered model on data of one's own."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import Any, List  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.finish import finish
from nvila_pipelines.components.tune_model import tune_model
from nvila_pipelines.graphs.profile import Profile


def build(profile: Profile) -> Any:
    """Return the pipeline with its tasks placed as a profile says."""
    place = profile.place

    @dsl.pipeline(name="nvila-tune", description="Tune a model on your own data and register it as candidate.")
    def tune(
        data: str,
        model: str = "models:/nvila@champion",
        method: str = "ln+lora",
        register_as: str = "nvila-tuned",
        options: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
    ) -> None:
        """Tune a model.

        Args:
            data: WHAT: file, folder, s3:// address or mixture of image-text samples.
            model: WHAT: base, models:/NAME@ALIAS.
            method: HOW: VISION+LANGUAGE, each frozen, ln, lora, qlora, dora or full.
            register_as: RESULT: name in the model registry.
            options: HOW: more words of `nvila tune`, as a list, such as ["--epochs", "2"].
        """
        this = {"job": dsl.PIPELINE_JOB_NAME_PLACEHOLDER, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        ending = place(finish(run_id="", **this), "finish")
        with dsl.ExitHandler(ending, name="every step"):
            tuned = tune_model(model=model, data=data, method=method, register_as=register_as, options=options, **this)
            place(tuned, "tune-model")

    return tune
