"""Compose and Kubernetes files: what a cluster or an engine would refuse, and what would silently not match."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pydantic
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

from energylens_vllm.dashboards.rules import rule_groups

FOLDER = Path(__file__).parents[2] / "dashboards"
COMPOSE = FOLDER / "compose" / "docker-compose.yml"
API = {
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
}
KUBERNETES = "1.34"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+")


@functools.cache
def documents() -> list[dict[str, Any]]:
    return [d for path in sorted((FOLDER / "kubernetes").glob("*.yml")) for d in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


def refused(document: dict[str, Any]) -> str | None:
    """What Kubernetes' own schema, or the models made of the operator's, have against it."""
    try:
        if document["apiVersion"].startswith("monitoring."):
            model = getattr(prometheus_operator, document["kind"])
            understood = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
            return None if understood == document else "unknown keys"
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return None
    except (kubernetes_validate.ValidationError, pydantic.ValidationError) as error:
        return str(error)


@pytest.mark.parametrize("document", documents(), ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_schemas_accept_it(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == API[document["kind"]]
    assert refused(document) is None
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    for name, value in document["metadata"]["labels"].items():
        assert re.fullmatch(r"([a-z0-9.-]+/)?[\w.-]{1,63}", name)
        assert isinstance(value, str)
    assert len(json.dumps(document)) < 2**20  # etcd takes no more


@pytest.mark.parametrize(
    ("kind", "path", "key", "value"),
    [
        ("PodMonitor", "spec.podMetricsEndpoints.0", "intervall", "5s"),
        ("PodMonitor", "spec", "selector", "all"),
        ("PrometheusRule", "spec.groups.0.rules.0", "exprr", "1"),
        ("PrometheusRule", "spec.groups.1.rules.0", "labels", ["severe"]),
        ("ConfigMap", "data", "x.json", 1),
        ("Deployment", "spec.template.spec.containers.0", "imagee", "x"),
        ("Deployment", "spec", "replicas", "one"),
    ],
)
def test_schemas_refuse_what_is_wrong(kind: str, path: str, key: str, value: object) -> None:
    document = copy.deepcopy(of_kind(kind)[0])
    at: Any = document
    for part in path.split("."):
        at = at[int(part)] if part.isdigit() else at[part]
    at[key] = value
    assert refused(document)


def test_there_is_one_of_each_and_a_map_for_each_dashboard() -> None:
    assert len(of_kind("PodMonitor")) == len(of_kind("PrometheusRule")) == len(of_kind("Deployment")) == 1
    files = {name: text for document in of_kind("ConfigMap") for name, text in document["data"].items()}
    assert files == {path.name: path.read_text() for path in (FOLDER / "grafana").iterdir()}
    assert all(document["metadata"]["labels"]["grafana_dashboard"] == "1" for document in of_kind("ConfigMap"))


def test_the_monitor_finds_the_pods() -> None:
    (monitor,), (deployment,) = of_kind("PodMonitor"), of_kind("Deployment")
    pod = deployment["spec"]["template"]
    for selector in (monitor["spec"]["selector"], deployment["spec"]["selector"]):
        assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert f"--port={ports[endpoint['port']]}" in container["args"]
    assert container["readinessProbe"]["httpGet"]["port"] in ports


def test_the_plugin_is_where_python_looks_for_it() -> None:
    (deployment,) = of_kind("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (init,), (container,) = pod["initContainers"], pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for one in (init, container):
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
        assert PINNED.fullmatch(one["image"])
    path = next(mount["mountPath"] for mount in init["volumeMounts"] if mount["name"] == "plugin")
    assert f"--target={path}" in init["command"]
    assert {"name": "PYTHONPATH", "value": path} in container["env"]
    assert init["image"] == container["image"]  # the same Python


def test_the_rules_are_the_same_everywhere() -> None:
    (resource,) = of_kind("PrometheusRule")
    file = yaml.safe_load((FOLDER / "prometheus" / "energylens.rules.yml").read_text())
    assert resource["spec"] == file == rule_groups()


def test_compose_is_pinned_and_on_loopback() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services.keys() == {"prometheus", "grafana"}
    for service in services.values():
        assert PINNED.fullmatch(service["image"])
        assert service["network_mode"] == "host"
    (listen,) = [a for a in services["prometheus"]["command"] if a.startswith("--web.listen-address=")]
    assert listen.startswith("--web.listen-address=127.0.0.1:")
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    source = yaml.safe_load((COMPOSE.parent / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://" + listen.partition("=")[2]


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    mounts = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (COMPOSE.parent / source).is_dir()
                mounts[target] = COMPOSE.parent / source
    config = next(a for a in services["prometheus"]["command"] if a.startswith("--config.file=")).partition("=")[2]
    assert (mounts[str(Path(config).parent)] / Path(config).name).is_file()
    provider = yaml.safe_load((COMPOSE.parent / "provisioning/dashboards/energylens.yml").read_text())["providers"][0]
    assert list(mounts[provider["options"]["path"]].glob("*.json"))
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[str(home.parent)] / home.name).is_file()


@pytest.mark.compose
def test_compose_accepts_it(tmp_path: Path) -> None:
    def check(file: Path) -> int:
        return subprocess.run(["docker-compose", "-f", str(file), "config", "-q"], capture_output=True).returncode

    assert check(COMPOSE) == 0
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("network_mode:", "network_mood:"))
    assert check(broken) != 0


@pytest.mark.prometheus
def test_prometheus_accepts_its_configuration() -> None:
    file = FOLDER / "prometheus" / "prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
