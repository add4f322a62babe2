"""Recipes: one YAML file that says what a run does, with dotted overrides from the command line.

A recipe may extend another one and then names only what differs. Precedence: extended recipe < file < override. `null`
leaves a field out: a stage that is null is not run, a part whose learning rate is null stays frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nvila.errors import ConfigError, nearest
from nvila.quantization.config import QuantizationConfig
from nvila.training.config import PrecisionConfig, TrainConfig
from nvila_pipelines import recipe_schema as schema
from nvila_pipelines.recipe_fields import CountOrZero, Name, Section, rule
from nvila_pipelines.recipe_text import parse_recipe_text, parse_value
from nvila_pipelines.recipe_training import StageSection, TrainSection, stage_configs

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT_RECIPE = "quickstart"
FAST_RECIPE = "fast"

_EXTENDS = "extends"
_SUFFIXES = (".yaml", ".yml")


class Recipe(Section):
    """A whole run, resolved and checked."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name
    seed: CountOrZero
    data: schema.DataSection
    model: schema.ModelSection
    # None keeps everything.
    curate: schema.CurateSection | None = None
    train: TrainSection
    quantize: schema.QuantizeSection
    evaluate: schema.EvaluateSection
    gate: schema.GateSection
    # Under another name, because every class of this kind has a method `register`.
    registration: schema.RegisterSection = Field(alias="register")
    serve: schema.ServeSection
    plan: schema.PlanSection = schema.PlanSection()

    @model_validator(mode="after")
    def _names_data(self) -> Self:
        if self.data.dataset is None:
            return self
        known = self.own_data
        for name, stage in self.train.stages.items():
            if stage.data is not None and stage.batch_tokens is None and stage.data not in known:
                hint = f"{nearest(stage.data, known)}; with batch_tokens a stage reads any data set or path"
                raise rule(f"train.stages.{name}.data", f"is '{stage.data}'", hint)
        return self

    @property
    def own_data(self) -> list[str]:
        """Names of what the run's first steps make for stages; none without a built-in data set."""
        if self.data.dataset is None:
            return []
        return ["captions", "selected", "text", *(["clips"] if self.data.clips else [])]

    @property
    def register(self) -> schema.RegisterSection:
        """Where the model is registered: the section `register`."""
        return self.registration

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return the form that crosses process boundaries."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def to_yaml(self) -> str:
        """Return the resolved recipe as a file that `load_recipe` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: It is not a recipe.
        """
        try:
            raw = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"not a recipe: {e}", "pass what `Recipe.to_json` wrote") from e
        return _validated(raw)

    def train_config(self) -> TrainConfig:
        """Return the training run."""
        precision = PrecisionConfig(name=self.train.precision, fp8=self.train.fp8.to_config())
        config = self._training(self.model, self.train.stages, precision, self.train.backend)
        return replace(
            config,
            optimizer=self.train.optimizer,
            offload=self.train.offload,
            gradient_checkpointing=self.train.gradient_checkpointing,
            checkpoints=self.train.checkpoints.to_config(),
            health=self.train.health.to_config(),
        )

    def up_to(self, stage: str) -> Recipe:
        """Return the recipe with the training stages up to one of them.

        Raises:
            ConfigError: There is no such stage.
        """
        stages = self.train.stages
        if stage not in stages:
            raise ConfigError(f"recipe {self.name} has no stage '{stage}'", nearest(stage, stages))
        names = list(stages)
        kept = {name: stages[name] for name in names[: names.index(stage) + 1]}
        return self.model_copy(update={"train": self.train.model_copy(update={"stages": kept})})

    def scorer_config(self, scorer: str) -> TrainConfig:
        """Return the training run of the `small` or `large` scorer: fp32 in one process, otherwise like the main one.

        Raises:
            ConfigError: There is no such scorer.
        """
        if self.curate is None:
            raise ConfigError(f"recipe {self.name} has no scorers", "give it a section curate")
        scorers = {"small": self.curate.small, "large": self.curate.large}
        if scorer not in scorers:
            raise ConfigError(f"unknown scorer '{scorer}'", nearest(scorer, scorers))
        return self._training(scorers[scorer].model, scorers[scorer].stages, PrecisionConfig(), "torch")

    def quantization_config(self) -> QuantizationConfig:
        """Return the quantization schemes."""
        return QuantizationConfig(**self.quantize.model_dump(include={"vision", "language", "group_size"}))

    def _training(
        self,
        model: schema.ModelSection,
        stages: Mapping[str, StageSection],
        precision: PrecisionConfig,
        backend: Literal["deepspeed", "torch"],
    ) -> TrainConfig:
        return TrainConfig(
            model=model.to_config(),
            stages=stage_configs(stages),
            precision=precision,
            backend=backend,
            # Plain torch has none: reading it would make curation depend on it.
            zero_stage=self.train.zero_stage if backend == "deepspeed" else 0,
            attention=self.train.attention,
            betas=self.train.betas,
            weight_decay=self.train.weight_decay,
            max_grad_norm=self.train.max_grad_norm,
            seed=self.seed,
        )


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path = DEFAULT_RECIPE, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply overrides to it.

    Args:
        name_or_path: Name of a built-in recipe, or a YAML file.
        overrides: `dotted.key=value` words; values are YAML.

    Raises:
        ConfigError: The recipe is unknown, or a field is; a value has the wrong type or breaks a rule. The message
            names the field by its dotted path.

    Example:
        >>> load_recipe("quickstart", ["train.stages.align.lr.projector=5e-4"]).train.stages["align"].lr.projector
        0.0005
    """
    path = _find(str(name_or_path))
    recipe = _validated(_read(path, ()), where=str(path))
    return changed_recipe(recipe, overrides)


def changed_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Apply overrides to a recipe.

    Raises:
        ConfigError: A field is unknown or a value is wrong; the message names the field.
    """
    if not overrides:
        return recipe
    tree = recipe.to_dict()
    for override in overrides:
        tree = _override(tree, override)
    return _validated(tree)


def _find(name_or_path: str, base: Path | None = None) -> Path:
    built_in = RECIPES / f"{name_or_path}.yaml"
    if name_or_path in recipe_names():
        return built_in
    path = Path(name_or_path).expanduser()
    if base is not None:
        path = base / path
    if path.is_file():
        return path
    if path.suffix in _SUFFIXES or "/" in name_or_path:
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"recipe file {path} {problem}", f"give a YAML file or one of {', '.join(recipe_names())}")
    raise ConfigError(f"unknown recipe '{name_or_path}'", nearest(name_or_path, recipe_names()))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file and what it extends into one tree of plain values."""
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(step.name for step in (*seen, path))
        raise ConfigError(f"recipes extend each other in a circle: {chain}", f"remove `{_EXTENDS}` from one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"recipe file {path} cannot be read: {e}", "give a YAML file in UTF-8") from e
    values = parse_recipe_text(text, where=str(path))
    values.setdefault("name", path.stem)
    parents = values.pop(_EXTENDS, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: {_EXTENDS} is {parents!r}", "name a recipe or file, or a list of them")
    laid: dict[str, Any] = {}
    for parent in parents:
        # The own file comes last, so that nulls of a later parent take away fields of an earlier one.
        laid = _merged(laid, _read(_find(parent, path.parent), (*seen, path)))
    return _merged(laid, values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree over another; None takes a key away."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    dotted, separator, text = override.partition("=")
    dotted = dotted.strip()
    if not separator or not dotted:
        raise ConfigError(f"'{override}' is no override", "write key=value, such as seed=1")
    if not text.strip():
        raise ConfigError(f"override {dotted} has no value", f"write {dotted}=VALUE")
    value = parse_value(text, where=f"override {dotted}")
    keys = dotted.split(".")
    section: Any = tree
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if not isinstance(section, Mapping):
            raise ConfigError(f"unknown recipe field {dotted}: {here} is a value, not a section", f"set {here}=...")
        if key not in section:
            raise ConfigError(f"unknown recipe field {'.'.join(keys[: depth + 1])}", _nearest_path(key, here, section))
        section = section[key]
    if isinstance(section, Mapping) and value is not None and not isinstance(value, Mapping):
        fields = ", ".join(f"{dotted}.{key}" for key in section)
        raise ConfigError(f"override {dotted}={text} would replace a whole section", f"set one of its fields: {fields}")
    laid: Any = value
    for key in reversed(keys):
        laid = {key: laid}
    return _merged(tree, laid)


def _nearest_path(key: str, prefix: str, known: Iterable[str]) -> str:
    """Return a hint in dotted paths, so that it can be typed as it stands."""
    lead = f"{prefix}." if prefix else ""
    hint = nearest(key, known)
    return hint.replace("'", f"'{lead}", 1) if hint.startswith("did you mean '") else hint


def _validated(raw: object, where: str = "") -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        message, hint = _explained(e.errors(include_url=False)[0])
        more = e.error_count() - 1
        message += f" (and {more} more)" if more else ""
        raise ConfigError(f"{where}: {message}" if where else message, hint) from e


def _explained(error: Any) -> tuple[str, str]:
    """Turn pydantic's first error into our one line: field path, bad value, what is expected."""
    keys = [str(part) for part in error["loc"] if part != "[key]"]
    path = ".".join(keys) or "the recipe"
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"unknown recipe field {path}", _nearest_path(keys[-1], ".".join(keys[:-1]), _fields_at(keys[:-1]))
    if error["type"] == "missing":
        return f"recipe field {path} is missing", f"set it, or start the file with `{_EXTENDS}: {DEFAULT_RECIPE}`"
    if error["type"] == "rule":
        place = f"{path}.{context['field']}" if context["field"] else path
        return f"recipe field {place} {context['problem']}", context["fix"]
    return f"recipe field {path} is {_shown(error['input'])}", _expected(error, keys, context)


def _expected(error: Any, keys: Sequence[str], context: Mapping[str, Any]) -> str:
    """Say in a recipe writer's words what pydantic expected."""
    kind, value = error["type"], error["input"]
    if kind == "literal_error":
        # pydantic lists the allowed words between quotes.
        options = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        hint = nearest(value, options) if isinstance(value, str) else ""
        allowed = f"allowed: {', '.join(options)}"
        return f"{hint} {allowed}" if hint.startswith("did") else allowed
    if kind in ("model_type", "dict_type"):
        return "expected a section with the fields " + ", ".join(_fields_at(keys) or ["of your choice"])
    if kind in ("too_long", "too_short") and "max_length" in context:
        return f"expected a list of {context['max_length']}"
    if kind == "too_short" or kind == "missing_argument":
        return "expected at least one entry"
    if kind == "string_pattern_mismatch":
        return "use letters, digits, '.', '_' and '-', and begin with a letter or digit"
    if kind == "tuple_type":
        return "expected a list"
    return "expected " + str(error["msg"]).removeprefix("Input should be ")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_none(annotation: Any) -> Any:
    """Return the section of a field that may also be null."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(annotation) and len(kinds) == 1 else annotation


def _fields_at(keys: Sequence[str]) -> list[str]:
    """Return the field names of the section at a path; nothing where the names are free."""
    found: Any = Recipe
    for key in keys:
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            # A mapping with free keys: what follows the key is the section of its values.
            found = get_args(found)[1] if len(get_args(found)) == 2 else None
            continue
        named = {field.alias or name: field for name, field in found.model_fields.items()}
        found = _without_none(named[key].annotation) if key in named else None
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        return []
    return [field.alias or name for name, field in found.model_fields.items()]
