"""Training as a job of a cluster, from the command and from a step: what is checked before, and real processes."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fake_kubernetes import Cluster
from tests.fake_trainer import GROUP, JOBS, FakeTrainer

from nvila.errors import ConfigError
from nvila_pipelines.cli import main
from nvila_pipelines.compile import compile_graph, shipped
from nvila_pipelines.graphs.profile import read_profile
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.training.nodes import check_nodes, job_placement, open_launcher, parse_size
from nvila_platform.launch import LocalLauncher
from nvila_platform.launch.train_job import TrainJobLauncher
from nvila_platform.settings import Settings

MICRO = Path(__file__).parents[2] / "fixtures" / "micro.yaml"
JOB = '{"image": "nvila:1", "nodes": 2, "gpus": 2}'
PROFILE = """
defaults:
  cpu: "1"
  env: {NVILA_WORKSPACE: /data/ws}
  claims: {nvila-workspace: /data}
tasks:
  train:
    launcher: trainjob
    image: registry.example.org/nvila-train:1.0
    nodes: 4
    gpus: 8
    memory: 256Gi
    queue: research
    node_selector: {pool: h100}
    tolerations: [{key: spot, effect: NoSchedule}]
    secrets: {s3: {secret-key: NVILA_S3_SECRET_KEY}}
    shm_gib: 32
"""


def settings(tmp_path: Path, **variables: str) -> Settings:
    return Settings.load(tmp_path / "ws", variables)


@pytest.mark.parametrize(
    ("size", "numbers"), [("0x0", (None, None)), ("4x8", (4, 8)), ("4x0", (4, None)), ("0.0x8.0", (None, 8))]
)
def test_a_size_says_nodes_and_gpus(size: str, numbers: tuple[int | None, int | None]) -> None:
    assert parse_size(size) == numbers


@pytest.mark.parametrize(
    ("size", "field"), [("-1x8", "parameter nodes=-1"), ("4x-8", "parameter gpus_per_node=-8"), ("four", "size 'four'")]
)
def test_a_size_that_is_none_names_the_parameter(size: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        parse_size(size)


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 1),
        ({"NVILA_TRAIN_GPUS": "2"}, 2),
        ({"NVILA_TRAIN_JOB": JOB}, 2),
        ({"NVILA_TRAIN_JOB": JOB, "NVILA_TRAIN_GPUS": "1"}, 1),
        ({"NVILA_TRAIN_JOB": '{"image": "nvila:1"}'}, 1),
    ],
)
def test_a_node_has_a_process_for_each_gpu(
    tmp_path: Path, micro: Recipe, variables: dict[str, str], processes: int
) -> None:
    assert check_nodes(micro, settings(tmp_path, **variables)) == processes


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        ({"NVILA_TRAIN_NODES": "2"}, [], "2 nodes are asked for, but training runs on this machine"),
        ({"NVILA_TRAIN_JOB": JOB, "NVILA_TRAIN_NODES": "3"}, [], "images_per_step=4 cannot be dealt to 3 nodes with 2"),
        ({"NVILA_TRAIN_GPUS": "2"}, ["train.backend=torch"], "train.backend=torch is one process"),
        ({"NVILA_TRAIN_JOB": '{"image": "nvila"}'}, [], "image 'nvila'"),
        ({"NVILA_TRAIN_JOB": '{"nodes": 2}'}, [], "image: Field required"),
        ({"NVILA_TRAIN_JOB": "{"}, [], "training job: the placement"),
        ({"NVILA_TRAIN_JOB": JOB, "NVILA_TRAIN_GPUS": "65"}, [], "gpus 65"),
    ],
)
def test_what_cannot_run_is_named_before_anything_starts(
    tmp_path: Path, change: Callable[..., Recipe], variables: dict[str, str], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_nodes(change(*overrides), settings(tmp_path, **variables))


def test_settings_choose_the_launcher(tmp_path: Path) -> None:
    here = settings(tmp_path)
    assert isinstance(open_launcher(here, "w", print), LocalLauncher)
    assert isinstance(open_launcher(replace(here, train_job=JOB), "w", print), TrainJobLauncher)


def test_a_profile_gives_its_placement_to_the_job_and_little_to_the_task(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    file = compile_graph("train", tmp_path / "x.yaml", read_profile(tmp_path / "profile.yaml"))
    pipeline, platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    executors = pipeline["deploymentSpec"]["executors"]
    variables = {
        name: {entry["name"]: entry["value"] for entry in executors[f"exec-{name}"]["container"]["env"]}
        for name in ("check", "train", "evaluate")
    }
    assert "NVILA_TRAIN_JOB" not in variables["evaluate"]
    assert variables["check"] == variables["train"]
    placement = job_placement(settings(tmp_path, **variables["train"]))
    assert placement is not None
    assert (placement.nodes, placement.gpus, placement.memory, placement.queue) == (4, 8, "256Gi", "research")
    assert placement.claims == {"nvila-workspace": "/data"}
    assert placement.env == {"NVILA_WORKSPACE": "/data/ws"}
    assert placement.secrets == {"s3": {"secret-key": "NVILA_S3_SECRET_KEY"}}
    train = executors["exec-train"]["container"]
    assert train["resources"] == executors["exec-evaluate"]["container"]["resources"]
    assert train["image"] == "registry.example.org/nvila-train:1.0"
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    assert {"nodeSelector", "tolerations", "emptyDirMounts"}.isdisjoint(placed)
    (mounted,) = placed["pvcMount"]
    assert (mounted["constant"], mounted["mountPath"]) == ("nvila-workspace", "/data")


@pytest.mark.parametrize("where", ["defaults: {launcher: trainjob}", "tasks: {curate: {launcher: trainjob}}"])
def test_only_training_can_be_a_job(tmp_path: Path, where: str) -> None:
    (tmp_path / "profile.yaml").write_text(where)
    with pytest.raises(ConfigError, match="launcher is trainjob"):
        read_profile(tmp_path / "profile.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 4}, "4 nodes are asked for, but training runs on this machine"),
        ({"nodes": -1}, "parameter nodes=-1 is negative"),
        ({"gpus_per_node": 3}, "cannot be dealt to 1 nodes with 3"),
    ],
)
def test_parameters_of_a_run_are_checked_by_its_first_task(
    tmp_path: Path, micro: Recipe, arguments: dict[str, Any], message: str
) -> None:
    here = settings(tmp_path)
    here.workspace.mkdir()
    given = {"recipe": micro.to_json(), "run_id": "r"} | arguments
    with pytest.raises(ConfigError, match=message):
        run_compiled(shipped("train"), given, here, tmp_path / "log")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher", "trainjob"], "--launcher trainjob needs nodes"),
        (["--profile", "p.yaml"], "--profile says where a job runs, which is not asked for"),
        (["--nodes", "2"], "2 nodes are asked for"),
        (["--launcher", "trainjob", "--profile", "none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_wrong_use_of_the_command_is_one_line_with_a_fix(
    tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    assert main(["train", str(MICRO), "--workspace", str(tmp_path / "ws"), *words]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert message in first
    assert second.startswith("  fix: ")


class Nodes:
    """Two nodes of this machine, and the command that trains on them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.trainer = FakeTrainer(cluster, run=True)
        self.workspace = folder / "ws"
        self.profile = folder / "profile.yaml"
        values = {"launcher": "trainjob", "image": "nvila:1", "nodes": 2, "claims": {"work": str(folder)}}
        # Each process would take both cores.
        values["env"] = {"OMP_NUM_THREADS": "1"}
        self.profile.write_text(yaml.safe_dump({"tasks": {"train": values}}), encoding="utf-8")

    def train(self, *words: str) -> int:
        return main([
            "train", str(MICRO), "curate=null", "train.precision=fp32", "train.stages.vision=null",
            "train.stages.instruct=null", "train.checkpoints.every_steps=1", *words,
            "--launcher", "trainjob", "--profile", str(self.profile), "--workspace", str(self.workspace), "--json",
        ])  # fmt: skip

    def checkpoint(self) -> Path | None:
        return next(iter(self.workspace.glob("artifacts/**/.checkpoints/*/step-*")), None)


@pytest.fixture
def nodes(kubernetes_cluster: Cluster, tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(kubernetes_cluster, tmp_path.resolve())
    yield made
    made.trainer.close()


@pytest.mark.slow
def test_two_nodes_train_one_model(nodes: Nodes, capsys: Any) -> None:
    assert nodes.train() == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (Path(done["path"]) / "model").is_dir()
    assert nodes.trainer.attempts == 1
    assert nodes.cluster.all(GROUP, JOBS) == []
    # Every process of the group was on a node of its own.
    states = json.loads((Path(done["path"]) / "metrics.jsonl").read_text().splitlines()[0])
    assert states["stage"] == "base"
    # Training on this machine finds the same work done: where it ran is not part of the result.
    assert main(["train", str(MICRO), "curate=null", "train.precision=fp32", "train.stages.vision=null",
                 "train.stages.instruct=null", "--workspace", str(nodes.workspace), "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == done["digest"]


@pytest.mark.slow
def test_a_lost_node_is_named_and_the_same_command_goes_on_from_the_checkpoint(nodes: Nodes, capsys: Any) -> None:
    words = ["train.stages.base.steps=60", "train.stages.align=null"]

    def lose() -> None:
        while nodes.checkpoint() is None:
            time.sleep(0.05)
        nodes.trainer.lose(nodes.trainer.pod_names()[1])

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    assert nodes.train(*words) == 75
    thread.join(10)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]
    assert said.startswith("node 1 (on machine-1) was lost: DeletionByTaintManager")
    assert nodes.checkpoint() is not None
    # With one node less, and the same name: that is what is left.
    assert nodes.train(*words, "--nodes", "1") == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert nodes.trainer.attempts == 2
    lines = [json.loads(line) for line in (Path(done["path"]) / "metrics.jsonl").read_text().splitlines()]
    steps = Counter(line["step"] for line in lines if "step" in line)
    assert set(steps.values()) == {1}
    assert "stage base goes on from its checkpoint after step" in "".join(
        path.read_text() for path in nodes.workspace.glob("runs/*/events.jsonl")
    )
