"""What a registered version says about itself: its model card, its licence, and what goes in and comes out.

The card is README.md in the form of the Hugging Face Hub. MLflow shows it as the description of the version, and keeps
it, with the signature in an MLmodel file, among the files of the run that registered it. That file names no way to load
anything: weights are in the artifact store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nvila.checkpoints.documents import Origin, licence_fields
from nvila.licences import UNKNOWN, combined, is_non_commercial

if TYPE_CHECKING:
    from nvila_platform.lineage import Lineage

LICENCE_TAG = "nvila.licence"
BASES_TAG = "nvila.base_models"
SIGNATURE_TAG = "nvila.signature"
CARD_FOLDER = "model"
# A description in MLflow's database holds no more.
_LONGEST = 5000
_ASK = """```python
from openai import OpenAI  # nvila serve models:/{name}@champion

client = OpenAI(base_url="http://127.0.0.1:8080/openai/v1", api_key="none")
picture = {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}
question = {{"type": "text", "text": "What is shown?"}}
messages = [{{"role": "user", "content": [picture, question]}}]
client.chat.completions.create(model="{name}", messages=messages)
```"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model card before it is text.

    Args:
        name: Registered model.
        digest: Digest of the artifact.
        origin: Licence and base models.
        scores: Accuracy from 0 to 1 by what it was measured on.
        figures: Other numbers, such as sizes.
        lineage: Digests of what it was made of, by step.
        code_version: Code that made it.
        quantized: Whether its weights are.
    """

    name: str
    digest: str
    origin: Origin
    scores: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    code_version: str = ""
    quantized: bool = False

    def tags(self) -> dict[str, str]:
        """Return what the version carries of it."""
        bases = {BASES_TAG: ", ".join(self.origin.base_models)} if self.origin.base_models else {}
        return {LICENCE_TAG: self.origin.licence, **bases, SIGNATURE_TAG: json.dumps(signature().to_dict())}

    def description(self) -> str:
        """Return the card without its head, as long as MLflow takes it."""
        text = "\n\n".join(self._sections())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4].rpartition(chr(10))[0]}\n..."

    def text(self) -> str:
        """Return README.md in the form of the Hugging Face Hub."""
        from huggingface_hub import EvalResult, ModelCardData

        licence, licence_name = licence_fields(self.origin.licence)
        results = [
            EvalResult("visual-question-answering", task, task, "accuracy", value)
            for task, value in self.scores.items()
        ]
        data = ModelCardData(
            pipeline_tag="image-text-to-text",
            library_name="nvila",
            base_model=list(self.origin.base_models) or None,
            base_model_relation="quantized" if self.quantized and self.origin.base_models else None,
            # The Hub wants a name beside results.
            model_name=self.name if results else None,
            eval_results=results or None,
            tags=["nvila", "vision-language-model"],
            license=licence,
            license_name=licence_name,
        )
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([f"# {self.name}", *self._sections()]) + "\n"

    def _sections(self) -> list[str]:
        licence = [f"Licence: {self.origin.licence}."]
        if (warning := licence_warning(self.origin.licence)) is not None:
            licence = [f"**{warning}**", *licence]
        if self.origin.base_models:
            licence.append(f"Made from {', '.join(self.origin.base_models)}.")
        sections = [" ".join(licence)]
        if self.scores:
            rows = {task: f"{value:.4f}" for task, value in self.scores.items()}
            sections.append("## Accuracy\n\n" + _table("measured on", "accuracy", rows))
        sections.append("## Inputs and outputs\n\n" + _signature_table())
        if self.figures:
            rows = {name: f"{value:.6g}" for name, value in self.figures.items()}
            sections.append("## Figures\n\n" + _table("what", "value", rows))
        made = {"this model": self.digest[:12], **{step: digest[:12] for step, digest in self.lineage.items()}}
        made["code"] = self.code_version or UNKNOWN
        sections.append("## Made of\n\n" + _table("step", "digest", made))
        return [*sections, "## Ask it\n\n" + _ASK.format(name=self.name)]


def make_card(
    name: str,
    lineage: Lineage,
    weights: Origin,
    *,
    licence: str | None = None,
    scores: Mapping[str, float] | None = None,
    figures: Mapping[str, float] | None = None,
) -> ModelCard:
    """Return the card of an artifact.

    Args:
        name: Registered model.
        lineage: What it was made of; tells the base models where the weights do not.
        weights: What lies beside its weights.
        licence: What the recipe says; None leaves what follows from the base models.
        scores: Accuracy by what it was measured on.
        figures: Other numbers.
    """
    nodes = list(lineage.walk())
    named = [str(node.config[key]) for node in nodes for key in node.config if key.startswith("model.from.")]
    bases = weights.base_models or tuple(dict.fromkeys(named))
    known = [one for one in (licence, weights.licence) if one is not None and one != UNKNOWN]
    forbidding = [one for one in known if is_non_commercial(one)]
    # What a recipe says replaces what follows from the bases, but never takes a restriction away.
    found = combined(forbidding) if forbidding else (known[0] if known else UNKNOWN)
    return ModelCard(
        name=name,
        digest=lineage.digest,
        origin=Origin(licence=found, base_models=bases),
        scores=scores or {},
        figures=figures or {},
        lineage={node.step: node.digest for node in reversed(nodes) if node.step and node.digest != lineage.digest},
        code_version=lineage.code_version,
        quantized=any(node.step == "quantize" for node in nodes),
    )


def licence_warning(licence: str) -> str | None:
    """Return what is to be said before a model under this licence is released; None where it may be used freely.

    Example:
        >>> licence_warning("cc-by-nc-4.0")
        'these weights must not be used commercially: their licence is cc-by-nc-4.0'
        >>> licence_warning("apache-2.0") is None
        True
    """
    if not is_non_commercial(licence):
        return None
    return f"these weights must not be used commercially: their licence is {licence}"


def version_warning(tags: Mapping[str, str]) -> str | None:
    """Return the same about a registered version, from its tags; for whoever deploys it."""
    return licence_warning(tags.get(LICENCE_TAG, UNKNOWN))


def signature() -> Any:
    """Return MLflow's signature of every model of this project: what its V1 and V2 endpoints take and return."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(kind, name, required=name == "prompt") for name, kind in _INPUTS.items()]),
        outputs=Schema([ColSpec(kind, name) for name, kind in _OUTPUTS.items()]),
        params=ParamSchema([ParamSpec("max_tokens", "long", None), ParamSpec("temperature", "double", None)]),
    )


def mlmodel(card: ModelCard, run_id: str, uri: str) -> str:
    """Return the text of the MLmodel file: the signature, and where the weights are."""
    from mlflow.models import Model

    about = {"digest": card.digest, "weights": uri, "licence": card.origin.licence}
    model = Model(artifact_path=CARD_FOLDER, run_id=run_id, signature=signature(), metadata=about)
    # By reference: what could load it is not MLflow's, so there is nothing to unpickle.
    model.add_flavor("nvila", weights=uri)
    return str(model.to_yaml())


# As `serving/model.py` takes and gives them.
_INPUTS = {"prompt": "string", "image": "string", "video": "string"}
_OUTPUTS = {"text": "string", "finish_reason": "string"}


def _signature_table() -> str:
    rows = {f"in: {name}": _ABOUT[name] for name in _INPUTS} | {f"out: {name}": _ABOUT[name] for name in _OUTPUTS}
    return _table("field", "what", rows)


_ABOUT = {
    "prompt": "string: the question",
    "image": "string: `data:` URI, optional",
    "video": "string: `data:` URI, optional",
    "text": "string: the answer",
    "finish_reason": "string: `stop` or `length`",
}


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
