"""Requests steered among the data-parallel ranks of a real vLLM: over fake executors, and over the CPU's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest
from server import ENVIRONMENT, Samples, Server, serving

from energylens_vllm.hooks.vllm.ranks import install, is_lockstep

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DP = [
    "--plugin=energylens",
    "--data-parallel-size=2",
    "--energylens.steer_ranks",
    "true",
    "--energylens.routing",
    "true",
]
FAKE = "--distributed-executor-backend=fake_executor.FakeExecutor"
KNOWN = 'energylens_routing_decisions_total{reason="least_joules"}'


def steps(shown: Samples) -> list[float]:
    """Of both engines."""
    return [
        sum(value for name, value in shown.items() if re.match(rf'energylens_steps_total{{.*engine="{i}"', name))
        for i in range(2)
    ]


def ask(server: Server, first: int, rank: int | None = None) -> None:
    """A completion of 40 tokens, at a rank if one is named."""
    headers = {"Content-Type": "application/json"} | ({} if rank is None else {"X-data-parallel-rank": str(rank)})
    body = f'{{"model": "tiny", "prompt": [{first}, 2, 3, 4], "max_tokens": 40, "ignore_eos": true, "temperature": 0}}'
    with urlopen(Request(f"{server.url}/v1/completions", body.encode(), headers), timeout=120) as answer:
        answer.read()


def grown(server: Server, before: Samples, requests: int, steps_each: float) -> list[float]:
    """Steps that each engine has done since, once those of `requests` one after the other would be there."""
    least = requests * steps_each
    shown = server.metrics_when(lambda found: sum(steps(found)) - sum(steps(before)) >= least, 60)
    return [after - n for after, n in zip(steps(shown), steps(before), strict=True)]


def warm_up(server: Server) -> None:
    """Until ranks are steered: their table is made while the first requests come."""
    ask(server, 5)
    server.metrics_when(lambda found: ask(server, 5) or found.get(KNOWN, 0) > 0, 60)


def check_steering(server: Server) -> None:
    """Requests gather; one that names a rank gets it; both rank's metrics and ours say so."""
    warm_up(server)
    before = server.metrics()
    for i in range(6):  # one after the other: each finds both idle
        ask(server, 10 + i)
    one_by_one = grown(server, before, 6, 30)
    assert min(one_by_one) == 0, one_by_one
    before = server.metrics()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ask(server, 20 + i), range(8)))
    together = grown(server, before, 1, 30)
    assert min(together) == 0, together
    quiet = one_by_one.index(0)
    before = server.metrics()
    ask(server, 40, rank=quiet)
    asked = grown(server, before, 1, 30)
    assert asked[1 - quiet] == 0, asked
    shown = server.metrics()
    assert shown["energylens_routing_saved_joules_total"] >= 0
    placed = shown[KNOWN] + shown['energylens_routing_decisions_total{reason="hysteresis"}']
    assert placed >= 14
    assert not [name for name, value in shown.items() if value and "failures" in name]


@pytest.fixture(scope="module")
def path() -> str:
    return os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))


@pytest.fixture(scope="module")
def fake(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, path: str) -> Iterator[Server]:
    """Two ranks whose steps take 10 ms."""
    folder = tmp_path_factory.mktemp("ranks")
    with serving(
        tiny_model, folder, 8886, FAKE, *DP, "--api-server-count=1", PYTHONPATH=path, FAKE_STEP_S="0.01"
    ) as server:
        yield server


@pytest.mark.nightly
def test_ranks_are_steered(fake: Server) -> None:
    check_steering(fake)


@pytest.mark.nightly
def test_two_api_servers_steer_too(tiny_model: Path, tmp_path: Path, path: str) -> None:
    with serving(
        tiny_model, tmp_path, 8887, FAKE, *DP, "--api-server-count=2", PYTHONPATH=path, FAKE_STEP_S="0.01"
    ) as server:
        for i in range(20):
            ask(server, i)  # each API server makes its own table
        server.metrics_when(lambda found: found.get(KNOWN, 0) > 4, 60)
        assert sum(steps(server.metrics())) > 0


@pytest.mark.nightly
def test_ranks_of_the_cpu_are_steered(tiny_model: Path, tmp_path: Path) -> None:
    # In bfloat16 vLLM takes AMX, which not every virtual machine that has it can run.
    arguments = [*DP, "--api-server-count=1", "--dtype=float32"]
    # It is far slower than the GPU that is predicted for, which ranks learn: with the default targets none would hold.
    arguments += ["--energylens.ttft_target_s", "60", "--energylens.tpot_target_s", "5"]
    with serving(tiny_model, tmp_path, 8888, *arguments) as server:
        check_steering(server)


def config(ranks: int, experts: bool) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=ranks), model_config=SimpleNamespace(is_moe=experts)
    )


def test_ranks_with_experts_are_in_lockstep() -> None:
    assert [is_lockstep(config(ranks, experts)) for ranks in (1, 2) for experts in (False, True)] == [
        False, False, False, True,
    ]  # fmt: skip


def client_class(core_client: Any) -> type[Any]:
    class Client:
        """What of vLLM's client is used here."""

        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config, self.core_engines, self.reqs_in_flight = vllm_config, ["a", "b"], {}
            self.lb_engines, self.client_count = [[0, 0], [0, 0]], 1

        def get_core_engine_for_request(self, request: Any) -> Any:
            return self.core_engines[request.data_parallel_rank or 0]

    core_client.DPLBAsyncMPClient = Client
    install(core_client)
    return Client


@pytest.mark.parametrize(
    ("given", "experts", "words"),
    [
        ({}, False, None),
        ({"steer_ranks": True}, True, "run in lockstep"),
        ({"steer_ranks": True, "gpuu": 1}, False, "unknown value 'gpuu'"),
    ],
)
def test_otherwise_vllm_balances(
    given: dict[str, Any], experts: bool, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    made = client_class(SimpleNamespace())(
        SimpleNamespace(**vars(config(2, experts)), additional_config={"energylens": given})
    )
    assert made.energylens_steering is None
    request = SimpleNamespace(data_parallel_rank=None, request_id="1")
    assert made.get_core_engine_for_request(request) == "a"
    assert [words in record.message for record in caplog.records] == ([True] if words else [])


def test_an_error_of_ours_leaves_the_choice_to_vllm(caplog: pytest.LogCaptureFixture) -> None:
    made = client_class(SimpleNamespace())(
        SimpleNamespace(**vars(config(2, False)), additional_config={"energylens": {"steer_ranks": True}})
    )
    for _ in range(3):  # the configuration lacks what a table is made of
        request = SimpleNamespace(
            data_parallel_rank=None, request_id="1", sampling_params=SimpleNamespace(max_tokens=4)
        )
        assert made.energylens_steering._ranks.exception(30) is not None
        assert made.get_core_engine_for_request(request) == "a"
        assert request.data_parallel_rank is None
    assert len([record for record in caplog.records if "steer" in record.message]) == 1


@pytest.mark.nightly
def test_a_server_with_experts_refuses(tmp_path: Path) -> None:
    overrides = (
        "architectures=['Qwen3MoeForCausalLM'], model_type='qwen3_moe', num_experts=4, num_experts_per_tok=2, "
        "moe_intermediate_size=64, decoder_sparse_step=1, head_dim=32, norm_topk_prob=True, mlp_only_layers=[]"
    )
    code = f"from pathlib import Path; from tiny_model import write_model; write_model(Path('moe'), {overrides})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "examples")}, check=True
    )
    command = ["vllm", "serve", str(tmp_path / "moe"), "--load-format=dummy", "--gpu-memory-utilization=0.08", *DP]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "steer_ranks: the ranks of a model with experts run in lockstep" in done.stderr.splitlines()[-1]
