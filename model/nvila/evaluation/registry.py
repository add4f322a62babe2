"""Tasks by name: those that come with this package, those of other packages, and files of one's own.

A name is that of a file, so listing names reads nothing; a task is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from nvila.errors import ConfigError, nearest
from nvila.evaluation.task import Task, parse_task

# Other packages name a package of theirs here that holds task files.
ENTRY_POINTS = "nvila.tasks"
SUFFIX = ".yaml"
ALL = "all"


def task_files() -> dict[str, Traversable]:
    """Return the file of every installed task by name, in alphabetical order.

    Raises:
        ConfigError: Two packages have a task of one name.
    """
    found: dict[str, Traversable] = {}
    for folder in _folders():
        for file in folder.iterdir():
            name = file.name.removesuffix(SUFFIX)
            if not file.name.endswith(SUFFIX):
                continue
            if name in found:
                raise ConfigError(f"there are two tasks '{name}': {found[name]} and {file}", "remove a package")
            found[name] = file
    return dict(sorted(found.items()))


def find_task(name: str) -> Task:
    """Return a task.

    Args:
        name: Name of an installed task, or path of a file; `name@2` insists on a version.

    Raises:
        ConfigError: There is no such task, it is of another version, or its file is wrong.

    Example:
        >>> find_task("chartqa").file.scorer
        'relaxed_accuracy'
    """
    path, _, version = name.partition("@")
    if path.endswith(SUFFIX):
        task = _read(Path(path), Path(path).stem)
    else:
        known = task_files()
        if path not in known:
            raise ConfigError(f"there is no task '{path}'", nearest(path, known))
        task = _read(known[path], path)
    if version and version != str(task.version):
        raise ConfigError(f"the task {path} is of version {task.version}, not {version}", f"ask for {path}")
    return task


def select_tasks(words: Sequence[str]) -> list[Task]:
    """Return the tasks that names, files and tags stand for, each once.

    Args:
        words: Names as `find_task` takes them, tags such as `builtin`, or `all`; several may stand in one word,
            separated by commas.

    Raises:
        ConfigError: One of them is nothing, or two files have one name.
    """
    chosen: dict[str, Task] = {}
    for word in [one.strip() for text in words for one in text.split(",") if one.strip()]:
        for task in _meant(word):
            if chosen.setdefault(task.name, task).where != task.where:
                raise ConfigError(f"two tasks are called {task.name}: {chosen[task.name].where} and {task.where}", "")
    if not chosen:
        raise ConfigError("no task is named", f"name some of: {', '.join(task_files())}")
    return list(chosen.values())


def _meant(word: str) -> list[Task]:
    known = task_files()
    name = word.partition("@")[0]
    if name.endswith(SUFFIX) or name in known:
        return [find_task(word)]
    tasks = [_read(file, name) for name, file in known.items()]
    tagged = [task for task in tasks if word == ALL or word in task.file.tags]
    if not tagged:
        tags = {tag for task in tasks for tag in task.file.tags}
        raise ConfigError(f"there is no task or tag '{word}'", nearest(word, [*known, *tags, ALL]))
    return tagged


def _folders() -> Iterator[Traversable]:
    yield files("nvila.evaluation") / "tasks"
    for point in entry_points(group=ENTRY_POINTS):
        yield files(point.value)


def _read(file: Traversable, name: str) -> Task:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the task file {file} cannot be read: {e}", "check the path") from e
    return parse_task(text, name=name, where=str(file))
