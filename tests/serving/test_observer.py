"""Steps are paired with their time, accounted for once, and nothing that fails gets out."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import Increments, Report
from energylens_vllm.serving.observer import MAX_IN_FLIGHT, MAX_UNREPORTED, Step, StepObserver
from energylens_vllm.serving.predictor import Predictions, Predictor


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Stands for a SchedulerOutput."""

    def __init__(self, prefill: int = 0, decode: int = 0) -> None:
        self.prefill, self.decode = prefill, decode


def read(work: Work) -> Batch:
    counts = [count for count in (work.prefill, work.decode) if count]
    return Batch(
        request_ids=[str(i) for i in range(len(counts))],
        new_tokens=counts,
        computed_tokens=[0] * len(counts),
        is_decode=[count == work.decode for count in counts],
        num_tokens=sum(counts),
        num_decode_tokens=work.decode,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(predictor: Predictor, clock: Clock) -> StepObserver:
    return StepObserver(read, predictor, clock=clock)


def totals(reports: Iterable[Report]) -> dict[str, float]:
    """Counters as /metrics would show them, "name value-of-label" -> value."""
    sums: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        for name, labels, value in report.get("add", []):
            sums[" ".join((name.removeprefix("energylens_"), *labels))] += value
    return dict(sums)


def run(observer: StepObserver, clock: Clock, times: Sequence[tuple[float, float]]) -> list[float]:
    """Durations of steps that are scheduled at and end at the given times."""
    durations: list[float] = []
    observer.listeners.append(lambda steps, *_: durations.extend(round(step.duration_s, 9) for step in steps))
    works = [Work(decode=1) for _ in times]
    events = [(start, 1, i) for i, (start, _) in enumerate(times)] + [(end, 0, i) for i, (_, end) in enumerate(times)]
    for at, is_start, i in sorted(events):
        clock.now = at
        if is_start:
            observer.scheduled(works[i], works[i], at)
        else:
            observer.ended(works[i])
    observer.report()
    return durations


def test_a_step_alone_takes_from_its_scheduling_to_its_end(observer: StepObserver, clock: Clock) -> None:
    assert run(observer, clock, [(1.0, 1.25)]) == [0.25]


def test_with_two_in_flight_a_step_begins_when_the_one_before_ends(observer: StepObserver, clock: Clock) -> None:
    assert run(observer, clock, [(0.0, 1.0), (0.1, 2.0), (1.1, 2.5)]) == [1.0, 1.0, 0.5]


def test_idle_time_is_in_no_step(observer: StepObserver, clock: Clock) -> None:
    assert run(observer, clock, [(0.0, 1.0), (60.0, 61.0)]) == [1.0, 1.0]


def test_the_report_has_all_sums(observer: StepObserver, clock: Clock) -> None:
    for work in (Work(prefill=8), Work(prefill=4, decode=2), Work(decode=6)):
        observer.scheduled(work, work, clock.now)
        clock.now += 0.25
        observer.ended(work)
    observer.num_dummy_steps += 2
    observer.report()
    reports = observer.take_outbox()
    assert totals(reports) == {
        "steps_total prefill": 1.0,
        "steps_total mixed": 1.0,
        "steps_total decode": 1.0,
        "tokens_total prefill": 12.0,
        "tokens_total decode": 8.0,
        "predicted_energy_joules_total prefill": 3.0,
        "predicted_energy_joules_total decode": 4.0,
        "predicted_component_energy_joules_total weights": 7.0,
        "predicted_waste_joules_total expert_imbalance": 1.0,
        "predicted_energy_bound_joules_total lower": 3.5,
        "predicted_energy_bound_joules_total upper": 14.0,
        "predicted_step_time_seconds_total": pytest.approx(3e-3, abs=1e-10),
        "measured_step_time_seconds_total": 0.75,
        "flagged_steps_total uncalibrated_gpu": 3.0,
        "dummy_steps_total": 2.0,
    }
    assert reports[0]["observe"] == [
        ("energylens_step_energy_joules", (), [2.0, 2.0, 3.0]),
        ("energylens_step_time_ratio", (), [250.0, 250.0, 250.0]),
    ]
    observer.report()
    assert observer.take_outbox() == []


def test_an_end_without_a_beginning_is_ignored(observer: StepObserver) -> None:
    observer.ended(Work())
    observer.report()
    assert observer.take_outbox() == []


def test_steps_that_never_end_are_forgotten(observer: StepObserver) -> None:
    works = [Work(decode=1) for _ in range(3 * MAX_IN_FLIGHT)]
    for work in works:
        observer.scheduled(work, work, 0.0)
    for work in works:
        observer.ended(work)
    observer.report()
    assert totals(observer.take_outbox())["steps_total decode"] == MAX_IN_FLIGHT


class Broken:
    def predict(self, batches: Sequence[Batch]) -> Predictions:
        raise ZeroDivisionError("on purpose")


def broken_listener(steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
    raise KeyError("on purpose")


def unreadable(work: Any) -> Batch:
    raise AttributeError("on purpose")


def test_failures_are_counted_by_place_and_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    observer = StepObserver(read, Broken(), clock=clock)
    observer.listeners.append(broken_listener)
    for _ in range(3):
        work = Work(decode=2)
        observer.scheduled(work, work, clock.now)
        observer.ended(work)
        observer.report()
    sums = totals(observer.take_outbox())
    assert sums["plugin_failures_total predict"] == sums["plugin_failures_total listen"] == 3.0
    assert sums["unpredicted_steps_total"] == sums["steps_total decode"] == 3.0
    assert "predicted_step_time_seconds_total" not in sums
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "energylens failed at predict",
        "energylens failed at listen",
    ]


def test_what_cannot_be_read_is_counted(predictor: Predictor) -> None:
    observer = StepObserver(unreadable, predictor)
    work = Work()
    observer.scheduled(work, work, 0.0)
    observer.ended(work)
    observer.report()
    assert totals(observer.take_outbox()) == {"plugin_failures_total read": 1.0}


def test_without_a_predictor_steps_are_counted() -> None:
    observer = StepObserver(read, None)
    work = Work(decode=2)
    observer.scheduled(work, work, 0.0)
    observer.ended(work)
    observer.report()
    assert totals(observer.take_outbox()) == {
        "steps_total decode": 1.0,
        "tokens_total decode": 2.0,
        "unpredicted_steps_total": 1.0,
    }


def test_steps_beyond_what_is_kept_are_counted(predictor: Predictor) -> None:
    observer = StepObserver(read, predictor)
    for _ in range(MAX_UNREPORTED + 5):
        work = Work(decode=2)
        observer.scheduled(work, work, 0.0)
        observer.ended(work)
    observer.report()
    sums = totals(observer.take_outbox())
    assert (sums["steps_total decode"], sums["unpredicted_steps_total"]) == (MAX_UNREPORTED, 5.0)
    observer.report()
    assert observer.take_outbox() == []


@pytest.mark.parametrize("field", ["energy_j", "time_s", "low_j"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, None])
def test_a_prediction_that_would_spoil_a_counter_is_refused(
    predictor: Predictor, clock: Clock, field: str, value: float | None
) -> None:
    class Spoilt:
        def predict(self, batches: Sequence[Batch]) -> Predictions:
            good = predictor.predict(batches)
            values = np.array([1.0, value]) if value is not None else np.ones(1)
            return replace(good, **{field: values})

    observer = StepObserver(read, Spoilt(), clock=clock)
    for work in (Work(decode=2), Work(prefill=2)):
        observer.scheduled(work, work, clock.now)
        observer.ended(work)
    observer.report()
    sums = totals(observer.take_outbox())
    assert (sums["steps_total decode"], sums["unpredicted_steps_total"]) == (1.0, 2.0)
    assert sums["plugin_failures_total predict"] == 1.0
    assert not [name for name in sums if "energy" in name or "time" in name]


def test_listeners_hear_of_every_report(observer: StepObserver) -> None:
    heard: list[tuple[int, bool]] = []
    observer.listeners.append(lambda steps, predictions, _: heard.append((len(steps), predictions is None)))
    observer.report()
    work = Work(decode=1)
    observer.scheduled(work, work, 0.0)
    observer.ended(work)
    observer.report()
    assert heard == [(0, True), (1, False)]


def test_up_to_when_steps_are_settled(observer: StepObserver, clock: Clock) -> None:
    def settled_s(now_s: float) -> float:
        clock.now = now_s
        observer.report()
        return round(observer.settled_s, 9)

    assert settled_s(1.0) == 0.95  # a step that began before would be known by now
    first, second = Work(decode=1), Work(decode=1)
    observer.scheduled(first, first, 2.0)
    assert settled_s(3.0) == 2.0
    observer.scheduled(second, second, 3.0)
    clock.now = 4.0
    observer.ended(first)
    assert settled_s(4.5) == 4.0  # the second was scheduled before, but runs from the end of the first on
    clock.now = 5.0
    observer.ended(second)
    assert settled_s(9.0) == 8.95


def test_one_thread_may_report_while_the_other_works(predictor: Predictor) -> None:
    observer, reports, stop = StepObserver(read, predictor), [], threading.Event()

    def reporter() -> None:
        while not stop.is_set():
            observer.report()

    thread = threading.Thread(target=reporter)
    thread.start()
    for _ in range(5000):
        work = Work(prefill=1, decode=1)
        observer.scheduled(work, work, observer.clock())
        observer.ended(work)
        reports += observer.take_outbox()
    stop.set()
    thread.join()
    observer.report()
    sums = totals(reports + observer.take_outbox())
    assert sums["steps_total mixed"] == 5000.0
    assert sums["predicted_energy_joules_total prefill"] == 1250.0
    assert sums["predicted_energy_joules_total decode"] == 2500.0
    assert not [name for name in sums if "failures" in name]
