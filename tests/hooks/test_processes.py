"""Offline engines in processes that are forked or spawned, and the command lines that reach them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from expected import expected
from server import ENVIRONMENT

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.serving.increments import GRID
from energylens_vllm.serving.settings import Settings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
HERE = Path(__file__).parent


@pytest.mark.parametrize("method", [pytest.param("fork", marks=pytest.mark.nightly), "spawn"])
def test_offline_engine_in_another_process(method: str, tiny_model: Path, tmp_path: Path) -> None:
    environment = os.environ | ENVIRONMENT | {
        "FAKE_LOG": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", "")))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": method,
    }  # fmt: skip
    command = [sys.executable, HERE / "offline.py", tiny_model, "tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"')))
    assert [len(tokens) for tokens in result["tokens"]] == [16] * 6
    executed = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert len(executed) >= 32
    deployment = Deployment(gpu="H200-SXM", enforce_eager=True, vllm_release=version("vllm"))
    sums = expected(executed, EnergyModel(tiny_model, deployment))
    assert {name: result["metrics"][name] for name in sums} == pytest.approx(sums, rel=0, abs=GRID)
    assert result["metrics"]["energylens_flagged_steps_total reference_gpu"] == len(executed)


JSON = '{"gpu": "L40S", "report_interval_s": 2.5}'
ADDITIONAL = '{"energylens": {"gpu": "B200-SXM", "report_interval_s": 9}}'
ENVIRON = {"ENERGYLENS_GPU": "H100-SXM", "ENERGYLENS_REPORT_INTERVAL_S": "3"}
#: name -> (arguments, environment, gpu and report_interval_s in force)
ACCEPTED: dict[str, tuple[list[str], dict[str, str], tuple[str | None, float]]] = {
    "nothing": ([], {}, (None, 5.0)),
    "environment": ([], ENVIRON, ("H100-SXM", 3.0)),
    "additional config": (["--additional-config", ADDITIONAL], {}, ("B200-SXM", 9)),
    "additional config over environment": (["--additional-config", ADDITIONAL], ENVIRON, ("B200-SXM", 9)),
    "JSON": (["--energylens", JSON], {}, ("L40S", 2.5)),
    "JSON over all": (["--energylens", JSON, "--additional-config", ADDITIONAL], ENVIRON, ("L40S", 2.5)),
    "dotted": (["--energylens.gpu", "L40S", "--energylens.report_interval_s", "2"], {}, ("L40S", 2)),
    "dotted over some": (["--energylens.gpu=L40S", "--additional-config", ADDITIONAL], ENVIRON, ("L40S", 9)),
    "before other flags": (["--plugin", "energylens", "--seed", "7"], {}, (None, 5.0)),
    "as one word": (["--plugin=energylens", "--energylens.gpu=L40S"], {}, ("L40S", 5.0)),
}
#: arguments -> part of the line that says what is wrong
REFUSED: dict[str, tuple[list[str], str]] = {
    "plugin": (["--plugin", "energylen"], "unknown value 'energylen' (did you mean 'energylens'?)"),
    "no plugin": (["--plugin"], "argument --plugin: expected one argument"),
    "setting": (["--energylens", '{"gpuu": "L40S"}'], "unknown value 'gpuu' (did you mean 'gpu'?); accepted:"),
    "dotted setting": (["--energylens.gpuu", "L40S"], "unknown value 'gpuu' (did you mean 'gpu'?); accepted:"),
    "dash": (["--energylens.report-interval-s", "3"], "(did you mean 'report_interval_s'?)"),
    "not JSON": (["--energylens", "{gpu"], "'{gpu' is not JSON"),
    "type": (["--energylens.enabled", "3"], "enabled: 3 is not of type bool"),
    "range": (["--energylens.report_interval_s", "0"], "report_interval_s: 0 is not positive"),
}  # fmt: skip


REQUIRED = ["--plugin=energylens"]
#: what `--plugin energylens` finds wrong once the configuration is made
IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "GPU": (["--energylens.gpu", "H2000-SXM"], "gpu: unknown value 'H2000-SXM' (did you mean 'H200-SXM'?)"),
    "no statistics": (["--disable-log-stats"], "--disable-log-stats: what energylens finds out travels with"),
    "switched off": (["--energylens.enabled", "false"], "enabled: false"),
    "additional config": (["--additional-config", '{"energylens": {"gpuu": 1}}'], "(did you mean 'gpu'?)"),
    "quantization": (["--quantization", "experts_int8"], "quantization: unknown value 'experts_int8'"),
}
CANNOT_START = "vllm: error: the energylens plugin cannot start: "


@pytest.fixture(scope="module")
def parsed(tiny_model: Path) -> dict[str, dict[str, Any]]:
    """What vLLM's own parser makes of the command lines, by name."""
    cases: dict[str, tuple[list[str], dict[str, str], bool]] = {
        **{name: (arguments, environ, False) for name, (arguments, environ, _) in ACCEPTED.items()},
        **{f"not {name}": (arguments, {}, False) for name, (arguments, _) in REFUSED.items()},
        **{f"not {name}": ([*REQUIRED, *arguments], {}, True) for name, (arguments, _) in IMPOSSIBLE.items()},
        "possible": (REQUIRED, {}, True),
    }
    model = [str(tiny_model), "--load-format=dummy", "--gpu-memory-utilization=0.08"]
    lines = [
        {"arguments": model + arguments, "environment": environ, "configure": configure}
        for arguments, environ, configure in cases.values()
    ]
    done = subprocess.run(
        [sys.executable, HERE / "parsing.py"],
        input=json.dumps(lines),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_settings_of_a_command_line(name: str, parsed: dict[str, dict[str, Any]]) -> None:
    arguments, _, (gpu, interval_s) = ACCEPTED[name]
    found = parsed[name]
    assert found["settings"] == asdict(Settings(gpu=gpu, report_interval_s=interval_s))
    assert found["required"] == any("--plugin" in argument for argument in arguments)
    assert found["seed"] == (7 if "--seed" in arguments else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_command_line_that_is_refused(name: str, parsed: dict[str, dict[str, Any]]) -> None:
    found = parsed[f"not {name}"]
    assert found["exit"] == 2
    assert REFUSED[name][1] in found["said"]
    assert found["said"].startswith("vllm serve: error: argument")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_plugin_is_required_but_cannot_start(name: str, parsed: dict[str, dict[str, Any]]) -> None:
    found = parsed[f"not {name}"]
    assert found["exit"] == 2
    assert found["said"].startswith(CANNOT_START)
    assert IMPOSSIBLE[name][1] in found["said"]
    assert parsed["possible"]["required"]


@pytest.mark.nightly
def test_a_server_that_needs_the_plugin_does_not_start_without(tiny_model: Path) -> None:
    command = ["vllm", "serve", tiny_model, "--load-format=dummy", "--gpu-memory-utilization=0.08", "--port=18114"]
    done = subprocess.run(
        [*command, "--plugin", "energylens", "--energylens.gpu", "H2000-SXM"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"{CANNOT_START}gpu: unknown value 'H2000-SXM'")
    assert "Traceback" not in done.stderr
