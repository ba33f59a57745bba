"""The files of cluster_configs: the environment is that of `atoll up`, the rest passes the schemas that there are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.cli.main import cli
from orchestrator.cluster.env_file import LEFT_OUT, env_file
from orchestrator.cluster.ray_node import WAN_PROFILE, cluster_environment
from orchestrator.config import load_config
from orchestrator.processes import WORKER_RESOURCE

FILES = Path(__file__).resolve().parents[3] / "cluster_configs"


@pytest.mark.parametrize(("name", "wan"), [("lan", False), ("wan", True)])
def test_environment_is_that_of_atoll_up(name: str, wan: bool) -> None:
    text = (FILES / "env" / f"{name}.env").read_text()
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = dict(line[0].split("=", 1) for line in lines if line)
    wanted = cluster_environment(Path("token"), wan=wan)
    assert found == {key: value for key, value in wanted.items() if key not in LEFT_OUT}
    assert text == env_file(wan=wan), "python -m orchestrator.cluster.env_file"
    assert (WAN_PROFILE.keys() <= found.keys()) == wan


def on_premise() -> dict[str, Any]:
    loaded = yaml.safe_load((FILES / "ray-up" / "on-premise.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_accepts_the_on_premise_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(on_premise())
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"local.cluster.node"}
    wrong = prepare_config({**on_premise(), "min_worker": 2})
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_commands_of_ray_have_options_that_ray_knows() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    config = on_premise()
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        words = shlex.split(command.partition("ray start ")[2])
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known and used
        resources = next(word for word in words if word.startswith("--resources=")).partition("=")[2]
        assert json.loads(resources) == {WORKER_RESOURCE: 1}
        assert "cluster_configs/env/wan.env" in command and "RAY_AUTH_TOKEN_PATH" in command
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


# ---------------------------------------------------------------- KubeRay


def strict(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object that has these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9.]+(m|k|Ki|Mi|Gi|Ti|M|G|T)?$"},
}
# Of the Kubernetes core API (v1): what we use of a pod.
CONTAINER = strict(
    "name image",
    name=TEXT,
    image=TEXT,
    ports=many(strict("containerPort", containerPort=NUMBER, name={"type": "string", "maxLength": 15})),
    env=many(strict("name", name=TEXT, value=TEXT)),
    resources=strict(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=many(strict("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = strict("name", name=TEXT, persistentVolumeClaim=strict("claimName", claimName=TEXT, readOnly=FLAG))
POD = strict(
    "spec",
    metadata=strict(labels=TEXTS, annotations=TEXTS),
    spec=strict("containers", containers=many(CONTAINER), volumes=many(VOLUME), terminationGracePeriodSeconds=NUMBER),
)
# Of KubeRay's API reference, ray.io/v1: all scalar fields of the resources that we use.
HEAD = strict(
    "template rayStartParams",
    template=POD,
    rayStartParams=TEXTS,
    enableIngress=FLAG,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)
WORKERS = strict(
    "groupName template rayStartParams",
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    idleTimeoutSeconds=NUMBER,
    numOfHosts=NUMBER,
    suspend=FLAG,
    rayStartParams=TEXTS,
    template=POD,
)
CLUSTER_SPEC = strict(
    "headGroupSpec",
    rayVersion=TEXT,
    suspend=FLAG,
    managedBy=TEXT,
    enableInTreeAutoscaling=FLAG,
    headServiceAnnotations=TEXTS,
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
)
JOB_SPEC = strict(
    "entrypoint",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    suspend=FLAG,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    rayClusterSpec=CLUSTER_SPEC,
)
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50}


def manifest(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    meta = strict("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    return strict(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=meta,
        spec=spec,
    )


@pytest.mark.parametrize(
    ("file", "schema"),
    [("raycluster", manifest("RayCluster", CLUSTER_SPEC)), ("rayjob", manifest("RayJob", JOB_SPEC))],
)
def test_kuberay_manifests_have_the_fields_of_its_api(file: str, schema: dict[str, Any]) -> None:
    loaded = yaml.safe_load((FILES / "kuberay" / f"{file}.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(loaded, schema)
    spec = loaded["spec"].get("rayClusterSpec", loaded["spec"])
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # The operator puts the value on a command line: it is quoted once more.
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {WORKER_RESOURCE: 1}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} <= volumes
    wrong = {**loaded, "spec": {**loaded["spec"], "headGroupSpecs": {}}}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(wrong, schema)


def test_the_entrypoint_of_the_job_is_a_command_that_we_have() -> None:
    loaded = yaml.safe_load((FILES / "kuberay" / "rayjob.yaml").read_text())
    words = shlex.split(loaded["spec"]["entrypoint"])
    assert words[0] == "atoll"
    import click

    name, command, rest = cli.resolve_command(click.Context(cli), words[1:])
    assert command is not None
    context = command.make_context(name, rest)
    config = load_config(context.params["run"], overrides=context.params["overrides"]).config
    ports = loaded["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert config.metrics.port in {port["containerPort"] for port in ports}


def test_the_readme_names_every_file_and_no_other() -> None:
    text = (FILES / "README.md").read_text()
    files = {str(path.relative_to(FILES)) for path in FILES.rglob("*") if path.is_file()} - {"README.md"}
    spans = set(re.findall(r"`((?:env|ray-up|kuberay|monitoring|topologies|runs)/[\w./-]*)`", text))
    for span in spans:
        assert (FILES / span).exists(), span
    folders = tuple(span for span in spans if span.endswith("/"))
    assert {file for file in files if file in spans or file.startswith(folders)} == files
