"""The files in deploy/, against the schemas of Kubernetes, systemd's own check, and the project."""

import copy
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml

import process
from native import servers
from tests import test_observability
from tests.stack import SETTINGS

KUBERNETES = servers.HERE / "deploy/kubernetes"
SYSTEMD = servers.HERE / "deploy/systemd"
VERSIONS = ("1.30", "1.37")  # preStop's sleep came with 1.30
OF_OPERATORS = {"Cluster", "PodMonitor", "RabbitmqCluster", "ScaledObject"}
SPARE_SECONDS = 10  # from STOP_SECONDS to the kill


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """Parse the documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


[KUSTOMIZATION] = load(KUBERNETES / "kustomization.yaml")
OBJECTS = [
    document
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in load(path)
]
CORE = [each for each in OBJECTS if each["kind"] not in OF_OPERATORS]
PODS = {
    each["metadata"]["name"]: each["spec"]["template"]["spec"]
    for each in OBJECTS
    if each["kind"] == "Deployment"
}
UNITS = {path.name: path.read_text() for path in SYSTEMD.glob("*.service")}


def named(kind: str, name: str) -> Any:
    """Return the spec of an object."""
    [found] = [
        each for each in OBJECTS if each["kind"] == kind and each["metadata"]["name"] == name
    ]
    return found["spec"]


def container(role: str) -> dict[str, Any]:
    """Return the one container of a pod."""
    [found] = PODS[role]["containers"]
    return found


def settings(role: str) -> dict[str, str]:
    """Return the settings of a pod whose values are written down."""
    maps = {
        each["name"]: dict(line.split("=", 1) for line in each["literals"])
        for each in KUSTOMIZATION["configMapGenerator"]
    }
    found = {each["name"]: each.get("value", "") for each in container(role)["env"]}
    for source in container(role)["envFrom"]:
        found |= maps[source["configMapRef"]["name"]]
    return found


def secrets(role: str) -> dict[str, tuple[str, str]]:
    """Return the settings of a pod that come from a Secret, each with its name and key."""
    references = {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in container(role)["env"]
        if "valueFrom" in each
    }
    return {name: (each["name"], each["key"]) for name, each in references.items()}


def unit_settings(text: str) -> dict[str, list[str]]:
    """Return the settings of a unit file, each with the values that it is given."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.match(r"\w+=", line):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.pure
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    assert {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"} < {
        each["kind"] for each in CORE
    }
    for each in CORE:
        kubernetes_validate.validate(each, version, strict=True)
        wrong = copy.deepcopy(each)
        wrong["spec" if "spec" in each else "metadata"]["replica"] = 2
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.pure
def test_every_manifest_is_applied() -> None:
    [component] = load(KUBERNETES / "autoscaling/kustomization.yaml")
    for folder, listed in ((KUBERNETES, KUSTOMIZATION), (KUBERNETES / "autoscaling", component)):
        there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert set(listed["resources"]) == there
    [namespace] = [each["metadata"]["name"] for each in CORE if each["kind"] == "Namespace"]
    assert namespace == KUSTOMIZATION["namespace"]


@pytest.mark.pure
@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_every_variable_of_a_pod_is_a_setting(role: str) -> None:
    assert settings(role).keys() <= SETTINGS
    assert (
        set(secrets(role))
        == {
            "producer": {"DATABASE_URL", "RABBITMQ_URL", "API_TOKEN", "READ_TOKEN"},
            "consumer": {"RABBITMQ_URL", "API_TOKEN"},
        }[role]
    )
    for shared in ("SENT_TIMEOUT_SECONDS", "LEASE_SECONDS", "STOP_SECONDS"):
        assert shared in settings(role)


@pytest.mark.pure
@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_a_pod_is_killed_ten_seconds_after_it_should_have_stopped(role: str) -> None:
    stop = float(settings(role)["STOP_SECONDS"] or process.STOP_SECONDS)
    hooks = container(role).get("lifecycle", {})
    before = hooks["preStop"]["sleep"]["seconds"] if hooks else 0
    assert PODS[role]["terminationGracePeriodSeconds"] == before + stop + SPARE_SECONDS


@pytest.mark.pure
def test_the_images_are_those_that_are_published() -> None:
    script = (servers.HERE / "publish.sh").read_text()
    [form] = re.findall(r"^image=\$\{REGISTRY:-([^}]+)\}/tasks-\$name:\$tag$", script, re.M)
    images = {each["name"]: each for each in KUSTOMIZATION["images"]}
    assert {container(role)["image"] for role in PODS} == images.keys()
    for role in PODS:
        assert (servers.HERE / f"publish_{role}.sh").exists()
        image = images[f"tasks-{role}"]
        assert image["newName"] == f"{form}/tasks-{role}"
        assert image["newTag"] == process.VERSION, "the version of process.py"


@pytest.mark.pure
@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_a_pod_is_as_locked_up_as_in_compose(role: str) -> None:
    pod, inside = PODS[role]["securityContext"], container(role)["securityContext"]
    assert pod["runAsNonRoot"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    user = f"USER {pod['runAsUser']}:{pod['runAsGroup']}"
    assert user in (servers.HERE / f"Dockerfile.{role}").read_text()
    assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"]
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert container(role)["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    compose = test_observability.COMPOSE["services"][role]["mem_limit"]
    limit = container(role)["resources"]["limits"]["memory"]
    assert re.search(r"\dg", compose).group() == limit.lower().removesuffix("i")


@pytest.mark.pure
def test_the_probes_ask_what_the_images_do() -> None:
    producer = container("producer")
    assert producer["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert producer["livenessProbe"]["httpGet"]["path"] == "/healthz"
    [command] = container("consumer")["readinessProbe"]["exec"]["command"][2:]
    check = (servers.HERE / "Dockerfile.consumer").read_text().partition("HEALTHCHECK")[2]
    assert command.strip().splitlines()[-1].replace('"', "'") in check
    assert "livenessProbe" not in container("consumer")


@pytest.mark.pure
def test_selectors_find_their_pods() -> None:
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in OBJECTS
        if each["kind"] == "Deployment"
    }
    for role, own in labels.items():
        assert named("Deployment", role)["selector"]["matchLabels"] == own
        assert named("PodDisruptionBudget", role)["selector"]["matchLabels"] == own
        assert named("NetworkPolicy", role)["podSelector"]["matchLabels"] == own
        for spread in PODS[role]["topologySpreadConstraints"]:
            assert spread["labelSelector"]["matchLabels"] == own
    service = named("Service", "producer")
    assert service["selector"] == labels["producer"]
    [port] = service["ports"]
    assert settings("consumer")["PRODUCER_URL"] == f"http://producer:{port['port']}"
    assert container("producer")["ports"][0]["name"] == port["targetPort"]
    assert named("ScaledObject", "consumer")["scaleTargetRef"] == {"name": "consumer"}


@pytest.mark.pure
def test_the_operators_make_what_the_pods_use() -> None:
    named("Cluster", "postgres")
    named("RabbitmqCluster", "rabbit")
    assert secrets("producer")["DATABASE_URL"] == ("postgres-app", "uri")
    for role in PODS:
        assert secrets(role)["RABBITMQ_URL"] == ("rabbit-default-user", "connection_string")


@pytest.mark.pure
def test_the_servers_are_set_up_as_in_compose() -> None:
    rabbit = named("RabbitmqCluster", "rabbit")
    text = (servers.HERE / "rabbitmq.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert rabbit["rabbitmq"]["additionalConfig"].splitlines()[: len(lines)] == lines
    assert f"FROM {rabbit['image']}\n" in (servers.HERE / "Dockerfile.rabbit").read_text()
    limit = test_observability.COMPOSE["services"]["rabbit"]["mem_limit"]
    assert rabbit["resources"]["limits"]["memory"].lower() == f"{limit}i"
    compose = test_observability.COMPOSE["services"]["postgres"]
    cluster = named("Cluster", "postgres")
    version = cluster["imageName"].partition(":")[2].partition("-")[0]
    assert compose["image"] == f"postgres:{version}"
    wal = {name: servers.POSTGRES_SETTINGS[name] for name in ("max_wal_size", "wal_compression")}
    assert cluster["postgresql"]["parameters"] == wal
    words = [word for name, value in wal.items() for word in ("-c", f"{name}={value}")]
    assert compose["command"] == ["postgres", *words]


@pytest.mark.pure
def test_the_autoscaler_asks_for_a_max_of_what_is_served() -> None:
    [trigger] = named("ScaledObject", "consumer")["triggers"]
    query = trigger["metadata"]["query"]
    assert "sum" not in query and query.count("max(") == 2
    checked = set[str]().union(
        *map(test_observability.used, test_observability.expressions())
    )  # a test there compares these with a producer's answer
    assert test_observability.used(query) <= checked


@pytest.mark.pure
def test_every_variable_of_the_units_is_a_setting() -> None:
    for role in ("producer", "consumer"):
        lines = (SYSTEMD / f"{role}.env").read_text().splitlines()
        names = {line.partition("=")[0] for line in lines if not line.startswith("#")}
        assert names and names <= SETTINGS
        [unit] = [text for name, text in UNITS.items() if role in name]
        assert unit_settings(unit)["EnvironmentFile"] == [f"/etc/tasks/{role}.env"]


@pytest.mark.pure
def test_units_restart_and_stop_as_the_scripts_need() -> None:
    assert UNITS.keys() == {"tasks-producer.service", "tasks-consumer@.service"}
    for text in UNITS.values():
        unit = unit_settings(text)
        assert unit["Restart"] == ["always"] and unit["RestartPreventExitStatus"] == ["2"]
        assert unit["KillMode"] == ["mixed"]
        assert unit["TimeoutStopSec"] == [f"{process.STOP_SECONDS + SPARE_SECONDS:g}"]
        assert unit["DynamicUser"] == ["yes"] and unit["ProtectSystem"] == ["strict"]
    # Without it no worker starts: seen in a real run, which systemd-analyze cannot foretell.
    filters = unit_settings(UNITS["tasks-consumer@.service"])["SystemCallFilter"]
    assert filters[-1] == "capset"


if shutil.which("systemd-analyze") or "CI" in os.environ:  # there its absence is a failure

    @pytest.mark.pure
    @pytest.mark.parametrize("name", sorted(UNITS))
    def test_systemd_knows_every_line(name: str, tmp_path: pathlib.Path) -> None:
        installed = "/opt/tasks/.venv/bin/python"
        assert installed in UNITS[name]
        unit = tmp_path / name
        unit.write_text(UNITS[name].replace(installed, sys.executable))
        verify = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(verify, capture_output=True, text=True)
        assert done.returncode == 0 and "tasks-" not in done.stderr, done.stderr
        unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMod=mixed"))
        assert "KillMod" in subprocess.run(verify, capture_output=True, text=True).stderr
