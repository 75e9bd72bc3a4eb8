"""Ray Serve with our router, over replicas that pretend to compute: what goes where, and what a fault costs beside what
it costs under Serve's own policy."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_python import ray_python
from ray_serve import Answer, Cluster, cluster

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.routing import Request, Snapshot, StepTable, rank

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(600)]
PORT = 8852
#: Far enough apart that hysteresis never decides.
GPUS = ["H200-SXM/2", "L40S"]
#: name -> (policy, and what differs)
APPS = {
    "default": {"policy": "default", "gpus": GPUS},
    "router": {"policy": "router", "gpus": GPUS},
    "fleet": {"policy": "fleet", "gpus": GPUS},
    "silent": {"policy": "router", "gpus": GPUS, "reports": False},
    "grows": {"policy": "router", "gpus": GPUS, "replicas": 1},
}


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray"), PORT, APPS) as running:
        yield running


@pytest.fixture(scope="module")
def cheapest() -> str:
    """Where a short request adds the fewest joules to idle replicas."""
    models = [
        EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", tensor_parallel_size=2, max_num_seqs=64)),
        EnergyModel("llama-3.1-8b", Deployment(gpu="L40S", max_num_seqs=64)),
    ]
    tables = [StepTable.compile(model, 2e5) for model in models]
    best = rank([Snapshot(table, 0, 0, 0) for table in tables], Request(2, 4.0, ttft_s=1.0, tpot_s=0.05)).best
    assert best is not None
    return GPUS[best]


def test_the_default_where_nothing_is_known() -> None:
    done = subprocess.run([ray_python() or "", Path(__file__).with_name("ray_default.py")], capture_output=True)
    assert done.stdout.decode().strip() == "same", done.stderr.decode()[-3000:]


@pytest.mark.parametrize("app", ["router", "fleet"])
def test_requests_go_where_joules_are_fewest(ray: Cluster, cheapest: str, app: str) -> None:
    ray.settle(app, cheapest)
    with ray.load(app, 0.05, 20) as answers:
        time.sleep(2)
    assert all(each.complete for each in answers)
    assert Counter(each.gpu for each in answers)[cheapest] > 0.9 * len(answers)
    # Serve's own spreads them.
    with ray.load("default", 0.05, 20) as answers:
        time.sleep(2)
    assert min(Counter(each.gpu for each in answers).values()) > 0.2 * len(answers)


def test_silent_replicas_are_routed_to_as_by_default(ray: Cluster) -> None:
    with ray.load("silent", 0.05, 10) as answers:
        time.sleep(3)
    assert all(each.complete for each in answers)
    assert min(Counter(each.gpu for each in answers).values()) > 0.2 * len(answers)


def lost(answers: list[Answer]) -> list[Answer]:
    return [each for each in answers if not each.complete]


def fault(ray: Cluster, app: str, number: signal.Signals, stream: bool, at: str = "L40S") -> tuple[list[Answer], int]:
    """Answers to a load in which the replica of a GPU gets a signal, and that replica's process. (One that hangs is
    replaced while it still is there, so that of the default's two, both may then be of the other GPU.)"""
    with ray.load(app, 0.05, 40, stream) as answers:
        time.sleep(3)
        replicas = ray.replicas(app)
        victim = min(replicas, key=lambda pid: replicas[pid] != at)
        os.kill(victim, number)
        time.sleep(3)
    return answers, victim


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_whole_answers_are_not_lost_with_a_replica(ray: Cluster, cheapest: str, number: signal.Signals) -> None:
    """Serve's own handle loses those that ran there; ours asks another replica, as nobody has seen a token."""
    assert cheapest == "L40S"
    ray.settle("fleet", cheapest)
    theirs, _ = fault(ray, "default", number, stream=False)
    ours, _ = fault(ray, "fleet", number, stream=False)
    print(f"lost: {len(lost(theirs))} of {len(theirs)} by default, {len(lost(ours))} of {len(ours)} by ours")
    assert lost(theirs)
    assert not lost(ours)
    ray.wait_for("default", len(GPUS))
    ray.wait_for("fleet", len(GPUS))


@pytest.mark.parametrize("at", GPUS)
@pytest.mark.parametrize("app", ["default", "router", "fleet"])
def test_of_streams_only_those_on_a_killed_replica_are_lost(ray: Cluster, app: str, at: str) -> None:
    """More where requests were gathered, none where they were not; by default some on either."""
    if app != "default":
        ray.settle(app, "L40S")
    answers, victim = fault(ray, app, signal.SIGKILL, stream=True, at=at)
    print(f"{app}, {at} killed: lost {len(lost(answers))} of {len(answers)}")
    assert all(set(each.pids) <= {victim} for each in lost(answers))
    if app == "fleet":  # and of those only what had begun
        assert all(each.pids for each in lost(answers))
    if app != "default" and at != "L40S":
        assert not lost(answers)
    ray.wait_for(app, len(GPUS))


def test_a_stale_replica_is_no_longer_chosen(ray: Cluster, cheapest: str) -> None:
    ray.settle("router", cheapest)
    pid = next(pid for pid, gpu in ray.replicas("router").items() if gpu == cheapest)
    ray.stale(pid)
    other = next(gpu for gpu in GPUS if gpu != cheapest)
    ray.settle("router", other, timeout_s=20)
    # With all of them stale the default decides.
    for each in ray.replicas("router"):
        ray.stale(each)
    time.sleep(5)
    with ray.load("router", 0.05, 10) as answers:
        time.sleep(3)
    assert not lost(answers)
    assert min(Counter(each.gpu for each in answers).values()) > 0.2 * len(answers)


def test_a_replica_is_added_under_load(ray: Cluster) -> None:
    before = ray.replicas("grows")
    assert list(before.values()) == GPUS[:1]
    with ray.load("grows", 0.05, 20) as answers:
        time.sleep(2)
        ray.scale("grows", 2)
        time.sleep(8)
    assert not lost(answers)
    assert Counter(each.gpu for each in answers[-20:])["L40S"] > 15


def test_decisions_are_counted(ray: Cluster) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:  # Ray's processes report each few seconds
        reasons = ray.counted("energylens_routing_decisions_total")
        causes = ray.counted("energylens_routing_fallbacks_total")
        if reasons["least_joules"] > 100 and causes["no_model"] > 20 and causes["stale"] > 20:
            break
        time.sleep(2)
    assert reasons["least_joules"] > 100, reasons
    assert causes["no_model"] > 20, causes
    assert causes["stale"] > 20, causes
    assert ray.counted("energylens_routing_saved_joules_total")[""] > 0


def test_prompts_are_in_no_log(ray: Cluster) -> None:
    ray.ask("router", "extraordinarysecret " * 50)
    ray.ask("silent", "extraordinarysecret " * 50)
    time.sleep(1)
    session = Path("/tmp/ray/session_latest/logs")
    logs = [ray.folder / "cluster.log", *(path for path in session.rglob("*") if path.is_file())]
    assert len(logs) > 10
    assert not [path for path in logs if b"extraordinarysecret" in path.read_bytes()]
