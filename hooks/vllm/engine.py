"""The thread that reports: in each engine process of a server, beside vLLM's busy loop."""

from __future__ import annotations

import functools
import os
import threading
import time
from types import ModuleType
from typing import Any

from energylens_vllm.hooks.vllm import transport
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.settings import OFFLINE_VARIABLE

LOOK_S = 0.2  #: how often to see whether the engine has run out of work


def install(core: ModuleType) -> None:
    """Start the thread where a busy loop starts, and count steps without requests."""
    for cls in (core.EngineCoreProc, core.DPEngineCoreProc):
        if "run_busy_loop" in cls.__dict__:
            cls.run_busy_loop = _with_reporter(cls.run_busy_loop)
    original = core.EngineCore.execute_dummy_batch

    @functools.wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (observer := _observer_of(self)) is not None:
            observer.num_dummy_steps += 1
        return original(self, *args, **kwargs)

    core.EngineCore.execute_dummy_batch = execute_dummy_batch


def install_client(core_client: ModuleType) -> None:
    """Have an offline `LLM` tell the engine process that it starts."""
    original = core_client.SyncMPClient.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        os.environ[OFFLINE_VARIABLE] = "1"
        try:
            original(self, *args, **kwargs)
        finally:
            del os.environ[OFFLINE_VARIABLE]

    core_client.SyncMPClient.__init__ = __init__


def _observer_of(engine: Any) -> StepObserver | None:
    return getattr(getattr(engine, "scheduler", None), "energylens_observer", None)


def _with_reporter(original: Any) -> Any:
    @functools.wraps(original)
    def run_busy_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        observer = _observer_of(self)
        if observer is not None and os.environ.get(OFFLINE_VARIABLE) != "1":
            Reporter(self, observer).start()
        return original(self, *args, **kwargs)

    return run_busy_loop


class Reporter(threading.Thread):
    """Makes a report each interval, and when the engine has run out of work. While the engine works, its next step's
    outputs carry it; an idle engine sends nothing by itself, so then it is put on the queue to the API servers here."""

    def __init__(self, engine: Any, observer: StepObserver) -> None:
        super().__init__(name="energylens-reporter", daemon=True)
        self._engine = engine
        self._observer = observer
        observer.has_reporter = True

    def run(self) -> None:
        """Report until the process ends."""
        observer = self._observer
        while True:
            time.sleep(min(LOOK_S, observer.report_interval_s))
            with observer.guard.at("report"):
                out_of_work = not self._engine.scheduler.has_unfinished_requests()
                if observer.is_due(out_of_work and observer.has_unreported):
                    observer.report()
                if observer.outbox and (out_of_work or self._is_silent()):
                    self._send()

    def _is_silent(self) -> bool:
        """Whether it is long since a step has ended, though there are requests: the next may be far."""
        return self._observer.clock() - self._observer.last_end_s > self._observer.report_interval_s / 2

    def _send(self) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.metrics.stats import SchedulerStats

        # vLLM shows these stats too, so they have to be true of an engine that works after all.
        scheduler = self._engine.scheduler
        running, waiting = scheduler.get_request_counts()
        stats = SchedulerStats(
            num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=scheduler.kv_cache_manager.usage
        )
        setattr(stats, transport.FIELD, self._observer.take_outbox())
        self._engine.output_queue.put_nowait((0, EngineCoreOutputs(scheduler_stats=stats)))
