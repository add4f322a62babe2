"""What a model must reach to be deployed: a YAML file that people agree on, and that a gate only applies."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nvila.errors import ConfigError, nearest
from nvila.yaml_text import parse_yaml

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CategoryLimits(_Strict):
    """Limits of one category of a task, in the task's metric.

    Args:
        min_score: Least value.
        max_drop: Largest loss against the live model on the same samples.
    """

    min_score: float | None = None
    max_drop: Annotated[float, Field(ge=0)] | None = None


class TaskLimits(CategoryLimits):
    """Limits of a task.

    Args:
        metric: Which metric they are about; None is the task's main one.
        min_samples: Least number of samples with a score; None takes the policy's.
        max_failed: Largest share of samples without a score; None takes the policy's.
        categories: Limits by category.
    """

    metric: str | None = None
    min_samples: Annotated[int, Field(ge=1)] | None = None
    max_failed: Share | None = None
    categories: dict[str, CategoryLimits] = Field(default_factory=dict)


class LatencyLimits(_Strict):
    """Limits of the time of a whole answer, questions asked one by one.

    Args:
        p50_ms: Median.
        p95_ms: 95th percentile.
        questions: How many are timed, after one that is not.
    """

    p50_ms: Positive | None = None
    p95_ms: Positive | None = None
    questions: Annotated[int, Field(ge=1)] = 20


class SizeLimits(_Strict):
    """Limits of the weights on disk.

    Args:
        max_mib: Largest size.
        max_ratio: Largest size over that of the live model.
    """

    max_mib: Positive | None = None
    max_ratio: Positive | None = None


class LiveLimits(_Strict):
    """Limits of what users get while a new model takes a share of the traffic; `nvila deploy` applies them.

    Args:
        max_error_rate: Largest share of requests that the server fails on.
        ttft_p95_ms: 95th percentile of the time to the first token.
        max_ttft_ratio: Largest such time over that of the live model, at the same time.
        min_requests: Least number of requests that are enough to judge.
    """

    max_error_rate: Share | None = None
    ttft_p95_ms: Positive | None = None
    max_ttft_ratio: Positive | None = None
    min_requests: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _limits_something(self) -> LiveLimits:
        if self.max_error_rate is None and self.ttft_p95_ms is None and self.max_ttft_ratio is None:
            raise ValueError("nothing is limited; name max_error_rate, ttft_p95_ms or max_ttft_ratio")
        return self


class Policy(_Strict):
    """A whole policy.

    Args:
        against: Live model that losses are measured against, such as `models:/nvila@champion`.
        min_samples: Least number of samples with a score, of every task.
        max_failed: Largest share of samples without a score, of every task.
        max_drop: Largest loss against the live model, of every task that names none.
        surely: Losses must stay below their limits with the whole 95% interval, not with the value alone. A loss that
            few samples cannot exclude then refuses too.
        tasks: Limits by task.
        latency: Limits of time.
        size: Limits of size.
        live: Limits of a rollout.
    """

    against: str | None = None
    min_samples: Annotated[int, Field(ge=1)] = 1
    max_failed: Share = 0.1
    max_drop: Annotated[float, Field(ge=0)] | None = None
    surely: bool = False
    tasks: Annotated[dict[str, TaskLimits], Field(min_length=1)] = Field(default_factory=dict)
    latency: LatencyLimits | None = None
    size: SizeLimits | None = None
    live: LiveLimits | None = None

    def drop_limit(self, task: str) -> float | None:
        """Return how much a task may lose."""
        own = self.tasks[task].max_drop
        return self.max_drop if own is None else own

    @property
    def compares(self) -> bool:
        """Whether anything is measured against the live model."""
        limits = [self.drop_limit(task) for task in self.tasks]
        limits += [limit.max_drop for task in self.tasks.values() for limit in task.categories.values()]
        return any(limit is not None for limit in limits) or (self.size is not None and self.size.max_ratio is not None)


_SECTIONS: dict[str, type[BaseModel]] = {"latency": LatencyLimits, "size": SizeLimits, "live": LiveLimits}


def parse_policy(text: str, where: str) -> Policy:
    """Read a policy.

    Args:
        text: YAML.
        where: Its file, for messages.

    Raises:
        ConfigError: With the field, what is wrong with it, and the nearest name.

    Example:
        >>> parse_policy("tasks: {chartqa: {min_score: 0.7}}", "policy.yaml").tasks["chartqa"].min_score
        0.7
    """
    raw = parse_yaml(text, where=where)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is no policy", "write at least: tasks: {TASK: {min_score: 0.8}}")
    try:
        policy = Policy.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            hint = nearest(place[-1], _section(place).model_fields)
            raise ConfigError(f"{where}: there is no field '{'.'.join(place)}'", hint) from e
        problem = f"{where}: {'.'.join(place)} is {first['input']!r}: {first['msg'].lower()}"
        raise ConfigError(problem, "correct the value") from e
    if not policy.tasks and policy.live is None:
        raise ConfigError(f"{where}: the field 'tasks' is missing", "name the tasks that count")
    return policy


def _section(place: list[str]) -> type[BaseModel]:
    if place[0] == "tasks":
        return CategoryLimits if "categories" in place else TaskLimits
    return _SECTIONS.get(place[0], Policy) if len(place) > 1 else Policy
