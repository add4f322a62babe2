"""What is compared: a finished evaluation as it stands, or a model that is evaluated now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError

if TYPE_CHECKING:
    from nvila.evaluation.sample_logs import Logged
    from nvila_pipelines.evaluation.request import EvaluationRequest
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView

RequestOf = Callable[[str], "EvaluationRequest"]


def logged_side(word: str, request_of: RequestOf, settings: Settings, view: ProgressView) -> Logged:
    """Return the evaluation that a word names.

    Args:
        word: A result file or a folder with result files, of which the newest counts; else whatever `request_of` takes.
        request_of: Makes the evaluation of a model.
        settings: Where registry and store are.
        view: Draws progress.

    Raises:
        NvilaError: It cannot be read, or the model cannot be evaluated.
    """
    from nvila.evaluation.sample_logs import find_results, read_logged
    from nvila_pipelines.evaluation.run import evaluate

    file = find_results(Path(word))
    if file is None:
        file = evaluate(request_of(word), settings, view).whole(but_skipped=True).file
    return read_logged(file)


def side_names(reference: Logged, candidate: Logged) -> tuple[str, str]:
    """Return how the two are called, told apart where their models have one name."""
    names = [str(side.results.get("model_name") or side.file.parent.name) for side in (reference, candidate)]
    if names[0] != names[1]:
        return names[0], names[1]
    digests = [str(side.results.get("model_digest", ""))[:8] for side in (reference, candidate)]
    return f"{names[0]} {digests[0]}", f"{names[1]} {digests[1]}"


def check_two(words: list[str]) -> tuple[str, str]:
    """Return the two words of a command line.

    Raises:
        ConfigError: There are not two.
    """
    if len(words) != 2:
        raise ConfigError(f"{len(words)} models are named, a comparison needs two", "nvila compare A B --tasks NAMES")
    return words[0], words[1]
