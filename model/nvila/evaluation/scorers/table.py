"""The scorers by the names that task files use."""

from __future__ import annotations

from importlib.metadata import entry_points

from nvila.errors import CapabilityError, ConfigError, nearest
from nvila.evaluation.scorers.actions import EXPERT_TRIGGER, NAVIGATION_ACTION
from nvila.evaluation.scorers.anls import ANLS
from nvila.evaluation.scorers.chexpert import CHEXPERT
from nvila.evaluation.scorers.choices import CHOICE, CHOICE_OR_TEXT
from nvila.evaluation.scorers.contract import Scorer
from nvila.evaluation.scorers.exact import EXACT
from nvila.evaluation.scorers.mathvista import MATHVISTA
from nvila.evaluation.scorers.medical import MEDICAL_VQA
from nvila.evaluation.scorers.mmmu import MMMU
from nvila.evaluation.scorers.navigation import NAVIGATION
from nvila.evaluation.scorers.ocrbench import OCRBENCH
from nvila.evaluation.scorers.open_video import OPEN_VIDEO
from nvila.evaluation.scorers.overlap import REPORT
from nvila.evaluation.scorers.pope import POPE
from nvila.evaluation.scorers.relaxed import RELAXED
from nvila.evaluation.scorers.temporal import TEMPORAL, TIME_SPAN
from nvila.evaluation.scorers.vqa import TEXT_VQA, VQA

SCORERS: dict[str, Scorer] = {
    "anls": ANLS,
    "chexpert_f1": CHEXPERT,
    "choice_or_text": CHOICE_OR_TEXT,
    "exact_match": EXACT,
    "expert_trigger": EXPERT_TRIGGER,
    "mathvista": MATHVISTA,
    "medical_vqa": MEDICAL_VQA,
    "mmmu": MMMU,
    "multiple_choice": CHOICE,
    "navigation": NAVIGATION,
    "navigation_action": NAVIGATION_ACTION,
    "ocrbench": OCRBENCH,
    "open_video": OPEN_VIDEO,
    "pope": POPE,
    "relaxed_accuracy": RELAXED,
    "report": REPORT,
    "temporal": TEMPORAL,
    "text_vqa": TEXT_VQA,
    "time_span": TIME_SPAN,
    "vqa": VQA,
}
# Other packages add scorers here: a name, and the module and attribute of a `Scorer`.
ENTRY_POINTS = "nvila.scorers"


def find_scorer(name: str, where: str) -> Scorer:
    """Return a scorer.

    Args:
        name: One of `SCORERS`, or what an installed package offers.
        where: Task that wants it, for messages.

    Raises:
        ConfigError: There is none of this name.
        CapabilityError: A package offers something else under it.
    """
    if name in SCORERS:
        return SCORERS[name]
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        raise ConfigError(f"{where}: there is no scorer '{name}'", nearest(name, [*SCORERS, *offered]))
    found = offered[name].load()
    if not isinstance(found, Scorer):
        raise CapabilityError(
            f"the scorer '{name}' of {offered[name].value} is a {type(found).__name__}", "offer a Scorer"
        )
    return found
