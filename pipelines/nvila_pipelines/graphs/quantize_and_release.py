"""From a registered wide model to a released quantized one."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import Any, List  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.deploy_model import deploy_model
from nvila_pipelines.components.finish import finish
from nvila_pipelines.components.gate_model import gate_model
from nvila_pipelines.components.promote import promote
from nvila_pipelines.components.quantize_model import quantize_model
from nvila_pipelines.graphs.profile import Profile

POLICY = "tasks: {easy_vqa: {min_score: 0.9}}"


def build(profile: Profile) -> Any:
    """Return the pipeline with its tasks placed as a profile says."""
    place = profile.place

    @dsl.pipeline(
        name="nvila-quantize-and-release",
        description="Quantize a registered model and, when the gate agrees, make it champion or roll it out.",
    )
    def quantize_and_release(
        model: str = "models:/nvila-tuned@candidate",
        data: str = "",
        register_as: str = "nvila",
        policy: str = POLICY,
        alias: str = "champion",
        deploy_as: str = "",
        quantize_options: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
        gate_options: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
        deploy_options: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
    ) -> None:
        """Quantize and release.

        Args:
            model: WHAT: wide model, models:/NAME@ALIAS.
            data: WHAT: samples to calibrate and measure on; empty rounds to nearest and measures nothing.
            register_as: RESULT: name in the model registry.
            policy: GATE: the policy as YAML text (`nvila gate --help` shows one).
            alias: RESULT: alias that a model which passed gets; one that is deployed, once it serves.
            deploy_as: RESULT: endpoint on this cluster that it is rolled out to; empty for none.
            quantize_options: HOW: more words of `nvila quantize`, as a list.
            gate_options: GATE: more words of `nvila gate`, as a list.
            deploy_options: RESULT: more words of `nvila deploy`, as a list.
        """
        this = {"job": dsl.PIPELINE_JOB_NAME_PLACEHOLDER, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        ending = place(finish(run_id="", **this), "finish")
        with dsl.ExitHandler(ending, name="every step"):
            small = quantize_model(model=model, data=data, register_as=register_as, options=quantize_options, **this)
            place(small, "quantize-model")
            version = small.outputs["Output"]
            verdict = gate_model(model=version, policy=policy, options=gate_options, **this)
            place(verdict, "gate-model")
            with dsl.If(verdict.outputs["Output"] == True, name="gate passed"):  # noqa: E712  # compiled into a condition
                with dsl.If(deploy_as == "", name="registry alone"):
                    place(promote(model=version, alias=alias), "promote")
                with dsl.Else(name="endpoint"):
                    rollout = deploy_model(
                        model=version, name=deploy_as, alias=alias, policy=policy, options=deploy_options, **this
                    )
                    place(rollout, "deploy-model")

    return quantize_and_release
