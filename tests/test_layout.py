"""Guards of the folder layout: each test stands for a trap that the layout has and that stays silent when it shuts."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"model": "nvila", "platform": "nvila_platform", "pipelines": "nvila_pipelines"}
LONGEST_FILE = 500
# Spelled in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile("(?<![A-Za-z0-9_.}])/(" + "|".join(["work", "root", "home", "Users"]) + ")/")


def package_files() -> list[Path]:
    """Every file below the three packages, as paths relative to the checkout; caches are no source."""
    found = [path for root, package in PACKAGES.items() for path in (ROOT / root / package).rglob("*")]
    return sorted(path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts)


def git(*arguments: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose import path starts with the checkout, as for `python -c` in it."""
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("root", "package"), PACKAGES.items())
def test_source_root_holds_exactly_one_package(root: str, package: str) -> None:
    entries = {path.name for path in (ROOT / root).iterdir()} - {"__pycache__"}
    assert entries == {package}, f"{root}/ is a source root: a loose module works when editable, the wheel lacks it"


@pytest.mark.parametrize(("root", "package"), PACKAGES.items())
def test_package_is_regular_and_typed(root: str, package: str) -> None:
    assert (ROOT / root / package / "__init__.py").is_file()
    assert (ROOT / root / package / "py.typed").is_file()


@pytest.mark.parametrize(("root", "package"), PACKAGES.items())
def test_every_folder_with_modules_is_a_package(root: str, package: str) -> None:
    folders = {path.parent for path in (ROOT / root / package).rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, "without __init__.py import-linter and mypy overlook the folder"


def test_tests_hold_no_init_files() -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not found, "tests/platform/__init__.py would replace the standard library's platform"


def test_standard_platform_module_is_intact() -> None:
    done = run_python("import platform; print(platform.__file__); print(platform.machine())")
    assert done.returncode == 0, done.stderr
    file, machine = done.stdout.split()
    assert Path(file).name == "platform.py"
    assert machine


def test_docker_folder_does_not_pose_as_the_docker_package() -> None:
    done = run_python("import importlib.util as u; s = u.find_spec('docker'); print(s and s.origin)")
    assert done.stdout.strip() != "None", "docker/ at the root became an empty namespace package"


def test_packages_import_without_heavy_libraries() -> None:
    heavy = "{'torch', 'transformers', 'kfp', 'mlflow', 'kserve', 'numpy'}"
    code = f"import sys, nvila, nvila_platform, nvila_pipelines; print(sorted({heavy} & set(sys.modules)))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "importing a package must cost nothing: move the import into the function"


def test_wheel_holds_every_source_file(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    names = zipfile.ZipFile(wheel).namelist()
    in_wheel = {name for name in names if ".dist-info/" not in name}
    on_disk = {str(Path(*path.parts[1:])) for path in package_files()}
    assert in_wheel == on_disk
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_source_file_is_ignored_by_git() -> None:
    ignored = git("check-ignore", "--no-index", *map(str, package_files()))
    assert ignored == [], "anchor the pattern in .gitignore with a leading slash"


def test_data_folder_of_the_model_survives_gitignore() -> None:
    assert git("check-ignore", "--no-index", "model/nvila/data/new_reader.py") == []
    assert git("check-ignore", "--no-index", "data/file") == ["data/file"]


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".html", ".j2"])
def test_source_files_stay_short(suffix: str) -> None:
    long = {
        str(path): lines
        for path in package_files()
        if path.suffix == suffix
        # Made by a compiler, and reviewed as golden files.
        and path.parent.name != "compiled"
        and (lines := len((ROOT / path).read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long, "split the file: one reason per module"


def test_no_machine_paths() -> None:
    # Images and charts name paths inside a container, which are no machine's.
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "--", ".", ":!docker", ":!charts")
    found = []
    for name in listed:
        path = ROOT / name
        if path.suffix in {".png", ".jpg", ".parquet", ".safetensors"} or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_version_is_defined_once() -> None:
    import nvila

    defined = [path for path in package_files() if path.suffix == ".py" and _assigns_version(ROOT / path)]
    assert [str(path) for path in defined] == ["model/nvila/_version.py"]
    assert importlib.metadata.version("nvila") == nvila.__version__


def _assigns_version(path: Path) -> bool:
    return bool(re.search(r"^__version__\s*=", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    # lmms-eval needs packages of its own that contradict these; it goes into another environment.
    wanted = {canonicalize_name(Requirement(line).name) for line in asked} - {"nvila", "lmms-eval"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonicalize_name(line.split("==")[0]): line for line in pins}
    assert wanted <= set(pinned), sorted(wanted - set(pinned))
    assert pinned[canonicalize_name("torch")].partition("==")[2].count("+") == 0, (
        "a local version such as +cpu resolves on one index only"
    )
    cuda = [name for name in pinned if name.startswith("nvidia-") or name == "triton"]
    assert cuda == ["nvidia-ml-py"], "only bindings in plain Python: torch pins what belongs to CUDA"


def test_dependencies_are_lower_bounds_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = [line for line in asked if {spec.operator for spec in Requirement(line).specifier} - {">="}]
    assert not pinned, "pyproject.toml says what is needed; constraints.txt says what was tested"
