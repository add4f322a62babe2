"""What the sections of a recipe are built from: types of fields, rules between fields, and the base of a section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Names that become folders, registry entries and metric prefixes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists where we have triples.
PoolSize = Annotated[tuple[Count, Count, Count], Field(strict=False)]
PoolSizes = Annotated[tuple[PoolSize, ...], Field(strict=False, min_length=1)]


def rule(field: str, problem: str, fix: str) -> PydanticCustomError:
    """Return the error of a rule between fields; `field` is the one to blame, relative to the section."""
    return PydanticCustomError("rule", "{field} {problem}", {"field": field, "problem": problem, "fix": fix})


class Section(BaseModel):
    """A mapping of known fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def divisible(field: str, value: int, by: str, divisor: int) -> None:
    """Check that one field is a multiple of another."""
    if value % divisor:
        raise rule(field, f"is {value}, no multiple of {by} {divisor}", f"make {field} a multiple of {by}")
