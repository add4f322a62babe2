"""`nvila serve` and `nvila ui`: which model, under which name, and how to ask it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from nvila.errors import ArtifactError, ConfigError
from nvila_pipelines.cli import serve
from nvila_pipelines.recipe import load_recipe
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, LocalStore

Nvila = Callable[..., Any]

PROGRAM = "import sys; from nvila_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"


def publish(settings: Settings) -> ArtifactRef:
    store = LocalStore(Path(settings.store_uri))
    key = content_key("quantize", {}, {}, "1")
    folder = store.work_dir("quantize", key)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    write_manifest(folder, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return store.publish(folder)


@contextmanager
def started(
    *words: str, cwd: Path, variables: Mapping[str, str] | None = None, errors: int | IO[str] = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """Run the command as a program; it is stopped with the block."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVILA_")}
    env |= variables or {}
    command = [sys.executable, "-c", PROGRAM, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd, env=env) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, of the shape of the smaller scorer."""
    from nvila.assembly import build_model, build_processor, save_model
    from nvila.configuration import NVILAConfig
    from nvila.data.tokenizers import build_word_tokenizer

    config = load_recipe().scorer_config("small").model
    tokenizer = build_word_tokenizer(["what color is the shape? blue"], model_max_length=config.max_length)
    model = build_model(config, tokenizer)
    directory = tmp_path_factory.mktemp("served") / "model"
    assert isinstance(model.config, NVILAConfig)
    save_model(model, build_processor(model.config, tokenizer), directory)
    return directory


# ----------------------------------------------------------------------------------------------------------------------
# Which model


def test_folder_is_served_under_the_default_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    source = serve.find_model(tmp_path, Settings.load(tmp_path, {}))
    assert source == serve.Source(directory=tmp_path, name="nvila", version="unregistered", digest="unknown")


def test_folder_of_a_step_brings_its_digest(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "ws", {})
    ref = publish(settings)
    folder = LocalStore(Path(settings.store_uri)).fetch(ref)
    for given in (folder, folder / "model"):
        source = serve.find_model(given, settings)
        assert (source.directory, source.digest) == (folder / "model", ref.digest)


def test_registered_model_is_found_by_alias(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "ws", {})
    settings.workspace.mkdir()
    ref = publish(settings)
    version = register_model(settings, "team", ref, run_id=None, tags={})
    set_alias(settings, "team", "champion", version.version)
    source = serve.find_model("models:/team@champion", settings)
    folder = LocalStore(Path(settings.store_uri)).fetch(ref)
    assert source == serve.Source(directory=folder / "model", name="team", version="1", digest=ref.digest)
    with pytest.raises(ConfigError, match="team"):
        serve.find_model("models:/team@candidate", settings)
    (folder / "model" / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        serve.find_model("models:/team@champion", settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve"], "error: no model is named"),
        (["serve", "a", "--model-dir", "b"], "error: both MODEL and --model-dir are given"),
        (["serve", "absent"], "error: model folder absent does not exist"),
        (["serve", "--model-dir", "file"], "error: model folder file is a file"),
        (["serve", "empty"], "error: model folder empty has no config.json"),
        (["serve", "good", "--name", "a b"], "error: model name 'a b' is not usable in a URL"),
        (["serve", "good", "--max-requests", "0"], "error: max_requests must be positive"),
        (["serve", "models:/x"], "error: "),
    ],
)
def test_what_cannot_be_served_is_named(words: list[str], message: str, nvila: Nvila, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").touch()
    done = nvila(*words)
    assert done.code == 2
    assert done.err.splitlines()[0].startswith(message)


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")],
)
def test_address_in_the_curl_line_can_be_reached(host: str, shown: str) -> None:
    assert serve._reachable(host) == shown


def test_curl_line_survives_a_shell() -> None:
    words = shlex.split(serve.curl_line("http://127.0.0.1:1", "nvila"))
    assert words[2] == "http://127.0.0.1:1/openai/v1/chat/completions"
    body = json.loads(words[-1])
    assert body["model"] == "nvila"
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert len(" ".join(words)) < 800, "it is meant to be pasted"


# ----------------------------------------------------------------------------------------------------------------------
# As a program


def test_served_model_answers_the_printed_line_and_stops_on_a_signal(tiny_model: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with started("serve", "--model-dir", str(tiny_model), "--port", "0", "--name", "tiny", cwd=tmp_path) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        assert first.startswith("model tiny (version unregistered) is served at http://127.0.0.1:")
        server.stdout.readline()
        line = server.stdout.readline()
        done = subprocess.run(
            ["bash", "-c", f"{line.strip()} --noproxy '*'"], capture_output=True, text=True, check=True, timeout=60
        )
        answer = json.loads(done.stdout)
        assert answer["model"] == "tiny"
        assert answer["choices"][0]["message"]["role"] == "assistant"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not list(tmp_path.iterdir()), "serving a folder leaves nothing behind"


@pytest.mark.slow
def test_interface_is_up_until_a_signal(tmp_path: Path) -> None:
    with started("ui", "--workspace", "ws", "--port", "0", "--json", cwd=tmp_path) as ui:
        assert ui.stdout is not None
        url = json.loads(ui.stdout.readline())["url"]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=30) as answer:
            assert answer.status == 200
        ui.send_signal(signal.SIGINT)
        assert ui.wait(60) == 0
    assert (tmp_path / "ws" / "mlflow.db").is_file()


class Interface:
    """Stands in for MLflow's server, which takes many seconds to start."""

    url = "http://127.0.0.1:5001"
    log_path = Path("logs/mlflow-ui.log")

    def __init__(self, status: int) -> None:
        self.status = status
        self.stopped = False

    def __enter__(self) -> Interface:
        return self

    def __exit__(self, *unused: object) -> None:
        self.stopped = True

    def wait(self) -> int:
        return self.status


@pytest.mark.parametrize(("status", "code"), [(0, 0), (3, 75)])
def test_interface_is_announced_and_its_end_is_the_exit_code(
    status: int, code: int, nvila: Nvila, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = Interface(status)
    asked: list[tuple[Path, str, int]] = []

    def start(settings: Settings, host: str, port: int) -> Interface:
        asked.append((settings.workspace, host, port))
        return server

    monkeypatch.setattr("nvila_platform.mlflow_ui.start_ui", start)
    done = nvila("ui", "--workspace", "ws", "--port", "5001")
    assert done.code == code
    assert asked == [(tmp_path / "ws", "127.0.0.1", 5001)]
    assert done.out == f"MLflow shows {tmp_path / 'ws'} at {server.url}; Ctrl-C stops it\n"
    assert server.stopped
    if status:
        assert done.err.splitlines()[0] == "error: MLflow's server ended with exit status 3"
    assert nvila("ui", "--json").out == '{"url": "http://127.0.0.1:5001"}\n' or status
