"""The API of Kubeflow Pipelines, through its own client: upload, runs, schedules and logs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError, nearest
from nvila_platform.settings import Settings

# Seconds, minutes, hours, day, month, weekday.
_CRON = re.compile(r"(\S+\s+){5}\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """One run, as the API tells of it."""

    run_id: str
    name: str
    state: str
    created_at: str
    error: str = ""


def check_cron(text: str) -> str:
    """Return a schedule in Kubeflow's form.

    Raises:
        ConfigError: It has another form.
    """
    if not _CRON.fullmatch(text.strip()):
        raise ConfigError(
            f"{text!r} is no schedule", 'write six fields, seconds first: "0 0 2 * * *" is every day at two'
        )
    return text.strip()


class KubeflowApi:
    """Talks to the endpoint that the settings name.

    Args:
        settings: Endpoint, token and namespace.
        experiment: Experiment of new runs.

    Raises:
        ConfigError: No endpoint is named.
    """

    def __init__(self, settings: Settings, experiment: str) -> None:
        if not settings.kfp_endpoint:
            raise ConfigError("NVILA_KFP_ENDPOINT is not set", "name the API of Kubeflow Pipelines, or use --endpoint")
        self._endpoint, self._namespace = settings.kfp_endpoint, settings.kfp_namespace or None
        self._experiment = experiment
        # It would tell of every try before the one error that says what to do.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        with self._failures("connecting"):
            from kfp import client

            # Without a namespace the client asks the service whether it needs one; "kubeflow" is its own default.
            self._client = client.Client(
                host=settings.kfp_endpoint,
                existing_token=settings.kfp_token or None,
                namespace=settings.kfp_namespace or "kubeflow",
            )

    def upload(self, package: Path, name: str, version: str) -> tuple[str, str]:
        """Upload a package as a version of a pipeline, which is made when it is new.

        Returns:
            The ids of the pipeline and of its version.
        """
        with self._failures(f"uploading pipeline '{name}'"):
            known = self._pipeline_id(name)
            if known is None:
                known = str(self._client.upload_pipeline(str(package), name, namespace=self._namespace).pipeline_id)
            made = self._client.upload_pipeline_version(str(package), version, pipeline_id=known)
        return known, str(made.pipeline_version_id)

    def submit(self, package: Path, name: str, arguments: Mapping[str, Any], *, service_account: str | None) -> str:
        """Start a run; returns its id."""
        with self._failures(f"starting run '{name}'"):
            made = self._client.create_run_from_pipeline_package(
                str(package),
                arguments=dict(arguments),
                run_name=name,
                experiment_name=self._experiment,
                namespace=self._namespace,
                service_account=service_account,
            )
        return str(made.run_id)

    def schedule(
        self, package: Path, name: str, cron: str, arguments: Mapping[str, Any], *, service_account: str | None
    ) -> str:
        """Start runs again and again, one at a time; returns the id of the schedule."""
        with self._failures(f"scheduling '{name}'"):
            experiment = self._client.create_experiment(self._experiment, namespace=self._namespace)
            made = self._client.create_recurring_run(
                experiment_id=experiment.experiment_id,
                job_name=name,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                pipeline_package_path=str(package),
                params=dict(arguments),
                service_account=service_account,
            )
        return str(made.recurring_run_id)

    def runs(self, limit: int) -> list[PipelineRun]:
        """Return the newest runs."""
        with self._failures("listing runs"):
            found = self._client.list_runs(page_size=limit, sort_by="created_at desc", namespace=self._namespace)
        return [_run(one) for one in found.runs or []]

    def logs(self, run_id: str) -> Iterator[str]:
        """Yield the state of each task of a run, followed by what it wrote."""
        with self._failures(f"reading run '{run_id}'"):
            run = self._client.get_run(run_id)
        details = run.run_details.task_details if run.run_details is not None else []
        for task in details or []:
            if not task.pod_name:
                continue
            yield f"== {task.display_name}: {task.state}"
            with self._failures(f"reading the log of task '{task.display_name}'"):
                path = f"/apis/v1alpha1/runs/{run_id}/nodes/{task.pod_name}/log"
                answer = self._client._run_api.api_client.call_api(
                    path, "GET", response_type="str", auth_settings=["Bearer"], _return_http_data_only=True
                )
            yield from str(answer).splitlines()
        if run.error is not None and run.error.message:
            yield f"== the run failed: {run.error.message}"

    def stop(self, run_id: str) -> None:
        """Terminate a run; its tasks get SIGTERM, and training saves a checkpoint."""
        with self._failures(f"stopping run '{run_id}'"):
            self._client.terminate_run(run_id)

    def link(self, run_id: str) -> str:
        """Return the address of a run in the UI."""
        return f"{self._endpoint}/#/runs/details/{run_id}"

    def _pipeline_id(self, name: str) -> str | None:
        equal = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        found = self._client.list_pipelines(filter=json.dumps(equal), namespace=self._namespace).pipelines or []
        return str(found[0].pipeline_id) if found else None

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Turn what the client raises into typed errors; its chatter goes to standard error."""
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ApiException as e:
            raise self._typed(e, what) from e
        except HTTPError as e:
            raise InfrastructureError(
                f"{what}: {self._endpoint} cannot be reached: {type(e).__name__}", "check NVILA_KFP_ENDPOINT"
            ) from e

    def _typed(self, error: Any, what: str) -> NvilaError:
        status, said = int(error.status or 0), _said(error)
        if status == 401:
            return ConfigError(
                f"{what}: the token is missing, wrong or expired: {said}",
                "get a new one and set NVILA_KFP_TOKEN (kubectl create token ACCOUNT)",
            )
        if status == 403:
            where = f"in namespace '{self._namespace}'" if self._namespace else "there (no NVILA_KFP_NAMESPACE is set)"
            return CapabilityError(f"{what}: no rights {where}: {said}", "ask the namespace's owner for this right")
        if status == 404:
            return ConfigError(f"{what}: not found: {said}", "see nvila pipeline list")
        if 400 <= status < 500:
            return ConfigError(f"{what}: refused: {said}", "mend the value that it names")
        return InfrastructureError(f"{what}: the service failed with {status}: {said}", "try again later")


def arguments_of(package: Path, words: list[str]) -> dict[str, Any]:
    """Return the parameters of a package that `key=value` words set, with the types that it declares.

    Raises:
        ConfigError: A parameter is unknown, missing, or has another type; the message names it.
    """
    spec = next(iter(yaml.safe_load_all(package.read_text(encoding="utf-8"))))
    declared: dict[str, Any] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    found: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"'{word}' is no parameter", "write name=value")
        if name not in declared:
            raise ConfigError(f"the pipeline has no parameter '{name}'", nearest(name, declared))
        found[name] = _value(name, text, declared[name]["parameterType"])
    for name, one in declared.items():
        if name not in found and not one.get("isOptional") and "defaultValue" not in one:
            raise ConfigError(f"parameter '{name}' is missing", f"add {name}=...: {one.get('description', '')}")
    return found


def _value(name: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"parameter {name}={text!r} is no {kind.lower()}", "write it as JSON") from e
    types: dict[str, type | tuple[type, ...]] = {
        "LIST": list,
        "STRUCT": dict,
        "BOOLEAN": bool,
        "NUMBER_INTEGER": int,
        "NUMBER_DOUBLE": (int, float),
    }
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise ConfigError(f"parameter {name}={text!r} is no {kind.lower()}", "write it as JSON")
    return value


def version_resource(package: Path, name: str, version: str, namespace: str) -> list[dict[str, Any]]:
    """Return the custom resources `Pipeline` and `PipelineVersion` of a package, for GitOps."""
    documents = list(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    slug = re.sub(r"[^a-z0-9]+", "-", version.lower()).strip("-")
    place = {"namespace": namespace} if namespace else {}
    spec: dict[str, Any] = {"pipelineName": name, "displayName": version, "pipelineSpec": documents[0]}
    if len(documents) > 1:
        spec["platformSpec"] = documents[1]
    kind = "pipelines.kubeflow.org/v2beta1"
    about = documents[0].get("pipelineInfo", {}).get("description", "")
    return [
        {
            "apiVersion": kind,
            "kind": "Pipeline",
            "metadata": {"name": name, **place},
            "spec": {"displayName": name, "description": about},
        },
        {
            "apiVersion": kind,
            "kind": "PipelineVersion",
            "metadata": {"name": f"{name}-{slug}", **place},
            "spec": spec,
        },
    ]


def _run(one: Any) -> PipelineRun:
    return PipelineRun(
        run_id=str(one.run_id),
        name=str(one.display_name),
        state=str(one.state or "PENDING"),
        created_at=str(one.created_at or ""),
        error=str(one.error.message) if one.error is not None and one.error.message else "",
    )


def _said(error: Any) -> str:
    try:
        said = json.loads(error.body)
        return str(said.get("message") or said.get("error") or said)[:300]
    except (ValueError, TypeError, AttributeError):
        return str(error.body or error.reason or "no reason given").strip()[:300]
