"""What is on /metrics arrives at an OTLP receiver, and nothing about that can stop a server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

pytest.importorskip("opentelemetry.proto")
sys.path.insert(0, str(Path(__file__).parent))  # receiver.py, beside this file

from receiver import Received, Series, grpc_receiver, http_receiver, on_metrics

from energylens_vllm.serving.metrics import METRICS

SENDER = Path(__file__).parent / "sender.py"


def send(endpoint: str = "-", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, str(SENDER), endpoint]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


def shown(done: subprocess.CompletedProcess[str]) -> dict[Series, float]:
    """What its /metrics would have shown."""
    assert done.returncode == 0, done.stderr
    return on_metrics(done.stdout.partition("\n")[2])


def assert_same(done: subprocess.CompletedProcess[str], received: Received) -> None:
    assert done.stdout.startswith("sends\n")
    here = shown(done)
    assert here["energylens_predicted_energy_joules", (("engine", "1"), ("model_name", "m"), ("phase", "decode"))] == 5
    assert here["energylens_step_energy_joules_count", (("engine", "1"), ("model_name", "m"))] == 4
    failures = {labels: value for (name, labels), value in here.items() if name == "energylens_plugin_failures"}
    assert sum(failures.values()) == 1
    assert {series: value for series, value in received.values.items() if series in here or value} == here
    assert len(here) > 150


def test_grpc_to_where_vllm_sends_its_traces() -> None:
    with grpc_receiver() as (endpoint, received):
        done = send(endpoint)
    assert_same(done, received)
    assert len(received.metric_requests) == 1  # at the end: the interval is a minute
    (resource,) = received.resources
    assert resource["service.name"] == "vllm"
    assert resource["service.instance.id"]


def test_each_instrument_is_a_line_of_the_table() -> None:
    with grpc_receiver() as (endpoint, received):
        send(endpoint)
    for metric in METRICS:
        sent = received.metrics.get(metric.name.removesuffix("_total"))
        if sent is None:  # nothing is known of it yet
            assert metric.type == "histogram" or not metric.from_start or not all(values for _, values in metric.labels)
            continue
        assert sent.description == metric.help
        assert (sent.WhichOneof("data"), sent.sum.is_monotonic) == {
            "counter": ("sum", True), "gauge": ("gauge", False), "histogram": ("histogram", False),
        }[metric.type]  # fmt: skip
        assert sent.unit in ("J", "s", "W", "Hz", "Cel", "") or sent.unit == f"{{{metric.unit}}}"
    assert received.metrics["energylens_predicted_energy_joules"].unit == "J"
    assert received.metrics["energylens_bias_ratio"].unit == ""


def test_http_and_an_endpoint_for_metrics_alone() -> None:
    http = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "fleet"}
    with http_receiver() as (endpoint, received):
        done = send(f"{endpoint}/v1/traces", **http)
    assert_same(done, received)
    assert received.resources[0]["service.name"] == "fleet"
    with http_receiver() as (endpoint, received):
        done = send(OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{endpoint}/v1/metrics", **http)
    assert_same(done, received)


def test_an_endpoint_for_metrics_comes_before_that_for_traces() -> None:
    with grpc_receiver() as (wanted, received), grpc_receiver() as (traces, others):
        done = send(traces, OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=wanted)
    assert_same(done, received)
    assert others.metric_requests == []


def test_api_servers_send_each_its_own_share(tmp_path: Path) -> None:
    """In Prometheus' multi-process mode, in which any of them shows the sum on /metrics."""
    key = ("energylens_predicted_energy_joules", (("engine", "1"), ("model_name", "m"), ("phase", "decode")))
    instances = set()
    for _ in range(2):
        with grpc_receiver() as (endpoint, received):
            assert_same(send(endpoint, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)), received)
        assert received.values[key] == 5
        instances |= {resource["service.instance.id"] for resource in received.resources}
    assert len(instances) == 2
    merged = CollectorRegistry()
    MultiProcessCollector(merged, str(tmp_path))
    assert on_metrics(generate_latest(merged).decode())[key] == 10


def test_nothing_is_sent_unless_there_is_an_endpoint() -> None:
    assert send().stdout.startswith("does not send\n")
    with grpc_receiver() as (endpoint, received):
        assert send(endpoint, OTEL_METRICS_EXPORTER="none").stdout.startswith("does not send\n")
        assert send(endpoint, OTEL_SDK_DISABLED="true").stdout.startswith("does not send\n")
    assert received.metric_requests == []


@pytest.mark.parametrize(
    ("endpoint", "environment", "complaint"),
    [
        ("http://127.0.0.1:1", {"OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"}, "'smoke'"),
        ("http://127.0.0.1:1/x", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "does not end in /v1/traces"),
    ],
)
def test_what_it_does_not_know_is_said_and_stops_nothing(
    endpoint: str, environment: dict[str, str], complaint: str
) -> None:
    done = send(endpoint, **environment)
    assert done.returncode == 0
    assert done.stdout.startswith("does not send\n")
    assert complaint in done.stderr


def test_a_receiver_that_is_gone_does_not_hold_up_the_end() -> None:
    start_s = time.monotonic()
    none = send("-")
    usual_s, start_s = time.monotonic() - start_s, time.monotonic()
    done = send("http://127.0.0.1:1")
    assert done.returncode == 0
    assert shown(done) == shown(none)
    assert time.monotonic() - start_s < 2 * usual_s + 10


def test_without_the_sdk_it_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('no opentelemetry here')")
    done = send("http://127.0.0.1:1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith("does not send\n")
    assert "no opentelemetry here" in done.stderr
