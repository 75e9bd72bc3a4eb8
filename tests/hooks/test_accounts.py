"""Requests of a real vLLM are told what they cost, and their accounts sum to what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from server import serving

from energylens_vllm.serving.increments import GRID

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
Result = dict[str, Any]


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def result(request: pytest.FixtureRequest, results: dict[bool, Result]) -> Result:
    """Of one way of scheduling."""
    return results[request.param]


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Result]:
    """See accounts.py."""
    log = tmp_path_factory.mktemp("accounts") / "requests.jsonl"
    command = [sys.executable, HERE / "accounts.py", tiny_model, log]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    for each in found:
        each["log"] = [json.loads(line) for line in Path(f"{log}.{each['name']}").read_text().splitlines()]
    return {each["name"]: each for each in found}


def test_only_who_asks_is_told(result: Result) -> None:
    first, second, third, again, *others = result["told"]
    assert second is None
    assert not any(others)
    for told, prompt in ((first, 100), (third, 7)):
        energy = told["energylens"]
        assert energy["joules"] == energy["prefill_joules"] + energy["decode_joules"] > 0
        assert energy["complete"]
        assert energy["prefill_tokens"] == prompt
        assert energy["decode_tokens"] >= 7  # the first of 8 comes of the prefill
    saved = again["energylens"]
    assert saved["cached_tokens"] == 96  # whole blocks of 16
    assert saved["prefill_tokens"] == 4
    assert saved["saved_joules"] > 0
    assert not result["asking"]


def test_accounts_sum_exactly_to_what_was_predicted(result: Result) -> None:
    metrics = result["metrics"]
    accounts = [*result["log"], *result["open"]]
    shown = {phase: metrics[f"energylens_attributed_energy_joules_total {phase}"] for phase in ("prefill", "decode")}
    for phase, joules in shown.items():
        assert sum(Fraction(a[f"{phase}_joules"]) for a in accounts) == Fraction(joules)
    predicted = sum(metrics[f"energylens_predicted_energy_joules_total {phase}"] for phase in shown)
    assert sum(shown.values()) == pytest.approx(predicted, rel=0, abs=3 * GRID)
    tokens = sum(new for requests, _ in result["executed"] for new, *_ in requests)
    assert sum(a["prefill_tokens"] + a["decode_tokens"] for a in accounts) == tokens


def test_the_log_and_the_histogram_have_every_request_once(result: Result) -> None:
    ids = [line["request_id"] for line in result["log"]]
    assert len(ids) == len(set(ids))
    # All that finished and the one that was given up; at most the last is still open, having had no step after it.
    assert len(result["told"]) + 1 - len(ids) == len(result["open"]) <= 1
    assert result["metrics"]["energylens_request_energy_joules_count prefill"] == len(ids)
    (given_up,) = [line for line in result["log"] if line["request_id"].startswith("given up")]
    assert 0 < given_up["prefill_tokens"] <= 200
    assert given_up["joules"] > 0


def test_what_a_request_was_told_is_what_the_log_says(result: Result) -> None:
    """With asynchronous scheduling the log may have one more step, which was under way."""
    told = [each["energylens"] for each in result["told"] if each]
    for energy in told:
        lines = [line for line in result["log"] if line["prefill_joules"] == energy["prefill_joules"]]
        extra = [line["decode_tokens"] - energy["decode_tokens"] for line in lines]
        assert extra
        assert min(extra) in ((0, 1) if result["name"] else (0,))


def test_the_gpu_is_measured_and_compared(result: Result) -> None:
    metrics = result["metrics"]
    assert metrics["energylens_nvml_up"] == 1
    assert metrics["energylens_gpu_power_watts 3"] == pytest.approx(120, rel=0.02)
    assert metrics["energylens_gpu_energy_joules_total 3"] > 120 * 10
    assert metrics["energylens_gpu_power_limit_watts 3"] == 700
    assert metrics["energylens_gpu_throttled_seconds_total 3 power_cap"] > 10
    assert metrics["energylens_gpu_reading_trusted 3"] == 1
    assert 0 <= metrics["energylens_gpu_reading_age_seconds 3"] < 3
    windows = sum(metrics[f"energylens_compared_windows_total {where}"] for where in ("inside", "outside"))
    assert windows >= 2
    measured = metrics["energylens_compared_energy_joules_total measured"]
    predicted = metrics["energylens_compared_energy_joules_total predicted"]
    # A window ends at the first reading after 5 s, which on a busy machine may be late.
    assert 120 * 5.0 * windows * 0.98 < measured < 120 * 7.5 * windows
    # The made-up steps take 4 ms at idle power and a little; the rest of the time is idle, which is 100 to 130 W.
    assert predicted == pytest.approx(measured, rel=0.25)
    assert metrics["energylens_bias_ratio"] == pytest.approx(predicted / measured - 1)
    assert not [name for name, value in metrics.items() if "failures" in name and value]


@pytest.mark.timeout(600)
@pytest.mark.nightly
def test_a_server_shows_it_where_clients_look(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    arguments = ["--distributed-executor-backend=fake_executor.FakeExecutor", "--plugin=energylens"]
    arguments += ["--energylens", json.dumps({"gpu": "H200-SXM", "attribution": True, "request_log": str(log)})]
    arguments += ["--middleware=energylens_vllm.hooks.vllm.middleware.EnergyMiddleware"]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    with serving(tiny_model, tmp_path, 18160, *arguments, PYTHONPATH=path) as server:
        body = {"model": "tiny", "prompt": [3] * 50, "max_tokens": 8, "ignore_eos": True}
        with server.open("/v1/completions", body | {"vllm_xargs": {"energylens": 1}}) as response:
            asked, header = json.loads(response.read()), response.headers["x-energylens-joules"]
        with server.open("/v1/completions", body) as response:
            plain, no_header = json.loads(response.read()), response.headers["x-energylens-joules"]

        energy = asked["usage"].pop("energy")
        assert energy["prefill_tokens"] == 50
        assert float(header) == pytest.approx(energy["joules"], rel=1e-5)
        assert (asked["kv_transfer_params"], no_header) == (None, None)
        volatile = {"id": "", "created": 0}
        assert asked | volatile == plain | volatile  # nothing else has changed

        # Idle again, the engine reports the second request's end by itself.
        name = 'energylens_request_energy_joules_count{engine="0",phase="prefill"}'
        shown = server.metrics_when(lambda found: found.get(name) == 2)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(lines) == 2
        assert lines[0]["prefill_joules"] == energy["prefill_joules"]
        for phase in ("prefill", "decode"):
            counter = shown[f'energylens_attributed_energy_joules_total{{engine="0",phase="{phase}"}}']
            assert sum(Fraction(line[f"{phase}_joules"]) for line in lines) == Fraction(counter)
        assert shown['energylens_nvml_up{engine="0"}'] == 0
