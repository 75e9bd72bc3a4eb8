"""Configuration that runs it all: Prometheus alone, docker-compose with Grafana, and Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from energylens_vllm import __version__

PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:12.1.1"
VLLM_IMAGE = "vllm/vllm-openai:v0.25.1"
VLLM_PORT, PROMETHEUS_PORT, GRAFANA_PORT = 8000, 9090, 3000
RULES_FILE = "energylens.rules.yml"
SCRAPE_INTERVAL = "5s"
_POD_LABELS = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/part-of": "energylens"}
_PORT_NAME = "http"


def prometheus_config(targets: list[str], rules: str = RULES_FILE) -> dict[str, Any]:
    """prometheus.yml that scrapes vLLM's API servers at `targets`; `rules` is relative to that file."""
    return {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": "30s"},
        "rule_files": [rules],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": targets}]}],
    }


def compose() -> dict[str, Any]:
    """docker-compose.yml. Both run in the host's network, so that they reach a vLLM that listens on loopback only, and
    listen on loopback themselves."""
    return {
        "services": {
            "prometheus": {
                "image": PROMETHEUS_IMAGE,
                "network_mode": "host",
                "restart": "unless-stopped",
                "command": [
                    "--config.file=/etc/prometheus/prometheus.yml",
                    "--storage.tsdb.path=/prometheus",
                    "--storage.tsdb.retention.time=30d",
                    f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}",
                ],
                "volumes": ["../prometheus:/etc/prometheus:ro", "prometheus:/prometheus"],
            },
            "grafana": {
                "image": GRAFANA_IMAGE,
                "network_mode": "host",
                "restart": "unless-stopped",
                "environment": {
                    "GF_SERVER_HTTP_ADDR": "127.0.0.1",
                    "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
                    "GF_AUTH_ANONYMOUS_ENABLED": "true",
                    "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                    "GF_ANALYTICS_REPORTING_ENABLED": "false",
                    "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
                    "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/etc/energylens/energylens-overview.json",
                },
                "volumes": [
                    "./provisioning:/etc/grafana/provisioning:ro",
                    "../grafana:/etc/energylens:ro",
                    "grafana:/var/lib/grafana",
                ],
                "depends_on": ["prometheus"],
            },
        },
        "volumes": {"prometheus": {}, "grafana": {}},
    }


def grafana_datasources() -> dict[str, Any]:
    """Grafana's provisioning of the data source."""
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": f"http://127.0.0.1:{PROMETHEUS_PORT}",
        "isDefault": True,
        "jsonData": {"timeInterval": SCRAPE_INTERVAL},
    }
    return {"apiVersion": 1, "datasources": [source]}


def grafana_providers() -> dict[str, Any]:
    """Grafana's provisioning of the dashboards."""
    provider = {
        "name": "energylens",
        "folder": "Energy",
        "type": "file",
        "disableDeletion": True,
        "options": {"path": "/etc/energylens"},
    }
    return {"apiVersion": 1, "providers": [provider]}


def pod_monitor() -> dict[str, Any]:
    """What the Prometheus operator scrapes: each pod's own engines, so `instance` is the replica."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "vllm-energylens", "labels": _POD_LABELS},
        "spec": {
            "selector": {"matchLabels": _POD_LABELS},
            "podMetricsEndpoints": [{"port": _PORT_NAME, "path": "/metrics", "interval": "15s"}],
        },
    }


def prometheus_rule(groups: Mapping[str, Any]) -> dict[str, Any]:
    """The rules for the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "energylens", "labels": {"app.kubernetes.io/part-of": "energylens"}},
        "spec": dict(groups),
    }


def dashboard_config_map(file: str, text: str) -> dict[str, Any]:
    """A dashboard for Grafana's sidecar, which takes ConfigMaps with the label `grafana_dashboard`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": file.removesuffix(".json"),
            "labels": {"grafana_dashboard": "1", "app.kubernetes.io/part-of": "energylens"},
        },
        "data": {file: text},
    }


def deployment() -> dict[str, Any]:
    """One vLLM replica with the plugin, which an init container installs beside the image's own packages."""
    plugin = {"name": "plugin", "mountPath": "/plugin"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "vllm", "labels": _POD_LABELS},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": _POD_LABELS},
            "template": {
                "metadata": {"labels": _POD_LABELS},
                "spec": {
                    "initContainers": [
                        {
                            "name": "energylens",
                            "image": VLLM_IMAGE,
                            # The image has the plugin's own dependencies: they are vLLM's too.
                            "command": ["pip", "install", "--no-deps", "--target=/plugin"],
                            "args": [f"energylens-vllm=={__version__}"],
                            "volumeMounts": [plugin],
                        }
                    ],
                    "containers": [
                        {
                            "name": "vllm",
                            "image": VLLM_IMAGE,
                            "args": ["--model=Qwen/Qwen3-8B", "--plugin=energylens", f"--port={VLLM_PORT}"],
                            "env": [{"name": "PYTHONPATH", "value": "/plugin"}],
                            "ports": [{"name": _PORT_NAME, "containerPort": VLLM_PORT}],
                            "readinessProbe": {
                                "httpGet": {"path": "/health", "port": _PORT_NAME},
                                "periodSeconds": 10,
                            },
                            "resources": {"limits": {"nvidia.com/gpu": 1}},
                            "volumeMounts": [plugin, {"name": "shm", "mountPath": "/dev/shm"}],
                        }
                    ],
                    "volumes": [
                        {"name": "plugin", "emptyDir": {}},
                        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
                    ],
                },
            },
        },
    }
