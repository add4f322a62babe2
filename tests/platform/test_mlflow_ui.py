"""MLflow's web interface: a real server on the workspace, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nvila.errors import ConfigError, InfrastructureError, ResourceError
from nvila_platform.mlflow_ui import UiServer, start_ui
from nvila_platform.registration import register_model
from nvila_platform.registry import resolve
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
from nvila_platform.tracking import open_tracker

HOST = """
import sys
from pathlib import Path
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.settings import Settings
server = start_ui(Settings.load(Path(sys.argv[1]), {}), port=0)
print(server.url, server.pid, flush=True)
sys.exit(server.wait())
"""


def _search(port: int) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"max_results": 10})
    connection.request(
        "POST", "/api/2.0/mlflow/experiments/search", body=body, headers={"Content-Type": "application/json"}
    )
    found = json.loads(connection.getresponse().read())["experiments"]
    connection.close()
    return [experiment["name"] for experiment in found]


def _gone(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_interface_shows_the_workspace_and_stops_with_its_caller(tracked: Settings, tmp_path: Path) -> None:
    tracker = open_tracker(tracked, "train")
    tracker.close(timeout_s=60)
    command = [sys.executable, "-c", HOST, str(tracked.workspace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as caller:
        assert caller.stdout is not None
        url, pid = caller.stdout.readline().split()
        port = int(url.rpartition(":")[2])
        assert "nvila" in _search(port)

        with pytest.raises(ResourceError, match=f"port {port}"):
            start_ui(tracked, port=port)
        _check_local_artifact_through_a_server(replace(tracked, tracking_uri=url))

        caller.send_signal(signal.SIGTERM)
        assert caller.wait(30) == 0
    assert _gone(int(pid))
    assert {path.name for path in tmp_path.iterdir()} == {tracked.workspace.name}  # nothing beside the workspace


def _check_local_artifact_through_a_server(settings: Settings) -> None:
    """A server refuses local folders as a source, so the reference travels in the tags."""
    ref = ArtifactRef(step="train", key="k" * 64, digest="d" * 64, uri=settings.workspace.as_uri())
    register_model(settings, "nvila", ref, run_id=None, tags={})
    assert resolve(settings, "models:/nvila/1").ref == ref


def test_remote_tracking_has_its_own_interface(tracked: Settings) -> None:
    with pytest.raises(ConfigError, match="open http://mlflow:5000 in a browser"):
        start_ui(replace(tracked, tracking_uri="http://me:secret@mlflow:5000"))


def test_server_that_ends_at_once_is_reported_with_its_last_line(tmp_path: Path) -> None:
    log_path = tmp_path / "log"
    script = "import sys; print('first'); sys.exit('no such database')"
    with log_path.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log, start_new_session=True)
    server = UiServer(process, "127.0.0.1", 1, log_path)
    with pytest.raises(InfrastructureError, match="no such database"):
        server.wait_ready(30)
    assert server.wait() == 1


def test_silent_server_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print(); time.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # from here on it ignores the polite signal
    process.stdout.close()
    server = UiServer(process, "127.0.0.1", port, tmp_path / "log")
    with pytest.raises(InfrastructureError, match="no answer"):
        server.wait_ready(0.2)
    start = time.monotonic()
    server.stop(timeout_s=0.2)
    assert time.monotonic() - start < 10
    assert _gone(server.pid)
