"""What Kubeflow calls a run, and what we call it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_OF_ID = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineJob:
    """A run, as Kubeflow names it.

    Args:
        name: What it is called in the UI; other runs may be called the same.
        id: Its id, which no other run has; empty where there is none.
    """

    name: str
    id: str = ""


def run_name(job: PipelineJob, run_id: str = "") -> str:
    """Return the name of a run, under which its folder and its run in MLflow are found; every task asks here.

    Args:
        job: What Kubeflow calls it.
        run_id: Name that the user gave it; empty takes Kubeflow's, with the beginning of the id.
    """
    words = [run_id] if run_id else [job.name, job.id[:_OF_ID]]
    return _UNSAFE.sub("-", "-".join(filter(None, words))).strip("-.")
