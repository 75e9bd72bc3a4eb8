"""The observed subclass of any scheduler: it changes nothing and survives everything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.hooks.vllm import scheduler, transport
from energylens_vllm.serving.observer import StepObserver

CONFIG = SimpleNamespace(speculative_config=None, kv_transfer_config=None)


class UserScheduler:
    """A user's own, with the parts that are used of vLLM's interface."""

    def __init__(self, vllm_config: Any, log_stats: bool = True) -> None:
        self.log_stats = log_stats
        self.unfinished = True

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return SimpleNamespace(total_num_scheduled_tokens=0 if throttle_prefills else 5)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        stats = SimpleNamespace()
        return {0: SimpleNamespace(outputs=[model_runner_output] * 2, scheduler_stats=stats)}

    def has_unfinished_requests(self) -> bool:
        return self.unfinished


def observed(monkeypatch: pytest.MonkeyPatch, observer: StepObserver | None) -> Any:
    monkeypatch.setattr(scheduler, "start_observer", lambda _scheduler, _config: observer)
    return scheduler.observed(UserScheduler)(CONFIG)


def test_the_same_class_each_time() -> None:
    cls = scheduler.observed(UserScheduler)
    assert cls is scheduler.observed(UserScheduler)
    assert cls is scheduler.observed(cls)
    assert issubclass(cls, UserScheduler)


def test_switched_off_it_is_the_users_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    it = observed(monkeypatch, None)
    assert it.schedule().total_num_scheduled_tokens == 5
    outputs = it.update_from_output(it.schedule(), "answer")
    assert outputs[0].outputs == ["answer", "answer"]
    assert not hasattr(outputs[0].scheduler_stats, transport.FIELD)


def test_failures_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = StepObserver(lambda work: work, None)
    it = observed(monkeypatch, observer)
    added = []
    for last in (False, False, False, True):
        it.unfinished = not last
        # This SchedulerOutput has none of the fields that a batch is made from; an empty one is not looked at.
        outputs = it.update_from_output(it.schedule(last), "answer")
        assert outputs[0].outputs == ["answer", "answer"]
        for report in transport.reports_in(outputs[0].scheduler_stats) or ():
            added += report["add"]
    assert {entry[:2] for entry in added} == {("energylens_plugin_failures_total", ("schedule",))}
    assert sum(entry[2] for entry in added) == 3.0


def test_an_exception_of_vllm_itself_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    it = observed(monkeypatch, StepObserver(lambda work: work, None))
    monkeypatch.setattr(UserScheduler, "schedule", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        it.schedule()


def test_reports_wait_for_a_step_with_outputs() -> None:
    stats = SimpleNamespace()
    without = {0: SimpleNamespace(outputs=[], scheduler_stats=stats)}
    transport.attach(without, lambda: pytest.fail("taken"))
    transport.attach({}, lambda: pytest.fail("taken"))
    assert transport.reports_in(stats) is None
    stats.energylens = None
    assert transport.reports_in(stats) == ()
    transport.attach({0: SimpleNamespace(outputs=[1], scheduler_stats=None)} | without, lambda: pytest.fail("taken"))
    transport.attach({0: SimpleNamespace(outputs=[1], scheduler_stats=stats)}, lambda: [{}])
    assert transport.reports_in(stats) == [{}]
