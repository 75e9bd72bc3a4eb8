"""What routers are told of an engine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.routing import Request, Snapshot, StepTable, rank
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.metrics import BY_NAME, ROUTING
from energylens_vllm.serving.observer import Step, StepObserver
from energylens_vllm.serving.predictor import ModelPredictor
from energylens_vllm.serving.replica import HUNG_S, Live, Replica, tell_routers
from energylens_vllm.serving.settings import Settings

MODEL = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256))
SETTINGS = Settings(routing=True)


class Engine:
    """An engine that holds what it is said to."""

    def __init__(self, model: EnergyModel = MODEL, settings: Settings = SETTINGS) -> None:
        self.live, self.now = Live(0, 0, 0.0, 800_000.0), 100.0
        self.replica = Replica(model, lambda: self.live, settings, lambda: self.now, lambda: 1.7e9 + self.now)

    def report(self, *steps: Step) -> dict[str, float]:
        increments = Increments()
        predictor = ModelPredictor(MODEL)
        self.replica(steps, predictor.predict([step.batch for step in steps]) if steps else None, increments)
        return {" ".join((name, *labels)): value for name, labels, value in increments.take()["set"]}


def decode(start_s: float, end_s: float, requests: int = 8) -> Step:
    names = [str(i) for i in range(requests)]
    return Step(
        Batch(names, [1] * requests, [500] * requests, [True] * requests, requests, requests), start_s, end_s
    )  # fmt: skip


def test_all_gauges_are_told_and_none_is_there_before() -> None:
    engine = Engine()
    told = {name.split()[0] for name in engine.report()} | {name.split()[0] for name in engine.report()}
    assert told == {metric.name for metric in ROUTING}
    assert not [name for metric in ROUTING for name in metric.known_label_values()]


def test_price_and_room_are_those_of_rank() -> None:
    engine = Engine()
    engine.live = Live(16, 900, 16 * 700.0, 800_000.0)
    told = engine.report()
    table = StepTable.compile(MODEL, 800_000)
    request = Request(512, 256.0, ttft_s=1.0, tpot_s=0.05)
    verdict = rank([Snapshot(table, 16.0, 900.0, 16 * 700.0)], request)[0]
    assert told["energylens_marginal_energy_joules"] == pytest.approx(verdict.joules / 256)
    assert told["energylens_slo_headroom_ratio ttft"] == pytest.approx(1 - verdict.ttft_s / 1.0)
    assert told["energylens_slo_headroom_ratio tpot"] == pytest.approx(1 - verdict.tpot_s / 0.05)
    assert told["energylens_held_requests"] == 16
    assert told["energylens_waiting_tokens"] == 900
    assert told["energylens_kv_used_tokens"] == 16 * 700
    assert told["energylens_kv_capacity_tokens"] == 800_000


def test_a_busy_engine_is_cheaper_and_has_less_room() -> None:
    engine = Engine()
    idle = engine.report()
    engine.live = Live(32, 20_000, 32 * 700.0, 800_000.0)
    busy = engine.report()
    assert busy["energylens_marginal_energy_joules"] < 0.5 * idle["energylens_marginal_energy_joules"]
    for target in ("ttft", "tpot"):
        assert busy[f"energylens_slo_headroom_ratio {target}"] < idle[f"energylens_slo_headroom_ratio {target}"]


def test_an_engine_that_is_full_has_no_room_though_it_is_quick() -> None:
    engine = Engine()
    for full in (Live(256, 0, 256 * 700.0, 800_000.0), Live(8, 0, 790_000.0, 800_000.0)):
        engine.live = full
        assert engine.report()["energylens_slo_headroom_ratio ttft"] == 0.0


def test_an_engine_that_hangs_has_no_room_and_grows_old() -> None:
    engine = Engine()
    engine.live = Live(4, 0, 2800.0, 800_000.0)
    before = engine.report(decode(99.0, 99.01))
    engine.now += 5
    later = engine.report()
    assert later["energylens_slo_headroom_ratio ttft"] == pytest.approx(
        before["energylens_slo_headroom_ratio ttft"] - 5, abs=0.2
    )
    assert later["energylens_snapshot_timestamp_seconds"] == 1.7e9 + 105
    engine.now += HUNG_S
    assert "energylens_snapshot_timestamp_seconds" not in engine.report()
    engine.live = Live(0, 0, 0.0, 800_000.0)  # it has ended them after all
    assert engine.report()["energylens_slo_headroom_ratio ttft"] > 0


def test_steps_that_take_longer_than_predicted_leave_less_room() -> None:
    engine = Engine()
    engine.live = Live(8, 0, 4000.0, 800_000.0)
    expected_s = float(ModelPredictor(MODEL).predict([decode(0, 1).batch]).time_s[0])
    rooms = []
    for _ in range(30):
        engine.now += 1
        steps = [decode(engine.now - 1, engine.now - 1 + 3 * expected_s)]
        rooms.append(engine.report(*steps)["energylens_slo_headroom_ratio tpot"])
    assert 1 - rooms[-1] == pytest.approx(3 * (1 - rooms[0]) / 1.4, rel=0.05)  # the first has learnt a fifth of it


def test_info_says_what_a_router_needs() -> None:
    deployment = Deployment(gpu="H200-SXM", max_num_seqs=64, enforce_eager=True, vllm_release="0.32.0")
    told = Engine(EnergyModel("llama-3.1-8b", deployment)).report()
    assert told["energylens_replica_info 1 1 1 false auto 64 8192 true 0.32.0"] == 1
    assert BY_NAME["energylens_replica_info"].label_names[5:7] == ("max_num_seqs", "max_num_batched_tokens")


def test_only_if_the_settings_say_so() -> None:
    for settings, listeners, interval_s in ((Settings(), 0, 5.0), (SETTINGS, 1, 1.0)):
        observer = StepObserver(lambda work: work, ModelPredictor(MODEL))
        tell_routers(observer, settings, lambda: Live(0, 0, 0.0, 1000.0))
        assert (len(observer.listeners), observer.report_interval_s) == (listeners, interval_s)
    observer = StepObserver(lambda work: work, None)
    tell_routers(observer, SETTINGS, lambda: Live(0, 0, 0.0, 1000.0))
    assert not observer.listeners


def test_numbers_are_finite_at_any_load() -> None:
    engine = Engine()
    for held in (0, 1, 255, 256, 300, 5000):
        engine.live = Live(held, held * 1000, min(held * 700.0, 8e5), 800_000.0)
        assert all(math.isfinite(value) for value in engine.report().values())
    assert np.isfinite(engine.report()["energylens_marginal_energy_joules"])
