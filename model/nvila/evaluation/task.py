"""A task: which data, what is asked, and how answers are scored. Task files are YAML; nothing in them is run."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.errors import ConfigError, nearest
from nvila.evaluation.scorers.contract import Scorer
from nvila.evaluation.scorers.table import find_scorer
from nvila.yaml_text import parse_yaml

Columns = str | list[str] | dict[str, str]
# What a prompt may name besides the fields of the task.
CHOICES, SUBTITLES = "choices", "subtitles"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataPlace(_Strict):
    """Where the data of a task is.

    Args:
        builtin: Name of a built-in data set; it needs nothing else.
        hub: Id on the Hugging Face Hub, read only when the user says so.
        config: Configuration there.
        split: Split there.
    """

    builtin: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "test"


class GenerationSettings(_Strict):
    """How answers are generated; decoding is greedy.

    Args:
        max_new_tokens: Longest answer.
        stop: Texts that end an answer; they are no part of it.
        num_frames: Frames that are sampled from a video; None takes the model's number.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    stop: list[str] = Field(default_factory=list)
    num_frames: Annotated[int, Field(ge=1)] | None = None


class Fixture(_Strict):
    """A few samples in the schema of the data; `nvila.evaluation.fixtures` draws their media.

    Args:
        rows: The rows; `{image: TEXT}` in a cell is a picture of a text.
        files: Files beside them by path: `{video: [COLOUR, ...]}`, `{image: TEXT}`, or the text of the file.
    """

    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    files: dict[str, Any] = Field(default_factory=dict)


class TaskFile(_Strict):
    """The text of a task file.

    Args:
        version: Raised with every change that changes scores.
        title: One line for people.
        tags: Names under which several tasks are run together.
        data: Where the data is.
        fields: Column of every field, or a list or mapping of columns; `answer` and what prompt and scorer want.
        constants: Fields that are the same for every sample.
        images: Columns with images: bytes, paths, or lists of them; or a path with columns in braces.
        videos: Paths of the video with columns in braces; the first that exists is taken.
        subtitles: Path of an SRT file, likewise; lines shown while a sampled frame is are given to the prompt.
        interleave: Put the images where the prompt says `<image 1>`, and use no others.
        prompt: The question, with fields in braces; `{choices}` is one line a choice.
        prompt_open: Instead of it where a sample has no choices.
        optional: Texts for fields that may be empty: `{hint}` becomes this text, or nothing.
        choice_line: How a choice is written, with `{letter}` and `{text}`.
        no_choice: Text that stands in columns that hold no choice.
        answer_is: `index` when the answer is the number of a choice, counted from 0; `span` when it is a text with two
            moments, such as `<2.5> <4>`.
        group_by: Field by which results are told apart.
        generation: How answers are generated.
        scorer: Name of the scorer.
        fixture: A few made samples, for checks.
    """

    version: Annotated[int, Field(ge=1)]
    title: str
    tags: list[str] = Field(default_factory=list)
    data: DataPlace = DataPlace()
    fields: dict[str, Columns]
    constants: dict[str, str | int | float] = Field(default_factory=dict)
    images: list[str] = Field(default_factory=list)
    videos: list[str] = Field(default_factory=list)
    subtitles: str | None = None
    interleave: bool = False
    prompt: str
    prompt_open: str | None = None
    optional: dict[str, str] = Field(default_factory=dict)
    choice_line: str = "{letter}. {text}"
    no_choice: str | None = None
    answer_is: Annotated[str, Field(pattern="^(value|index|span)$")] = "value"
    group_by: str | None = None
    generation: GenerationSettings = GenerationSettings()
    scorer: str
    fixture: Fixture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task that can be run.

    Args:
        name: Its name, which is that of its file.
        file: What the file says.
        scorer: Its scorer.
        where: The file, for messages.
    """

    name: str
    file: TaskFile
    scorer: Scorer
    where: str

    @property
    def version(self) -> int:
        """Version of the task."""
        return self.file.version

    def with_frames(self, num_frames: int | None) -> Task:
        """Return the task asked with so many frames of every video; None leaves it as it is."""
        if num_frames is None:
            return self
        generation = self.file.generation.model_copy(update={"num_frames": num_frames})
        return replace(self, file=self.file.model_copy(update={"generation": generation}))

    @property
    def digest(self) -> str:
        """Identity of all that an answer or a score depends on: not of the title, the tags and the fixture."""
        said = self.file.model_dump(exclude={"title", "tags", "fixture"})
        return hashlib.sha256(json.dumps([self.name, said], sort_keys=True).encode()).hexdigest()

    @property
    def columns(self) -> list[str]:
        """Columns that the data must have, each once, in the order of the file."""
        named = [column for value in self.file.fields.values() for column in as_list(value)]
        images = [column for text in self.file.images for column in names_in(text) or [text]]
        paths = [name for path in [*self.file.videos, self.file.subtitles or ""] for name in names_in(path)]
        return list(dict.fromkeys([*named, *images, *paths]))


def parse_task(text: str, *, name: str, where: str) -> Task:
    """Read a task.

    Raises:
        ConfigError: The text is no task: with the field, what is wrong with it, and the nearest name.

    Example:
        >>> task = parse_task(
        ...     "{version: 1, title: Demo, fields: {question: q, answer: a}, prompt: '{question}', scorer: anls}",
        ...     name="demo",
        ...     where="demo.yaml",
        ... )
        >>> task.columns
        ['q', 'a']
    """
    raw = parse_yaml(text, where=where)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is no task", "write fields such as version, fields, prompt and scorer")
    try:
        file = TaskFile.model_validate(raw)
    except ValidationError as e:
        raise _error(e, where) from e
    scorer = find_scorer(file.scorer, where)
    task = Task(name=name, file=file, scorer=scorer, where=where)
    _check(task)
    return task


def names_in(template: str) -> list[str]:
    """Return the names in braces of a template.

    Raises:
        ConfigError: The braces do not match, or hold more than a name.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as e:
        raise ConfigError(f"{template!r} is no template: {e}", "write {{ for a brace that is text") from e
    for _, name, form, conversion in parts:
        if form or conversion or not str(name).isidentifier():
            raise ConfigError(f"{template!r} holds {{{name}}}, which is more than a name", "write {field}")
    return [str(name) for _, name, _, _ in parts]


def _check(task: Task) -> None:
    """Check what needs several fields.

    Raises:
        ConfigError: With the first thing that does not go together.
    """
    file, where = task.file, task.where
    _ = task.columns  # templates of paths are checked by taking them apart
    fields = [*file.fields, *file.constants]
    for need in task.scorer.needs:
        if need not in fields:
            raise ConfigError(f"{where}: the scorer {file.scorer} needs the field '{need}'", "map it under fields")
    known = [*fields, CHOICES, *([SUBTITLES] if file.subtitles else [])]
    for template in filter(None, (file.prompt, file.prompt_open, *file.optional.values())):
        for name in names_in(template):
            if name not in known or (name == CHOICES and CHOICES not in file.fields):
                raise ConfigError(f"{where}: the prompt names '{name}', which is no field", nearest(name, fields))
    for field in filter(None, (file.group_by, *file.optional)):
        if field not in fields and not (field == SUBTITLES and file.subtitles):
            raise ConfigError(f"{where}: there is no field '{field}'", nearest(field, fields))
    if wrong := set(names_in(file.choice_line)) - {"letter", "text"}:
        raise ConfigError(f"{where}: choice_line names '{min(wrong)}'", "it knows {letter} and {text}")
    if file.subtitles and not (file.videos and file.generation.num_frames):
        raise ConfigError(f"{where}: subtitles need videos and num_frames", "lines are chosen by the sampled frames")
    if file.answer_is == "index" and CHOICES not in file.fields:
        raise ConfigError(f"{where}: the answer is an index of choices, but there are none", "map choices under fields")
    if file.data.builtin and file.data.hub:
        raise ConfigError(f"{where}: data is named twice", "name builtin or hub")


def _error(e: ValidationError, where: str) -> ConfigError:
    first = e.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known: Mapping[str, Any] = {"data": DataPlace, "generation": GenerationSettings}
        model = known.get(str(first["loc"][0]), TaskFile) if len(first["loc"]) > 1 else TaskFile
        return ConfigError(f"{where}: there is no field '{place}'", nearest(str(first["loc"][-1]), model.model_fields))
    if first["type"] == "missing":
        return ConfigError(f"{where}: the field '{place}' is missing", "every task says it")
    return ConfigError(f"{where}: {place} is {first['input']!r}: {first['msg'].lower()}", "correct the value")


def as_list(value: Columns) -> list[str]:
    """Return the columns of a field."""
    if isinstance(value, str):
        return [value]
    return list(value.values()) if isinstance(value, dict) else value
