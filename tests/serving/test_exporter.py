"""Reports come out on /metrics, in one process and in several, and bad ones harm nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from energylens_vllm.serving.exporter import Exporter
from energylens_vllm.serving.increments import Report
from energylens_vllm.serving.metrics import MAX_SERIES_PER_ENGINE, METRICS

REPORT: Report = {
    "add": [("energylens_predicted_energy_joules_total", ("decode",), 2.5)],
    "set": [("energylens_predictor_state", ("ready",), 1.0)],
    "observe": [("energylens_step_energy_joules", (), [0.5, 2.0])],
}
LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_reports_are_added_up(registry: CollectorRegistry) -> None:
    exporter = Exporter("m", [0, 1], registry)
    exporter.export(0, [REPORT, REPORT])
    exporter.export(1, [REPORT])
    decode = LABELS | {"phase": "decode"}
    assert registry.get_sample_value("energylens_predicted_energy_joules_total", decode) == 5.0
    assert registry.get_sample_value("energylens_predicted_energy_joules_total", decode | {"engine": "1"}) == 2.5
    assert registry.get_sample_value("energylens_predicted_energy_joules_total", decode | {"phase": "prefill"}) == 0.0
    assert registry.get_sample_value("energylens_predictor_state", LABELS | {"state": "ready"}) == 1.0
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) == 4.0
    assert registry.get_sample_value("energylens_step_energy_joules_bucket", LABELS | {"le": "1.0"}) == 2.0


def test_every_metric_is_there_before_the_first_report(registry: CollectorRegistry) -> None:
    Exporter("m", [0], registry).set_build_info("1", "2")
    families = {family.name for family in registry.collect() if family.samples}
    # The labels of these come with the first report.
    late = {metric.name.removesuffix("_total") for metric in METRICS if not list(metric.known_label_values())}
    late.remove("energylens_build_info")
    assert families == {metric.name.removesuffix("_total") for metric in METRICS} - late


def test_a_second_exporter_goes_on_with_the_same_counters(registry: CollectorRegistry) -> None:
    Exporter("m", [0], registry).export(0, [REPORT])
    Exporter("m", [0], registry).export(0, [REPORT])
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) == 4.0


def test_a_registry_that_was_emptied_is_filled_again(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = Exporter("m", [0], registry)
    exporter.export(0, [REPORT])
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) is None
    for _ in range(3):
        exporter.export(0, [REPORT])
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) == 8.0
    failures = LABELS | {"place": "export"}
    assert registry.get_sample_value("energylens_plugin_failures_total", failures) == 1.0
    assert len(caplog.records) == 1


def test_a_new_exporter_after_a_reset_starts_anew(registry: CollectorRegistry) -> None:
    Exporter("m", [0], registry).export(0, [REPORT])
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)
    Exporter("m", [0], registry).export(0, [REPORT])
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) == 2.0


def test_what_cannot_be_a_report_is_counted(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    exporter = Exporter("m", [0], registry)
    for _ in range(3):
        exporter.refuse(0, "SchedulerStats has no field for it")
    failures = LABELS | {"place": "export"}
    assert registry.get_sample_value("energylens_plugin_failures_total", failures) == 3.0
    assert len(caplog.records) == 1


def test_what_cannot_be_exported_is_counted(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    exporter = Exporter("m", [0], registry)
    wrong: Report = {
        "add": [
            ("energylens_nonsense_total", (), 1.0),
            ("energylens_predicted_energy_joules_total", ("decode", "too", "many"), 1.0),
            ("energylens_predicted_energy_joules_total", ("decode",), -1.0),
            ("energylens_predictor_state", ("ready",), 1.0),
        ]
    }
    exporter.export(0, [wrong, REPORT])
    failures = LABELS | {"place": "export"}
    assert registry.get_sample_value("energylens_plugin_failures_total", failures) == 4.0
    assert registry.get_sample_value("energylens_step_energy_joules_count", LABELS) == 2.0
    assert len(caplog.records) == 1


def test_series_are_limited(registry: CollectorRegistry) -> None:
    exporter = Exporter("m", [0], registry)
    flood: Report = {"add": [("energylens_plugin_failures_total", (str(i),), 1.0) for i in range(1000)]}
    exporter.export(0, [flood])
    ours = [
        line
        for line in generate_latest(registry).decode().splitlines()
        if line.startswith("energylens_") and "_created{" not in line
    ]
    assert len(ours) <= MAX_SERIES_PER_ENGINE
    assert registry.get_sample_value("energylens_plugin_failures_total", LABELS | {"place": "export"}) > 700


def test_a_name_taken_by_someone_else_is_an_error(registry: CollectorRegistry) -> None:
    from prometheus_client import Gauge

    Gauge("energylens_predictor_state", "someone else's", registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Exporter("m", [0], registry)


MULTIPROCESS = """
from prometheus_client import REGISTRY
from energylens_vllm.serving.exporter import Exporter
exporter = Exporter("m", [0])
exporter.set_build_info("1", "2")
exporter.export(0, [{"add": [("energylens_predicted_energy_joules_total", ["decode"], 2.5)],
                     "set": [("energylens_predictor_state", ["ready"], 1.0)],
                     "observe": [("energylens_step_energy_joules", [], [0.5])]}])
"""


def multiprocess_scrape(folder: Path) -> str:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", MULTIPROCESS], env=environment, check=True)
    scrape = (
        "from prometheus_client import CollectorRegistry, generate_latest\n"
        "from prometheus_client.multiprocess import MultiProcessCollector\n"
        "registry = CollectorRegistry(); MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", scrape], env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_processes_are_summed(tmp_path: Path) -> None:
    lines = multiprocess_scrape(tmp_path).splitlines()
    assert 'energylens_predicted_energy_joules_total{engine="0",model_name="m",phase="decode"} 5.0' in lines
    assert 'energylens_step_energy_joules_count{engine="0",model_name="m"} 2.0' in lines
    assert 'energylens_predictor_state{engine="0",model_name="m",state="ready"} 1.0' in lines
    assert 'energylens_build_info{engine="0",model_name="m",version="1",vllm_version="2"} 1.0' in lines
    assert not [line for line in lines if "pid=" in line]


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say(tmp_path: Path, registry: CollectorRegistry) -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None
    exporter = Exporter("m", [0], registry)
    exporter.set_build_info("1", "2")
    exporter.export(0, [REPORT])
    single = generate_latest(registry).decode()
    for text in (single, multiprocess_scrape(tmp_path)):
        ours = "".join(line for line in text.splitlines(keepends=True) if "_created" not in line)
        done = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
