"""A router's view: reports plus what was placed since, staleness, prefixes, memory over a day."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing import StepTable
from energylens_vllm.routing.fleet import LiveFleet, Targets
from energylens_vllm.routing.prompts import read
from energylens_vllm.routing.report import Report

SHORT = read({"prompt": "some words", "max_tokens": 20})
LONG = read({"prompt": "a long story " * 2000, "max_tokens": 20})


class Time:
    """Both clocks of a fleet."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(scope="module")
def costly() -> StepTable:
    return StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=64)), 400_000).scaled(
        energy=3.0
    )


def idle(time: Time, **values: object) -> Report:
    return replace(Report(time.now, 0, 0, 0, 0, 0), **values)  # type: ignore[arg-type]


@pytest.fixture
def fleet(time: Time, table: StepTable) -> LiveFleet:
    """Two alike, "a" and "b", that have reported that they are idle."""
    made = LiveFleet(monotonic=time, wall=time)
    made.update("d", ["a", "b"])
    for key in "ab":
        made.know(key, table)
        made.hear(key, idle(time))
    return made


def running(fleet: LiveFleet) -> list[float]:
    return [float(each) for each in fleet.rank(SHORT).ranking.snapshots.running]


def test_what_is_placed_counts_until_it_ends_or_is_reported(fleet: LiveFleet, time: Time) -> None:
    for number in range(3):
        fleet.place(fleet.rank(SHORT), f"r{number}", "a")
    assert running(fleet) == [3, 0]
    fleet.end("r0")
    assert running(fleet) == [2, 0]
    fleet.end("r0")
    fleet.end("never seen")
    assert running(fleet) == [2, 0]
    time.now += 1
    fleet.hear("a", idle(time, running=2))
    assert running(fleet) == [2, 0]  # not 4: they are in the report
    fleet.end("r1")
    assert running(fleet) == [1, 0]
    time.now += 1
    fleet.hear("a", idle(time, running=1))
    assert running(fleet) == [1, 0]


def test_a_request_that_moves_is_counted_once(fleet: LiveFleet) -> None:
    choice = fleet.rank(SHORT)
    fleet.place(choice, "r", "a")
    fleet.place(choice, "r", "b")
    assert running(fleet) == [0, 1]
    fleet.place(choice, "r", "gone")
    assert running(fleet) == [0, 0]


def test_endings_that_nobody_tells(fleet: LiveFleet, time: Time) -> None:
    """Reports alone say how many there are, and nothing stays behind."""
    for number in range(100):
        fleet.place(fleet.rank(SHORT), f"r{number}", "a", ends=False)
    assert running(fleet) == [100, 0]
    time.now += 1
    fleet.hear("a", idle(time, running=7))
    assert running(fleet) == [7, 0]
    assert not fleet._placed


def test_a_repeated_report_makes_nothing_younger(fleet: LiveFleet, time: Time) -> None:
    for _ in range(8):
        time.now += 1
        fleet.hear("a", idle(time))
        fleet.hear("b", Report(1000.0, 0, 0, 0, 0, 0))
    choice = fleet.rank(SHORT)
    assert choice.order[0] == "a"
    assert choice.silent == ["b"]
    assert choice.fallback is None


def test_an_engine_that_is_stuck_is_unknown_though_its_replica_reports(fleet: LiveFleet, time: Time) -> None:
    fleet.hear("a", idle(time, sampled_s=time.now + 0.01, running=1, silent_s=10.0))
    assert fleet.rank(SHORT).silent == ["a"]


def test_all_stale_is_for_the_host(fleet: LiveFleet, time: Time) -> None:
    time.now += 10
    assert fleet.rank(SHORT).fallback == "stale"
    fleet.hear("b", idle(time))
    assert fleet.rank(SHORT).fallback is None
    fleet.silence("b")
    assert fleet.rank(SHORT).fallback == "stale"


def test_without_models_or_replicas_it_is_for_the_host(time: Time) -> None:
    fleet = LiveFleet(monotonic=time, wall=time)
    assert fleet.rank(SHORT).fallback == "no_replica"
    fleet.update("d", ["a"])
    assert fleet.rank(SHORT).fallback == "no_model"
    fleet.hear("a", idle(time))
    assert fleet.rank(SHORT).fallback == "no_model"


def test_replicas_come_and_go(fleet: LiveFleet, table: StepTable, time: Time) -> None:
    fleet.place(fleet.rank(SHORT), "r", "a")
    fleet.update("d", ["b"])
    fleet.update("other", ["c"])
    assert fleet.rank(SHORT).keys == ("b", "c")
    fleet.end("r")
    fleet.update("d", ["a", "b"])
    assert not fleet.has_table("a")
    assert fleet.deployment_of("c") == "other"
    assert fleet.deployment_of("nobody") is None


def test_clocks_that_disagree(fleet: LiveFleet, time: Time) -> None:
    """A replica's clock may be an hour off: its reports are dated by when they come."""
    for number in range(5):
        fleet.place(fleet.rank(SHORT), f"r{number}", "a")
        time.now += 1
        fleet.hear("a", Report(time.now + 3600, number + 1, 0, 0, 0, 0))
        assert number + 1 <= running(fleet)[0] <= number + 3
    time.now += 2
    fleet.hear("a", Report(time.now + 3600, 5, 0, 0, 0, 0))
    assert running(fleet)[0] == 5


def test_a_cached_prefix_attracts(fleet: LiveFleet, costly: StepTable) -> None:
    fleet.place(fleet.rank(LONG), "r", "b")
    fleet.end("r")
    fleet.place(fleet.rank(SHORT), "s", "a")  # and with it the hysteresis is with a
    fleet.end("s")
    ranking = fleet.rank(LONG)
    assert ranking.order[0] == "b"
    assert ranking.uncached[1] < 0.05 * ranking.uncached[0]
    assert fleet.rank(SHORT).order[0] == "a"
    fleet.know("b", costly)  # an affinity, not a chain
    assert fleet.rank(SHORT).order[0] == "a"


def test_answers_teach_what_to_expect(fleet: LiveFleet, time: Time) -> None:
    before = fleet._expected.tokens(100)
    for number in range(1, 60):
        time.now += 1
        fleet.hear("a", idle(time, num_ended=10 * number, ended=((100, 900),) * 10))
    assert before < 300 < fleet._expected.tokens(100)
    assert fleet._expected.tokens(100, 50) <= 50


def test_power_of_two(fleet: LiveFleet) -> None:
    draw = random.Random(0)
    fleet.update("e", ["c"])
    for number in range(4):
        choice = fleet.rank(SHORT)
        fleet.place(choice, f"r{number}", "c")
    drawn = [fleet.power_of_two(["d", "e"], draw) for _ in range(300)]
    assert set(drawn) == {"d"}  # "c" is never the one with fewer
    assert fleet.power_of_two(["nothing"], draw) is None


@pytest.mark.parametrize("targets", [{"ttft_s": 0}, {"tpot_s": "soon"}, {"tpot": 1}, {"max_age_s": True}])
def test_targets(targets: dict[str, object]) -> None:
    with pytest.raises(EnergyLensError, match="accepted"):
        Targets.of(targets)


def test_memory_of_a_day(fleet: LiveFleet, time: Time) -> None:
    """Requests whose prompts are all new, a report a second; after the first part of the day nothing grows."""
    prompts = random.Random(0)

    def requests(count: int) -> None:
        for number in range(count):
            prompt = read({"prompt": f"{prompts.random()} words " * 400})
            choice = fleet.rank(prompt)
            key = choice.order[0]
            fleet.place(choice, f"{time.now}-{number}", key, ends=number % 2 == 0)
            fleet.end(f"{time.now}-{number}")
            if number % 50 == 0:
                time.now += 1
                for each in "ab":
                    fleet.hear(each, idle(time, num_ended=number, ended=((100, 20),)))

    tracemalloc.start()
    requests(800)  # of 30 blocks and more: the 12,500 that a replica's cache holds are full
    before, _ = tracemalloc.get_traced_memory()
    requests(1600)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 0.1 * before
    assert len(fleet._placed) < 200
