"""LiteLLM's proxy and HAProxy before two real vLLMs on the CPU: requests gather where some run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from replicas import ROOT, running, wait_for

from energylens_vllm.routing.scrape import read

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(3600)]
PORTS, LITELLM, HAPROXY, AGENT = (8882, 8883), 8870, 8880, 8881
START_S = 1500  #: on a machine that does much else
PROGRAM = Path(os.environ.get("LITELLM_VENV", ROOT / ".venv-litellm"), "bin", "litellm")
KEY = "sk-only-for-tests-0123456789abcdef0123456789abcdef"
VLLM = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def servers(tiny_model: Path, folder: Path) -> Iterator[Path]:
    """Two of them, that predict for GPUs of two kinds; gives the model's folder."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(port: int, gpu: str) -> None:
            command = ["vllm", "serve", tiny_model, "--served-model-name=tiny", "--load-format=dummy"]
            command += ["--enforce-eager", "--gpu-memory-utilization=0.08", "--max-model-len=1024"]
            command += ["--dtype=float32"]  # bfloat16 takes AMX, which not every virtual machine that has it can run
            command += ["--host=127.0.0.1", f"--port={port}", "--plugin=energylens"]
            command += ["--energylens.routing", "true", "--energylens.gpu", gpu]
            # A CPU is slower than what is predicted for: without this no request would seem to hold its targets.
            command += ["--energylens.tpot_target_s", "5", "--energylens.ttft_target_s", "60"]
            ready = f"http://127.0.0.1:{port}/health"
            stack.enter_context(running(command, folder / f"vllm-{port}.log", ready, START_S, **VLLM))

        list(pool.map(start, PORTS, ("H200-SXM", "H100-SXM")))
        yield tiny_model


def post(url: str, max_tokens: int, headers: dict[str, str] | None = None) -> dict[str, str]:
    """A completion; gives the answer's headers."""
    body = {"model": "tiny", "prompt": "some words", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})
    with urlopen(request, timeout=600) as answer:
        answer.read()
        return {name.lower(): value for name, value in answer.headers.items()}


def held(port: int) -> float:
    """Requests that a server says it holds."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        page = read(answer.read().decode())
    assert page is not None
    return page.held


@contextmanager
def busy(port: int) -> Iterator[None]:
    """Long requests at one server, as from other clients."""
    stop = time.monotonic() + 600
    with ThreadPoolExecutor(4) as pool:
        done: list[bool] = []

        def keep() -> None:
            while not done and time.monotonic() < stop:
                post(f"http://127.0.0.1:{port}/v1/completions", 400)

        for _ in range(4):
            pool.submit(keep)
        wait_for(lambda: held(port) >= 3, 120)
        try:
            yield
        finally:
            done.append(True)


@pytest.mark.litellm
def test_litellm(servers: Path, folder: Path, package_path: str) -> None:
    options = {"model": str(servers), "ttft_s": 60.0, "tpot_s": 5.0}
    deployments = [
        {
            "model_name": "tiny",
            "litellm_params": {
                "model": "hosted_vllm/tiny", "api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none",
            },
            "model_info": {"id": str(port), "energylens": options},
        }
        for port in PORTS
    ]  # fmt: skip
    config = yaml.safe_load((ROOT / "examples" / "gateways" / "litellm.yaml").read_text()) | {"model_list": deployments}
    (folder / "litellm.yaml").write_text(yaml.safe_dump(config))
    command = [PROGRAM, "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", str(LITELLM)]
    environment = {"PYTHONPATH": package_path, "LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment["HF_HUB_OFFLINE"] = "1"

    def ask() -> str:
        url = f"http://127.0.0.1:{LITELLM}/v1/completions"
        return post(url, 4, {"Authorization": f"Bearer {KEY}"})["x-litellm-model-id"]

    def counted(series: str) -> float:
        request = Request(f"http://127.0.0.1:{LITELLM}/metrics/", headers={"Authorization": f"Bearer {KEY}"})
        with urlopen(request, timeout=60) as page:
            lines = page.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(series)).rsplit(" ", 1)[1])

    ready = f"http://127.0.0.1:{LITELLM}/health/liveliness"
    with running(command, folder / "litellm.log", ready, START_S, **environment):
        ask()
        by_joules = 'energylens_routing_decisions_total{reason="least_joules"}'
        wait_for(lambda: ask() and counted(by_joules) > 0, 120)
        for port in PORTS:
            with busy(port):
                time.sleep(4)
                where = Counter(ask() for _ in range(10))
            print("litellm", port, where)
            assert where[str(port)] >= 7, where  # by least-request it would be one
            wait_for(lambda port=port: held(port) == 0, 120)
        assert counted("energylens_routing_saved_joules_total") > 0


@pytest.mark.haproxy
def test_haproxy(servers: Path, folder: Path) -> None:
    example = (ROOT / "examples" / "gateways" / "haproxy.cfg").read_text()
    example = example.replace("127.0.0.1:4000", f"127.0.0.1:{HAPROXY}").replace(
        "agent-port 9777", f"agent-port {AGENT}"
    )
    for here, port in zip((8001, 8002), PORTS, strict=True):
        example = example.replace(f"127.0.0.1:{here}", f"127.0.0.1:{port}")
    example = example.replace(
        "    balance roundrobin\n", "    balance roundrobin\n    http-response set-header x-served-by %s\n"
    )
    (folder / "haproxy.cfg").write_text(example)
    command = [sys.executable, "-m", "energylens_vllm.cli", "agent", f"--listen=127.0.0.1:{AGENT}"]
    command += [f"--replica={name}=http://127.0.0.1:{port}" for name, port in zip("ab", PORTS, strict=True)]
    command += [f"--model={servers}", "--ttft=60", "--tpot=5", f"--metrics=127.0.0.1:{AGENT + 3}", "--farewell=0"]

    def weight(name: str) -> str:
        with socket.create_connection(("127.0.0.1", AGENT), 10) as connection:
            connection.sendall(f"{name}\n".encode())
            return connection.makefile().readline().strip()

    proxy = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    with (
        running(command, folder / "agent.log", f"http://127.0.0.1:{AGENT + 3}/metrics", START_S),
        running(proxy, folder / "haproxy.log", f"http://127.0.0.1:{HAPROXY}/health", START_S),
    ):
        for name, port in zip("ab", PORTS, strict=True):
            with busy(port):
                wait_for(lambda name=name: (weight(name), weight("ab".replace(name, ""))) == ("100%", "1%"), 60)
                time.sleep(5)
                url = f"http://127.0.0.1:{HAPROXY}/v1/completions"
                where = Counter(post(url, 4)["x-served-by"] for _ in range(12))
            print("haproxy", name, where)
            assert where[name] >= 10, where
            wait_for(lambda port=port: held(port) == 0, 120)
