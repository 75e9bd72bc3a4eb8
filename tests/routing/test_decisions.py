"""What is counted of decisions, and what of them is an estimate."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from energylens_vllm.routing import Request, Snapshot, StepTable, rank
from energylens_vllm.routing.decisions import ADDED, CAUSES, DECISIONS, FALLBACKS, METRICS, REASONS, SAVED, Decisions
from energylens_vllm.routing.decisions import prometheus_count as counts_of
from energylens_vllm.routing.policy import Ranking

REQUEST = Request(500, 200.0, ttft_s=1.0, tpot_s=0.05)


class Told:
    """Counts in a dict."""

    def __init__(self) -> None:
        self.of: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.decisions = Decisions(self.count)

    def count(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        assert value >= 0  # as counters demand
        self.of[(name, *labels)] += value


def fleet(table: StepTable | None, *running: int, age_s: float = 0.0) -> list[Snapshot]:
    return [Snapshot(table, float(n), 0.0, n * 700.0, 700.0, age_s=age_s) for n in running]


def ranked(snapshots: list[Snapshot], request: Request = REQUEST) -> tuple[Ranking, int]:
    ranking = rank(snapshots, request)
    assert ranking.best is not None
    return ranking, ranking.best


def test_each_reason(table: StepTable) -> None:
    told = Told()
    _, first = ranked(fleet(table, 64, 65))
    cases = {
        "least_joules": ranked(fleet(table, 0, 8)),
        "hysteresis": ranked(fleet(table, 64, 65), replace(REQUEST, previous=1 - first)),
        "least_damage": ranked(fleet(table, 0, 8), replace(REQUEST, tpot_s=1e-4)),
        "unknown": ranked([*fleet(table, 256), *fleet(None, 0)]),
        "fallback": ranked(fleet(None, 0, 0)),
    }
    other, best = ranked(fleet(table, 0, 8))
    cases["host"] = (other, 1 - best)
    for reason, (ranking, chosen) in cases.items():
        assert told.decisions.record(ranking, chosen) == reason
    assert cases.keys() == set(REASONS)
    assert all(told.of[DECISIONS, reason] == 1 for reason in REASONS)


def test_each_cause(table: StepTable) -> None:
    told = Told()
    told.decisions.record(*ranked(fleet(None, 0, 0)))
    told.decisions.record(*ranked(fleet(table, 0, 0, age_s=60)))
    out = rank([replace(each, healthy=False) for each in fleet(table, 0, 0)], REQUEST)
    told.decisions.record(out, 0)
    told.decisions.fell_back("error")
    told.decisions.fell_back("unsupported")
    told.decisions.fell_back("the weather")  # counted as an error: labels stay few
    assert {cause: told.of[FALLBACKS, cause] for cause in CAUSES} == {
        "no_model": 1, "stale": 1, "no_replica": 1, "error": 2, "unsupported": 1,
    }  # fmt: skip
    assert told.of[DECISIONS, "fallback"] == 6
    assert not told.of[(SAVED,)]


def test_saved_joules_are_those_of_least_request_less_those_chosen(table: StepTable) -> None:
    told = Told()
    ranking, chosen = ranked(fleet(table, 0, 8, 0))
    assert chosen == 1
    told.decisions.record(ranking, chosen)
    saved = float(ranking.joules[0] - ranking.joules[1])
    assert saved > 0
    assert told.of[(SAVED,)] == pytest.approx(saved)
    assert told.of[ADDED, "chosen"] == pytest.approx(float(ranking.joules[1]))
    assert told.of[ADDED, "least_request"] == pytest.approx(float(ranking.joules[0]))


def test_what_choices_cost_more_is_made_up_for_first(table: StepTable) -> None:
    told = Told()
    ranking, chosen = ranked(fleet(table, 0, 8))
    saved = float(ranking.joules[0] - ranking.joules[1])
    dear, _ = ranked(fleet(table, 0, 8))
    dear.snapshots.running[0] = 9.0  # as if the busy one had the fewest requests, and the idle one was taken
    told.decisions.record(dear, 0)
    assert not told.of[(SAVED,)]
    told.decisions.record(ranking, chosen)
    assert told.of[(SAVED,)] == pytest.approx(0.0, abs=1e-9)
    told.decisions.record(ranking, chosen)
    assert told.of[(SAVED,)] == pytest.approx(saved)
    assert told.of[(SAVED,)] == pytest.approx(told.of[ADDED, "least_request"] - told.of[ADDED, "chosen"])


def test_in_prometheus_all_series_are_there_from_the_start(table: StepTable) -> None:
    registry = CollectorRegistry()
    decisions = Decisions(counts_of(registry))
    Decisions(counts_of(registry))  # a second router of the process goes on with the same counters
    before = generate_latest(registry).decode()
    decisions.record(*ranked(fleet(table, 0, 8)))
    after = generate_latest(registry).decode()

    def series(text: str) -> set[str]:
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    assert series(before) == series(after)
    assert 'energylens_routing_decisions_total{reason="least_joules"} 1.0' in after
    assert {metric.name for metric in METRICS} <= {name.partition("{")[0] for name in series(after)}


def test_counting_is_no_reason_to_fail(table: StepTable, caplog: pytest.LogCaptureFixture) -> None:
    def count(name: str, value: float, labels: tuple[str, ...]) -> None:
        raise RuntimeError("disk full")

    decisions = Decisions(count)
    for _ in range(3):
        assert decisions.record(*ranked(fleet(table, 0, 8))) == "fallback"
        decisions.fell_back("error")
    assert len(caplog.records) == 1
