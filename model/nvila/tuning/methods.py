"""How each part of a model is tuned (NVILA, arXiv 2412.04468, section 3.3 and table 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from nvila.errors import ConfigError, nearest
from nvila.training.config import PARTS, PartName

VisionMethod = Literal["frozen", "ln", "lora", "full"]
ProjectorMethod = Literal["frozen", "full"]
LanguageMethod = Literal["frozen", "lora", "qlora", "dora", "full"]

VISION: tuple[VisionMethod, ...] = get_args(VisionMethod)
PROJECTOR: tuple[ProjectorMethod, ...] = get_args(ProjectorMethod)
LANGUAGE: tuple[LanguageMethod, ...] = get_args(LanguageMethod)
ADAPTED: tuple[LanguageMethod, ...] = ("lora", "qlora", "dora")

# The language model learns so many times as fast as the vision tower; the paper found 5 to 50 to be best (table 6).
DEFAULT_RATIO = 10.0
RATIOS = (1.0, 5.0, 10.0, 50.0)
# Rates of a decoder of width 3584. Narrower ones bear more: the step of a weight changes an output in proportion to
# the number of its inputs, so rates go with 1 / width (Yang et al., arXiv 2203.03466), up to a bound.
_RATES: Mapping[bool, float] = {True: 2e-4, False: 2e-5}
_WIDTH = 3584
_HIGHEST = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneMethod:
    """What is learned in each part, and how.

    Args:
        vision: `ln` learns the tower's layer norms only.
        projector: `full` or `frozen`.
        language: `qlora` keeps its linear layers in 4 bits; `dora` adds a magnitude for each output.
        rank: Rank of the LoRA matrices, as for all adapted layers.
        alpha: Their scale is alpha / rank.
        dropout: Dropout of their inputs.
        only: Name patterns (`*.layers.[0-3].*`); of all that the parts name, only what matches one is learned.
    """

    vision: VisionMethod = "ln"
    projector: ProjectorMethod = "full"
    language: LanguageMethod = "lora"
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, known in (("vision", VISION), ("projector", PROJECTOR), ("language", LANGUAGE)):
            if getattr(self, part) not in known:
                raise ConfigError(
                    f"{part} is '{getattr(self, part)}'",
                    f"{nearest(getattr(self, part), known)} (of {', '.join(known)})",
                )
        if not self.parts:
            raise ConfigError("vision, projector and language are all frozen", "tune at least one of them")
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}", "use 1 or more")
        if not self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha}", "use more than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}", "use 0 or more, below 1")

    @property
    def parts(self) -> tuple[PartName, ...]:
        """Parts that learn."""
        return tuple(part for part in PARTS if getattr(self, part) != "frozen")

    @property
    def name(self) -> str:
        """The method in short, such as `ln+full+qlora`."""
        return f"{self.vision}+{self.projector}+{self.language}"

    @property
    def is_adapter(self) -> bool:
        """Whether the result is small beside its base, so that it is kept apart from it."""
        return self.vision != "full" and self.language != "full"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"only": list(self.only)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TuneMethod:
        """Rebuild what `to_dict` returned."""
        return cls(**{**raw, "only": tuple(raw["only"])})


def parse_method(text: str, **options: Any) -> TuneMethod:
    """Read `vision+language` or `vision+projector+language`.

    Args:
        text: Such as `ln+qlora`; the projector is then fully trained.
        **options: Other fields of `TuneMethod`.

    Raises:
        ConfigError: It is neither, or a name is unknown.

    Example:
        >>> parse_method("ln+qlora").name
        'ln+full+qlora'
    """
    words = text.split("+")
    if len(words) == 2:
        words.insert(1, "full")
    if len(words) != 3:
        raise ConfigError(f"'{text}' is no method", "write VISION+LANGUAGE, such as ln+lora")
    return TuneMethod(
        vision=cast("VisionMethod", words[0]),
        projector=cast("ProjectorMethod", words[1]),
        language=cast("LanguageMethod", words[2]),
        **options,
    )


def default_rate(method: TuneMethod, width: int) -> float:
    """Return the learning rate of the language model where the user names none.

    Args:
        method: How it is tuned; adapters take about ten times the rate of full tuning.
        width: Its hidden size.
    """
    return min(_HIGHEST, _RATES[method.language != "full"] * max(1.0, _WIDTH / width))


def learning_rates(
    method: TuneMethod,
    language: float,
    *,
    ratio: float = DEFAULT_RATIO,
    vision: float | None = None,
    projector: float | None = None,
) -> dict[PartName, float]:
    """Return the rate of every part that learns.

    Args:
        method: Which those are.
        language: Rate of the language model.
        ratio: The tower's rate is that of the language model divided by this.
        vision: Rate of the tower instead.
        projector: Rate of the projector; None takes that of the language model.

    Raises:
        ConfigError: A rate or the ratio is not positive, or given for a part that is frozen.

    Example:
        >>> learning_rates(TuneMethod(), 1e-3, ratio=5)
        {'vision': 0.0002, 'projector': 0.001, 'language': 0.001}
    """
    for name, value in (("ratio", ratio), ("language", language), ("vision", vision), ("projector", projector)):
        if value is not None and not value > 0:
            raise ConfigError(f"the {'' if name == 'ratio' else 'rate '}{name} is {value}", "use more than 0")
    for part, value in (("vision", vision), ("projector", projector)):
        if value is not None and getattr(method, part) == "frozen":
            raise ConfigError(f"{part} has a learning rate, but is frozen", f"leave the rate out, or tune {part}")
    rates: dict[PartName, float] = {
        "vision": language / ratio if vision is None else vision,
        "projector": language if projector is None else projector,
        "language": language,
    }
    return {part: rate for part, rate in rates.items() if part in method.parts}
