"""Properties of `rank`: a total order, monotone in load, free of starvation and of scale; unknown is never idle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing import Config, Request, Snapshot, Snapshots, StepTable, rank
from energylens_vllm.routing.policy import FEASIBLE, INFEASIBLE, _rank_few, _rank_many

TABLE = StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256)), 800_000)
SLOW = StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="L40S", max_num_seqs=256)), 100_000)
REQUEST = Request(500, 200.0, ttft_s=1.0, tpot_s=0.05)

snapshot = some.builds(
    Snapshot,
    table=some.sampled_from([TABLE, SLOW, None]),
    running=some.one_of(some.none(), some.integers(0, 300).map(float)),
    waiting_tokens=some.one_of(some.none(), some.integers(0, 100_000).map(float)),
    kv_tokens_used=some.one_of(some.just(math.nan), some.integers(0, 900_000).map(float)),
    mean_context=some.one_of(some.none(), some.integers(1, 200_000).map(float)),
    prefill_tokens_per_s=some.floats(0, 1e5),
    age_s=some.floats(0, 20),
    healthy=some.booleans(),
    powered=some.booleans(),
    role=some.sampled_from(["both", "prefill", "decode"]),
    start_s=some.sampled_from([math.inf, 30.0]),
    start_j=some.floats(0, 1e4),
)
fleets = some.lists(snapshot, min_size=1, max_size=12)
requests = some.builds(
    Request, some.integers(0, 100_000), some.floats(1, 1e4), ttft_s=some.floats(0.01, 10), tpot_s=some.floats(0.005, 1),
    phase=some.sampled_from(["both", "prefill", "decode"]), previous=some.integers(-1, 11), turn=some.integers(0, 99),
)  # fmt: skip


def idle(table: StepTable | None = TABLE, running: float = 0.0, **more: object) -> Snapshot:
    return Snapshot(table, running, 0.0, running * 700, 700.0, **more)  # type: ignore[arg-type]


@given(fleets, requests)
@settings(max_examples=150, deadline=None)
def test_all_replicas_are_ranked_once_and_by_state(fleet: list[Snapshot], request: Request) -> None:
    ranking = rank(fleet, request)
    assert sorted(verdict.replica for verdict in ranking) == list(range(len(fleet)))
    places = [("feasible", "unknown", "infeasible", "out").index(verdict.state) for verdict in ranking]
    assert places == sorted(places)
    assert all(verdict.reason for verdict in ranking)
    for verdict in ranking:
        each = fleet[verdict.replica]
        if verdict.state in ("feasible", "infeasible"):
            assert each.table is not None
            assert each.age_s <= Config().max_age_s
            assert verdict.joules >= 0
        if verdict.state != "out":
            assert each.healthy
            assert each.powered or each.start_s < math.inf
    assert repr(list(ranking)) == repr(list(rank(fleet, request)))  # pure; NaN is not equal to itself
    everyone_out = all(verdict.state == "out" for verdict in ranking)
    assert (ranking.best is None) == everyone_out  # else somebody serves it, however late


@given(some.integers(0, 250), some.integers(0, 50_000), some.integers(0, 5), some.integers(0, 5000))
@settings(max_examples=150, deadline=None)
def test_more_load_is_never_faster_nor_makes_a_replica_feasible(
    running: int, waiting: int, more_running: int, more_waiting: int
) -> None:
    less = Snapshot(TABLE, float(running), float(waiting), 700.0 * running, 700.0)
    more = replace(
        less, running=float(running + more_running), waiting_tokens=float(waiting + more_waiting),
        kv_tokens_used=700.0 * (running + more_running),
    )  # fmt: skip
    request = replace(REQUEST, prompt_tokens=600)
    one, other = rank([less], request)[0], rank([more], request)[0]
    assert other.ttft_s >= one.ttft_s - 1e-12
    assert other.tpot_s >= one.tpot_s * (1 - 1e-9)
    assert not (one.state == "infeasible" and other.state == "feasible")


@given(some.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_order_does_not_depend_on_the_unit_of_energy(scale: float) -> None:
    def scaled(table: StepTable) -> StepTable:
        wrong = replace(table, idle_w=table.idle_w * scale)
        return wrong.scaled(1.0, scale)

    fleet = [idle(TABLE, 3), idle(SLOW, 9), idle(TABLE, 20), idle(SLOW), idle(TABLE, 64)]
    order = [verdict.replica for verdict in rank(fleet, REQUEST)]
    other = [replace(each, table=scaled(each.table)) for each in fleet if each.table is not None]
    assert [verdict.replica for verdict in rank(other, REQUEST)] == order


def test_requests_gather_where_some_run_already_and_the_target_bounds_it() -> None:
    assert rank([idle(), idle(running=8), idle()], REQUEST).best == 1
    tight = replace(REQUEST, tpot_s=1.5 * float(TABLE.decode_s[1, 3]))
    assert rank([idle(), idle(running=128), idle()], tight).best == 0


def test_nobody_feasible_means_least_damage() -> None:
    impossible = replace(REQUEST, tpot_s=1e-4)
    ranking = rank([idle(running=100), idle(running=2), idle(SLOW, 2)], impossible)
    assert [verdict.state for verdict in ranking] == ["infeasible"] * 3
    assert ranking.best == 1
    assert "time per token" in ranking[0].reason


def test_what_is_stale_is_not_idle() -> None:
    ranking = rank([idle(age_s=60.0), idle(running=8), idle(None)], REQUEST)
    assert [verdict.state for verdict in ranking] == ["feasible", "unknown", "unknown"]
    assert math.isnan(ranking[1].joules)
    assert "stale" in ranking[1].reason
    assert not ranking.fallback


def test_with_nothing_known_replicas_take_turns_and_the_host_decides() -> None:
    fleet = [idle(age_s=60.0)] * 3
    rankings = [rank(fleet, replace(REQUEST, turn=turn)) for turn in range(3)]
    assert [ranking.best for ranking in rankings] == [0, 1, 2]
    assert all(ranking.fallback for ranking in rankings)
    assert rank([], REQUEST).best is None


def test_a_small_difference_does_not_move_requests() -> None:
    fleet = [idle(running=64), idle(running=65)]
    left, right = (rank(fleet, replace(REQUEST, previous=i)) for i in (0, 1))
    assert abs(left[0].joules - left[1].joules) < 0.03 * left[0].joules
    assert (left.best, right.best) == (0, 1)


def test_of_idle_replicas_that_cost_the_same_the_fastest_kind_comes_first() -> None:
    """They gather where the first goes: a slow replica would soon be full."""
    ranking = rank([idle(SLOW), idle(SLOW), idle(), idle()], REQUEST)
    assert ranking.joules[0] == pytest.approx(ranking.joules[2], rel=0.03)
    assert ranking.joules[0] < ranking.joules[2]
    assert list(ranking.order) == [2, 3, 0, 1]
    assert rank([idle(SLOW), idle()], replace(REQUEST, previous=0)).best == 0


def test_where_all_are_late_a_cached_prefix_outweighs_a_queue_a_little_shorter() -> None:
    request = Request(20_000, 300.0, np.array([18_000.0, 0.0]), 1.0, 0.05, typical_prompt_tokens=10_000.0)
    load = dict(running=20.0, kv_tokens_used=150_000.0, mean_context=7000.0, prefill_tokens_per_s=25_000.0)
    fleet = [Snapshot(TABLE, waiting_tokens=tokens, **load) for tokens in (130_000.0, 100_000.0)]
    assert rank(fleet, request).best == 0
    assert rank(fleet, replace(request, cached_tokens=0.0)).best == 1


def test_cached_prefixes_draw_requests() -> None:
    request = replace(REQUEST, prompt_tokens=4000, cached_tokens=np.array([0.0, 3900.0]))
    assert rank([idle(running=8), idle(running=8)], request).best == 1


@pytest.mark.parametrize("wrong", [{"headroom": 1.0}, {"kv_headroom": -0.1}, {"hysteresis": 2}, {"max_age_s": 0}])
def test_a_setting_out_of_range_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(EnergyLensError, match=next(iter(wrong))):
        Config(**wrong)


def test_a_request_of_nothing_is_refused() -> None:
    with pytest.raises(EnergyLensError, match="accepted"):
        rank([idle()], Request(10, 0.0))


@given(some.lists(snapshot, min_size=1, max_size=30), requests, some.sampled_from([None, (0.0, 50.0), (16.0, 300.0)]))
@settings(max_examples=300, deadline=None)
def test_one_by_one_and_all_at_once_agree(
    fleet: list[Snapshot], request: Request, short: tuple[float, float] | None
) -> None:
    snapshots, request = Snapshots.of(fleet), replace(request, short_output=short)
    few, many = (each(snapshots, request, Config()) for each in (_rank_few, _rank_many))
    assert few.fallback == many.fallback
    assert list(few.state) == list(many.state)
    known = [i for i, state in enumerate(few.state) if state in (FEASIBLE, INFEASIBLE)]
    for what in ("joules", "ttft_s", "tpot_s", "risk"):
        one, other = (np.asarray(getattr(each, what))[known] for each in (few, many))
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-15)
    # Places differ at most between those whose keys differ by rounding.
    for one, other in zip(few, many, strict=True):
        assert one.state == other.state
        assert one.replica == other.replica or one.state == "infeasible" or one.joules == pytest.approx(other.joules)


@given(
    some.integers(0, 250), some.integers(0, 50_000), some.integers(1, 5), some.integers(0, 5000), some.floats(0, 1e4)
)
@settings(max_examples=150, deadline=None)
def test_more_load_is_never_less_risk(
    running: int, waiting: int, more_running: int, more_waiting: int, rate: float
) -> None:
    less = Snapshot(TABLE, float(running), float(waiting), 0.0, 700.0, rate)
    more = replace(less, running=float(running + more_running), waiting_tokens=float(waiting + more_waiting))
    request = replace(REQUEST, prompt_tokens=1000, short_output=(5.0, 100.0), tpot_s=1.0)
    ranking = rank([less, more], request)
    assert ranking.risk[1] >= ranking.risk[0] - 1e-12


def test_a_long_prompt_keeps_away_from_prompts_that_wait() -> None:
    """Those who wait there are young when it is prefilled: short answers among them would be late."""
    fleet = [Snapshot(TABLE, 3.0, 3000.0, 3000.0, 1000.0), idle(running=1), idle()]
    request = replace(REQUEST, typical_prompt_tokens=1000.0, ttft_s=5.0)
    short, long = (rank(fleet, replace(request, prompt_tokens=tokens)) for tokens in (16, 20_000))
    assert short.best == 0
    assert long.best != 0
    assert "would be late" in next(verdict.reason for verdict in long if verdict.replica == 0)


def test_long_answers_endure_more(table: StepTable) -> None:
    fleet = [Snapshot(table, 3.0, 3000.0, 3000.0, 1000.0)]
    request = replace(REQUEST, prompt_tokens=2000)
    risks = [rank(fleet, replace(request, short_output=(0.0, spread))).risk[0] for spread in (10.0, 100.0, 1000.0)]
    assert risks[0] > risks[1] > risks[2] > 0
    assert rank(fleet, replace(request, short_output=(1e5, 1000.0))).risk[0] == 0


def test_a_start_is_charged_and_waited_for() -> None:
    off = idle(powered=False)
    starts = replace(off, start_s=30.0, start_j=5000.0)
    assert rank([off], REQUEST)[0].state == "out"
    ranking = rank([starts, idle()], replace(REQUEST, ttft_s=math.inf))
    assert ranking.best == 1
    assert ranking.joules[0] - ranking.joules[1] == pytest.approx(5000.0)
    assert ranking.ttft_s[0] - ranking.ttft_s[1] == pytest.approx(30.0)
    assert rank([starts], REQUEST)[0].state == "infeasible"  # it would be late, but somebody has to


@given(some.integers(1, 12), some.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_nobody_starves(count: int, sent: int) -> None:
    """Whoever holds nothing gets a request as soon as all others hold enough to miss a target, and a replica that was
    infeasible is chosen again once its load has gone."""
    request = replace(REQUEST, tpot_s=2.5 * float(TABLE.decode_s[1, 3]))
    busy = [idle(running=200.0 + i) for i in range(count)]
    assert rank([*busy, idle()], request).best == count
    emptied = [idle(), *busy[1:]]
    assert rank(emptied, replace(request, previous=sent % count)).best == 0
