"""The command `python -m energylens_vllm.hooks.ray`: real vLLM in its replicas, on CPUs and over a fake executor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from ray_python import ray_python
from ray_serve import ENVIRONMENT, HERE
from server import ENVIRONMENT as VLLM

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(900)]
PORT = 8860
ENGINE = {"load_format": "dummy", "enforce_eager": True, "max_model_len": 1024, "gpu_memory_utilization": 0.08}
DIRECT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}


@contextmanager
def serving(model: Path, folder: Path, *deployments: dict[str, Any], **environment: str) -> Iterator[Path]:
    """The command with these deployments, until the end of the block; its log."""
    command = [ray_python() or "", "-m", "energylens_vllm.hooks.ray", f"--model={model}", "--served-model-name=tiny"]
    command += [f"--port={PORT}", f"--metrics-port={PORT + 1}"]
    command += [f"--deployment={json.dumps({'engine_kwargs': ENGINE} | each)}" for each in deployments]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    log = folder / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | VLLM | ENVIRONMENT | {"PYTHONPATH": path, "FAKE_STEP_S": "0.005"} | environment,
        )
    try:
        end = time.monotonic() + 600
        while b"Serving at" not in log.read_bytes():
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.5)
        yield log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(90) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def complete(prompt: str, max_tokens: int = 8, **options: Any) -> list[str]:
    """The texts of a completion, in the parts in which they came."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0} | options
    request = Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=120) as response:
        text = response.read().decode()
    if not options.get("stream"):
        return [json.loads(text)["choices"][0]["text"]]
    parts = [json.loads(line) for line in re.findall(r"^data: (\{.*\})$", text, re.M)]
    return [part["choices"][0]["text"] for part in parts if part["choices"]]


def counted(name: str, label: str = "") -> float:
    """A counter of ours among Ray's metrics, over all processes."""
    with urlopen(f"http://127.0.0.1:{PORT + 1}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_{name}{{") and label in line)


def wait_for(reason: str, count: float) -> None:
    end = time.monotonic() + 60
    while counted("energylens_routing_decisions_total", f'reason="{reason}"') < count:
        assert time.monotonic() < end, counted("energylens_routing_decisions_total")
        time.sleep(1)


def test_two_replicas_that_compute(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, tmp_path, {}):
        time.sleep(5)
        first = complete("Why is the sky blue?")
        assert first == complete("Why is the sky blue?")
        streamed = complete("Why is the sky blue?", stream=True)
        assert len(streamed) > 1
        assert ["".join(streamed)] == first
        for number in range(10):
            assert len(complete(f"number {number}")) == 1
        decided = counted("energylens_routing_decisions_total")
        wait_for("least_joules", 10)
        assert decided <= 13
        assert counted("energylens_routing_fallbacks_total") <= 3


def test_deployments_of_different_gpus(tiny_model: Path, tmp_path: Path) -> None:
    """One model on an H200 and on two H100, as they say; both serve when there is more than one can hold."""
    deployments = [
        {
            "server_cls": "ray_fake_server.FakeEngineServer",
            "deployment_config": {"num_replicas": 1},
            "runtime_env": {"env_vars": {"ENERGYLENS_GPU": gpu}},
        }
        for gpu in ("H200-SXM", "L40S")
    ]
    with serving(tiny_model, tmp_path, *deployments):
        time.sleep(5)
        for number in range(20):
            assert complete(f"number {number}", 16) == ["b" * 16]
        wait_for("least_joules", 15)
        assert counted("energylens_routing_added_joules_total", 'side="chosen"') > 0


def test_direct_streaming(tiny_model: Path, tmp_path: Path) -> None:
    """HAProxy asks for a replica and takes the request there itself, so nobody tells the router of its end."""
    fake = {"server_cls": "ray_fake_server.FakeEngineServer"}
    with serving(tiny_model, tmp_path, fake, **DIRECT):
        time.sleep(8)
        for number in range(20):
            assert complete(f"number {number}", 16) == ["b" * 16]
        assert "".join(complete("streamed", 16, stream=True)) == "b" * 16
        wait_for("least_joules", 15)
