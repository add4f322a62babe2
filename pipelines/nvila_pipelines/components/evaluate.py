"""Kubeflow component: evaluate."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    model: Input[Model],
    confusion: Output[ClassificationMetrics],
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> None:
    """Answer every question of a split and score the answers.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set with the questions.
        model: The model to evaluate.
        confusion: Which answers the model takes for which.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to scores and predictions in the artifact store.
    """
    from nvila_pipelines.steps.component import run_evaluation

    run_evaluation(recipe, run_id, {"data": data.path, "model": model.path}, result, metrics, report, confusion)
