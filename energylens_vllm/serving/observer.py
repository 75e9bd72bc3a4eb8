"""Follows an engine's steps: what was scheduled, when it ended, what it should have cost; and reports the sums.

On the scheduler's path a step costs two clock readings and a few references: `scheduled` and `ended` only remember.
`report` does the work, for all steps since the last report together, because evaluating the step model for a hundred
steps costs little more than for one. A thread calls it while the engine thread waits for the GPU (`hooks/vllm/`).

With asynchronous scheduling or pipeline parallelism several steps are in flight, and a step's GPU time begins when the
one before ends. So a step's measured duration runs from the end of the step before, or from its own scheduling if that
was later: time without work is in no step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.guard import FAILURES, Guard
from energylens_vllm.serving.increments import Increments, Report
from energylens_vllm.serving.metrics import COMPONENTS, FLAGS, PHASES
from energylens_vllm.serving.predictor import Prediction, Predictor

MAX_IN_FLIGHT = 64  #: steps remembered between schedule() and update_from_output(); vLLM keeps a handful
MAX_UNREPORTED = 100_000  #: ended steps kept for the next report


@dataclass(slots=True)
class Step:
    """One executed step. Times are of `time.perf_counter()`, in seconds."""

    batch: Batch
    start_s: float
    end_s: float
    prediction: Prediction | None = None

    @property
    def duration_s(self) -> float:
        """The measured duration."""
        return self.end_s - self.start_s


#: gets each report's steps, in order, and may add to the report
Listener = Callable[[Sequence[Step], Increments], None]


class StepObserver:
    """Observes one engine.

    The engine's thread calls `scheduled`, `ended` and `take_outbox`; one other thread, or the engine's own, calls
    `report`. They meet in two deques, whose ends are thread-safe, so nobody waits for a lock.
    """

    def __init__(
        self,
        read: Callable[[Any], Batch],
        predictor: Predictor | None,
        report_interval_s: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`read` makes a batch of what `scheduled` was given; without a predictor, steps are only counted."""
        self.clock = clock
        self.report_interval_s = report_interval_s
        self.has_reporter = False  #: whether a thread calls `report`; if not, the engine's own has to
        self.predictor = predictor
        self.guard = Guard()
        self.increments = Increments()  #: for the thread that reports, and its listeners
        self.listeners: list[Listener] = []
        self.outbox: deque[Report] = deque()  #: reports to be shipped; any thread may append
        self.num_dummy_steps = 0
        self.last_end_s = float("-inf")
        self._read = read
        self._in_flight: dict[int, tuple[object, Any, float]] = {}
        self._ended: deque[tuple[Any, float, float]] = deque(maxlen=MAX_UNREPORTED)
        self._reported_dummy_steps = 0
        self._next_report_s = clock() + report_interval_s

    def scheduled(self, key: object, work: Any, start_s: float) -> None:
        """A step was scheduled, beginning at `start_s`. `key` is any object that stands for it until it has ended."""
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            del self._in_flight[next(iter(self._in_flight))]
        self._in_flight[id(key)] = (key, work, start_s)

    def ended(self, key: object) -> None:
        """The step of `key` has ended now. One that was not seen being scheduled is ignored."""
        flight = self._in_flight.pop(id(key), None)
        if flight is None:
            return
        end_s = self.clock()
        self._ended.append((flight[1], max(flight[2], self.last_end_s), end_s))
        self.last_end_s = end_s

    def is_due(self, out_of_work: bool) -> bool:
        """Whether to call `report` now: the interval is over, or no later step may come to do it."""
        return out_of_work or self.clock() >= self._next_report_s

    def take_outbox(self) -> list[Report]:
        """All that is to be shipped, perhaps nothing."""
        reports = []
        while self.outbox:
            try:
                reports.append(self.outbox.popleft())
            except IndexError:  # the other thread took it
                break
        return reports

    def report(self) -> None:
        """Predict and account for the steps that ended since the last call, and put a report into the outbox."""
        self._next_report_s = self.clock() + self.report_interval_s
        steps = self._take_steps()
        self._predict(steps)
        for step in steps:
            _add_step(self.increments, step)
        if steps:
            for listener in self.listeners:
                with self.guard.at("listen"):
                    listener(steps, self.increments)
        self._add_counts()
        if report := self.increments.take():
            self.outbox.append(report)

    def _take_steps(self) -> list[Step]:
        steps = []
        for _ in range(len(self._ended)):
            work, start_s, end_s = self._ended.popleft()
            with self.guard.at("read"):
                steps.append(Step(self._read(work), start_s, end_s))
        return steps

    def _predict(self, steps: Sequence[Step]) -> None:
        if self.predictor is None or not steps:
            return
        with self.guard.at("predict"):
            predictions = self.predictor.predict([step.batch for step in steps])
            for step, prediction in zip(steps, predictions, strict=True):
                step.prediction = prediction

    def _add_counts(self) -> None:
        """Increments of what other threads count in plain integers."""
        dummy_steps = self.num_dummy_steps
        if new := dummy_steps - self._reported_dummy_steps:
            self.increments.add("energylens_dummy_steps_total", float(new))
            self._reported_dummy_steps = dummy_steps
        for place, failures in self.guard.take():
            self.increments.add(FAILURES, float(failures), place)


def _add_step(increments: Increments, step: Step) -> None:
    batch, prediction = step.batch, step.prediction
    increments.add("energylens_steps_total", 1.0, batch.phase)
    increments.add("energylens_tokens_total", float(batch.num_tokens - batch.num_decode_tokens), "prefill")
    increments.add("energylens_tokens_total", float(batch.num_decode_tokens), "decode")
    if batch.cached_tokens:
        increments.add("energylens_cached_tokens_total", float(sum(batch.cached_tokens.values())))
    if batch.draft_tokens:
        increments.add("energylens_draft_tokens_total", float(sum(batch.draft_tokens.values())))
    if prediction is None:
        increments.add("energylens_unpredicted_steps_total", 1.0)
        flags = batch.flags
    else:
        _add_prediction(increments, step, prediction)
        flags = batch.flags | prediction.flags
    for flag in {flag if flag in FLAGS else "other" for flag in flags}:
        increments.add("energylens_flagged_steps_total", 1.0, flag)


def _add_prediction(increments: Increments, step: Step, prediction: Prediction) -> None:
    for phase in PHASES:
        increments.add("energylens_predicted_energy_joules_total", prediction.phases[phase], phase)
    for component in COMPONENTS:
        increments.add(
            "energylens_predicted_component_energy_joules_total", prediction.components[component], component
        )
    lower, upper = prediction.interval_j
    increments.add("energylens_predicted_energy_bound_joules_total", lower, "lower")
    increments.add("energylens_predicted_energy_bound_joules_total", upper, "upper")
    increments.observe("energylens_step_energy_joules", (prediction.energy_j,))
    increments.add("energylens_predicted_step_time_seconds_total", prediction.time_s)
    increments.add("energylens_measured_step_time_seconds_total", step.duration_s)
    if prediction.time_s > 0.0:
        increments.observe("energylens_step_time_ratio", (step.duration_s / prediction.time_s,))
