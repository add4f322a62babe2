"""The whole lifecycle as one Kubeflow pipeline."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl

from nvila_pipelines.components.curate import curate
from nvila_pipelines.components.data import data
from nvila_pipelines.components.evaluate import evaluate
from nvila_pipelines.components.gate import gate
from nvila_pipelines.components.quantize import quantize
from nvila_pipelines.components.register import register
from nvila_pipelines.components.serve import serve
from nvila_pipelines.components.train import train


@dsl.pipeline(
    name="nvila-lifecycle",
    description="Curate, train in stages, quantize, evaluate, and - when the gate agrees - register and serve.",
)
def lifecycle(recipe: str, run_id: str) -> None:
    """Run the lifecycle of one recipe.

    Args:
        recipe: The resolved recipe as JSON (`nvila run RECIPE --dry-run --json` prints it).
        run_id: Name of the run; its report and event log are filed under it.
    """
    common = {"recipe": recipe, "run_id": run_id}
    source = data(**common).output
    selection = curate(**common, data=source).output
    wide = train(**common, data=source, selection=selection).output
    small = quantize(**common, data=source, model=wide).output
    wide_scores = evaluate(**common, data=source, model=wide, form="wide")
    small_scores = evaluate(**common, data=source, model=small, form="quantized")
    verdict = gate(**common, wide=wide_scores.output, quantized=small_scores.output)
    with dsl.If(verdict.outputs["Output"] == True, name="gate passed"):  # noqa: E712  # compiled into a condition
        version = register(**common, model=small, verdict=verdict.outputs["result"])
        serve(**common, data=source, model=small, registration=version.output)
