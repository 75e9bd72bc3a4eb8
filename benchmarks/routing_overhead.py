"""What routing by energy adds to a host's latency, beside the host's own policy in the same run.

    python benchmarks/routing_overhead.py --host ray        # with the Python of tools/ray.sh as $RAY_PYTHON
    python benchmarks/routing_overhead.py --host litellm    # with the environment of tools/litellm.sh
    python benchmarks/routing_overhead.py --host haproxy
    python benchmarks/routing_overhead.py --host vllm-ranks # the choice of a rank alone, in microseconds

Replicas answer at once, one token. Policies take turns request by request, each time in another order, so that whatever
else the machine does falls on all alike. Milliseconds from sending a request to the end of its answer, one after the
other, one client.
"""

from __future__ import annotations

import argparse
import http.client
import inspect
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import yaml

from energylens_vllm.routing.decisions import Decisions

ROOT = Path(__file__).parents[1]

#: name -> asks one request, raises if there is no answer
Policies = dict[str, Callable[[], object]]


@contextmanager
def ray() -> Iterator[Policies]:
    """Ray Serve: its router of power of two choices, ours in its place, and ours over two deployments."""
    sys.path.insert(0, str(ROOT / "tests" / "hooks"))
    from ray_serve import cluster

    gpus = ["H200-SXM/2", "L40S"]
    apps = {name: {"policy": name, "gpus": gpus} for name in ("default", "router", "fleet")}
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), 8866, apps, step_s=0.0) as running:
        for name in ("router", "fleet"):
            running.settle(name, "L40S")

        def asks(name: str) -> Callable[[], object]:
            def ask() -> object:
                answer = running.ask(name, "some words " * 200, 1)
                assert answer.complete, answer
                return answer

            return ask

        yield {name: asks(name) for name in apps}


BODY = json.dumps(
    {"model": "llama", "messages": [{"role": "user", "content": "some words " * 200}], "max_tokens": 1}
).encode()


def posts(port: int, headers: dict[str, str] | None = None) -> Callable[[], object]:
    """Asks a server for a chat, over one connection that is kept."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask() -> object:
        connection.request(
            "POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    return ask


@contextmanager
def litellm() -> Iterator[Policies]:
    """LiteLLM's proxy: its default policy (simple-shuffle), and ours; both before the same two faked replicas."""
    sys.path.insert(0, str(ROOT / "tests" / "gateways"))
    from replicas import fakes, package, running

    key, ports = "sk-only-for-this-benchmark-0123456789abcdef0123456789", (8871, 8872)
    program = Path(os.environ.get("LITELLM_VENV", ROOT / ".venv-litellm"), "bin", "litellm")
    example = yaml.safe_load((ROOT / "examples" / "gateways" / "litellm.yaml").read_text())
    for deployment, port in zip(example["model_list"], ports, strict=True):
        deployment["litellm_params"] |= {"api_base": f"http://127.0.0.1:{port}/v1"}
        deployment["litellm_params"] |= {"model": "hosted_vllm/llama-3.1-8b"}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        stack.enter_context(fakes(folder, *((port, "") for port in ports)))
        policies: Policies = {"no gateway": posts(ports[0])}
        for policy, port in (("default", 8870), ("energy", 8879)):
            config = json.loads(json.dumps(example))
            config["litellm_settings"]["callbacks"] = [
                each
                for each in config["litellm_settings"]["callbacks"]
                if policy == "energy" or "energylens" not in each
            ]
            (folder / f"{policy}.yaml").write_text(yaml.safe_dump(config))
            command = [program, "--config", folder / f"{policy}.yaml", "--host", "127.0.0.1", "--port", str(port)]
            environment = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
            ready = f"http://127.0.0.1:{port}/health/liveliness"
            log = folder / f"{policy}.log"
            stack.enter_context(running(command, log, ready, 600, PYTHONPATH=package(folder), **environment))
            policies[policy] = posts(port, {"Authorization": f"Bearer {key}"})
        for _ in range(10):  # until replicas are known
            for ask in policies.values():
                ask()
            time.sleep(1)
        yield policies


@contextmanager
def haproxy() -> Iterator[Policies]:
    """HAProxy's round robin, and the same with weights that the agent sets."""
    sys.path.insert(0, str(ROOT / "tests" / "gateways"))
    from replicas import fakes, running

    ports, agent = (8871, 8872), 8881
    example = (ROOT / "examples" / "gateways" / "haproxy.cfg").read_text()
    for here, port in zip((8001, 8002), ports, strict=True):
        example = example.replace(f"127.0.0.1:{here}", f"127.0.0.1:{port}")
    example = example.replace("agent-port 9777", f"agent-port {agent}")
    checked = "agent-check agent-addr 127.0.0.1 agent-port"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        stack.enter_context(fakes(folder, *((port, "") for port in ports)))
        command = [sys.executable, "-m", "energylens_vllm.cli", "agent", f"--listen=127.0.0.1:{agent}"]
        command += [f"--replica={key}=http://127.0.0.1:{port}" for key, port in zip("ab", ports, strict=True)]
        command += [f"--metrics=127.0.0.1:{agent + 1}", "--farewell=0"]
        stack.enter_context(running(command, folder / "agent.log", f"http://127.0.0.1:{agent + 1}/metrics"))
        policies: Policies = {"no gateway": posts(ports[0])}
        for policy, port in (("default", 8870), ("energy", 8879)):
            text = example.replace("127.0.0.1:4000", f"127.0.0.1:{port}")
            if policy == "default":
                text = re.sub(rf"{checked} {agent} agent-inter 1s|agent-send \S+", "", text)
            (folder / f"{policy}.cfg").write_text(text)
            program = ["haproxy", "-db", "-f", str(folder / f"{policy}.cfg")]
            ready = f"http://127.0.0.1:{port}/v1/models"
            stack.enter_context(running(program, folder / f"{policy}.log", ready))
            policies[policy] = posts(port)
        for _ in range(5):  # until weights are set
            for ask in policies.values():
                ask()
            time.sleep(1)
        yield policies


@contextmanager
def vllm_ranks() -> Iterator[Policies]:
    """vLLM's own choice of a data-parallel rank, and ours before it: the choice alone, 1,000 of them at a time, so that
    milliseconds are microseconds a request."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    from energylens_vllm import Deployment, EnergyModel
    from energylens_vllm.routing import StepTable
    from energylens_vllm.routing.ranks import Load, Ranks

    choose = inspect.unwrap(DPLBAsyncMPClient.get_core_engine_for_request)
    model = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256))
    ranks = Ranks(StepTable.compile(model, 400_000), 8, 1.0, 0.05, Decisions(lambda name, value, labels: None))
    client = SimpleNamespace(
        reqs_in_flight={}, core_engines=[bytes([i]) for i in range(8)], eng_start_index=0, client_count=1,
        lb_engines=[[0, 4, 0.01] for _ in range(8)], engine_inflight=Counter(), streaming_reqs=set(),
    )  # fmt: skip
    prompt = list(range(400))
    request = SimpleNamespace(
        request_id="r", data_parallel_rank=None, pooling_params=None, resumable=False, prompt_token_ids=prompt
    )
    loads = [Load(4, 0, 0.01)] * 8

    def default() -> None:
        for _ in range(1000):
            client.reqs_in_flight.clear()
            choose(client, request)

    def energy() -> None:
        for _ in range(1000):
            ranks.choose(loads, prompt, 100)

    yield {"default": default, "energy": energy}


HOSTS: dict[str, Callable[[], object]] = {
    "ray": ray, "litellm": litellm, "haproxy": haproxy, "vllm-ranks": vllm_ranks,
}  # fmt: skip


def measure(policies: Policies, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by policy."""
    times: dict[str, list[float]] = {name: [] for name in policies}
    order, draw = list(policies), random.Random(0)
    for number in range(requests + 20):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            policies[name]()
            if number >= 20:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=sorted(HOSTS), required=True)
    parser.add_argument("--requests", type=int, default=500, help="of each policy")
    options = parser.parse_args()
    with HOSTS[options.host]() as policies:  # type: ignore[attr-defined]
        times = measure(policies, options.requests)
    print(f"{options.host}: ms of {options.requests} requests each\n")
    print("| policy | p10 | p50 | p90 |\n| --- | --- | --- | --- |")
    for name, values in times.items():
        tenths = statistics.quantiles(values, n=10)
        print(f"| {name} | {tenths[0]:.1f} | {statistics.median(values):.1f} | {tenths[8]:.1f} |")


if __name__ == "__main__":
    main()
