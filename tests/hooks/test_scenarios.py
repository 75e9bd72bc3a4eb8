"""Real vLLM over a fake executor: what /metrics shows is the sum of what the executor was given, whatever happens.

Each scenario's engine runs in a process of their own (see scenarios.py). The expected figures are made from the steps
as the executor saw them, one by one and without the plugin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from expected import expected
from releases import TESTED, folder

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.serving.increments import GRID
from energylens_vllm.serving.metrics import COMPONENTS, MAX_SERIES_PER_ENGINE

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent

PREDICTED = (
    "plain", "asynchronous", "chunked", "prefix_caching", "preemption", "abort", "speculative", "lora",
    "users_scheduler", "pipeline",
)  # fmt: skip
#: fault -> (part of the one line in the log, metric that tells)
FAULTS = {
    "bad_settings": ("unknown value 'gpus' (did you mean 'gpu'?)", "energylens_plugin_failures_total start"),
    "unknown_gpu": ("unknown value 'H2000-SXM' (did you mean 'H200-SXM'?)", "energylens_predictor_state model_unknown"),
    "broken_predict": ("failed at predict", "energylens_plugin_failures_total predict"),
    "broken_model": ("ZeroDivisionError: on purpose", "energylens_plugin_failures_total start"),
    "broken_config": ("configuration cannot be read", "energylens_plugin_failures_total start"),
    "malformed_batches": ("failed at schedule", "energylens_plugin_failures_total schedule"),
    "unreadable_batches": ("failed at read", "energylens_plugin_failures_total read"),
    "broken_report": ("failed at update", None),
    "no_stats_field": ("failed at update", None),  # nothing can reach /metrics
    "registry_reset": ("failed at export", "energylens_plugin_failures_total export"),
}
SILENT = ("without_statistics", "switched_off")
Result = dict[str, Any]


def run(model: Path, names: Sequence[str], **environment: str) -> dict[str, Result]:
    """Results of scenarios by name."""
    command = [sys.executable, HERE / "scenarios.py", model, *names]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert [result["name"] for result in found] == list(names)
    return {result["name"]: result for result in found}


@pytest.fixture(scope="module")
def results(tiny_model: Path) -> dict[str, Result]:
    """All scenarios' results."""
    return run(tiny_model, [*PREDICTED, *FAULTS, *SILENT])


@pytest.fixture(scope="module")
def without_plugin(tiny_model: Path) -> Result:
    """The result of the scenario `plain` in a vLLM that does not load the plugin."""
    result = run(tiny_model, ["plain"], VLLM_PLUGINS="none")["plain"]
    assert result["scheduler"][0] == "Scheduler"
    assert not result["metrics"]
    return result


def check_sums(result: Result, model: Path) -> None:
    """What /metrics shows are the sums of the executed steps' predictions, to a step of the grid."""
    shown = result["metrics"]
    deployment = Deployment(gpu="H200-SXM", **result["deployment"])
    sums = expected(result["executed"], EnergyModel(model, deployment))
    assert len(result["executed"]) >= 4
    assert {name: shown[name] for name in sums} == pytest.approx(sums, rel=0, abs=GRID)
    phases = sum(shown[f"energylens_predicted_energy_joules_total {phase}"] for phase in ("prefill", "decode"))
    components = sum(shown[f"energylens_predicted_component_energy_joules_total {name}"] for name in COMPONENTS)
    assert phases == pytest.approx(components, rel=0, abs=len(COMPONENTS) * GRID)
    assert phases == pytest.approx(shown["energylens_step_energy_joules_sum"], rel=1e-9)
    assert shown["energylens_predictor_state ready"] == 1
    assert shown["energylens_unpredicted_steps_total"] == 0
    assert result["waiting"] == [0, 0, 0]
    assert not result["log"]
    assert not [name for name, value in shown.items() if "failures" in name and value]
    assert len(shown) <= MAX_SERIES_PER_ENGINE


@pytest.mark.parametrize("name", PREDICTED)
def test_metrics_are_the_sum_of_the_steps(name: str, results: dict[str, Result], tiny_model: Path) -> None:
    check_sums(results[name], tiny_model)


@pytest.mark.releases
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", TESTED)
def test_other_releases(version: str, tiny_model: Path, without_plugin: Result) -> None:
    faults = [name for name in FAULTS if name not in ("bad_settings", "unknown_gpu")]
    path = os.pathsep.join((str(folder(version)), os.environ.get("PYTHONPATH", "")))
    found = run(tiny_model, [*PREDICTED, *faults], PYTHONPATH=path.strip(os.pathsep))
    for name in PREDICTED:
        assert found[name]["vllm"] == version
        check_sums(found[name], tiny_model)
    for name in faults:
        assert found[name]["tokens"] == without_plugin["tokens"]
        assert len(found[name]["log"]) == 1


def test_the_scheduler_is_a_subclass_of_the_configured_one(results: dict[str, Result]) -> None:
    assert results["plain"]["scheduler"][:2] == ["ObservedScheduler", "Scheduler"]
    assert results["asynchronous"]["scheduler"][:2] == ["ObservedAsyncScheduler", "AsyncScheduler"]
    assert results["users_scheduler"]["scheduler"] == ["ObservedUserScheduler", "UserScheduler", "Scheduler"]


def test_measured_time_is_that_of_the_steps(results: dict[str, Result]) -> None:
    result = results["asynchronous"]  # its steps take 10 ms and follow each other, with two in flight
    measured = result["metrics"]["energylens_measured_step_time_seconds_total"]
    assert 0.010 * len(result["executed"]) <= measured <= result["wall_s"]


def test_what_a_prefix_cache_holds_is_not_computed(results: dict[str, Result]) -> None:
    shown = results["prefix_caching"]["metrics"]
    assert shown["energylens_cached_tokens_total"] == 96  # six blocks of the second prompt of 100 tokens
    assert shown["energylens_tokens_total prefill"] == 100 + 4


def test_a_prompt_in_chunks(results: dict[str, Result]) -> None:
    shown = results["chunked"]["metrics"]
    assert shown["energylens_steps_total mixed"] > 0
    assert shown["energylens_tokens_total prefill"] == 300 + 40 + 7
    assert shown["energylens_cached_tokens_total"] == 0


def test_what_is_computed_again_after_a_preemption_is_prefill(results: dict[str, Result]) -> None:
    shown = results["preemption"]["metrics"]
    assert shown["energylens_tokens_total prefill"] > 60 + 61 + 62
    assert shown["energylens_tokens_total decode"] < 3 * 59


def test_an_aborted_request(results: dict[str, Result]) -> None:
    assert len(results["abort"]["tokens"]) == 2
    assert results["abort"]["metrics"]["energylens_tokens_total decode"] < 3 * 7


def test_drafts_count(results: dict[str, Result]) -> None:
    shown = results["speculative"]["metrics"]
    assert shown["energylens_draft_tokens_total"] > 0
    assert shown["energylens_tokens_total decode"] > 3 * 7


def test_lora_steps_are_flagged(results: dict[str, Result]) -> None:
    shown = results["lora"]["metrics"]
    assert shown["energylens_flagged_steps_total lora_not_modelled"] == 8  # of 16: the second request's
    assert shown["energylens_flagged_steps_total reference_gpu"] == 16


@pytest.mark.parametrize("name", ["plain", *FAULTS, *SILENT])
def test_requests_get_what_they_get_without_the_plugin(
    name: str, results: dict[str, Result], without_plugin: Result
) -> None:
    assert results[name]["tokens"] == without_plugin["tokens"]
    assert results[name]["executed"] == without_plugin["executed"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_once(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    line, metric = FAULTS[name]
    assert len(result["log"]) == 1
    assert line in result["log"][0]
    if metric is None:
        assert result["failures"]["update"] >= 1
    else:
        assert result["metrics"][metric] >= 1


@pytest.mark.parametrize("name", ["bad_settings", "unknown_gpu", "broken_predict", "broken_model", "broken_config"])
def test_steps_are_counted_though_not_predicted(name: str, results: dict[str, Result]) -> None:
    shown = results[name]["metrics"]
    assert shown["energylens_unpredicted_steps_total"] == len(results[name]["executed"])
    assert shown["energylens_tokens_total prefill"] == 12 + 40 + 7
    assert shown["energylens_predicted_step_time_seconds_total"] == 0


def test_counters_go_on_after_a_reset_of_the_registry(results: dict[str, Result]) -> None:
    shown, plain = results["registry_reset"]["metrics"], results["plain"]["metrics"]
    for name in ("energylens_predicted_energy_joules_total decode", "energylens_tokens_total decode"):
        assert shown[name] == plain[name]


@pytest.mark.parametrize("name", SILENT)
def test_there_is_nothing_where_it_is_not_wanted(name: str, results: dict[str, Result]) -> None:
    assert not results[name]["log"]
    assert not [name for name, value in results[name]["metrics"].items() if value and "build_info" not in name]
