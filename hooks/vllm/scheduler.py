"""A subclass of whatever scheduler vLLM is configured with, which shows each batch to the observer."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from energylens_vllm.hooks.vllm import requests, tracing, transport
from energylens_vllm.hooks.vllm.batch import Recorder
from energylens_vllm.hooks.vllm.start import start_observer


def install(config: ModuleType) -> None:
    """Have `SchedulerConfig.get_scheduler_cls` return the observed subclass.

    Setting `scheduler_cls` instead would make vLLM give up asynchronous scheduling.
    """
    original = config.SchedulerConfig.get_scheduler_cls

    @functools.wraps(original)
    def get_scheduler_cls(self: Any) -> type:
        return observed(original(self))

    config.SchedulerConfig.get_scheduler_cls = get_scheduler_cls


@functools.cache
def observed(base: type) -> type:
    """`base` with its `schedule` and `update_from_output` observed; the same class for the same base."""
    if hasattr(base, "energylens_observer"):
        return base

    class Observed(base):
        energylens_observer = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            vllm_config = kwargs.get("vllm_config") or args[0]
            self.energylens_observer = start_observer(self, vllm_config)
            if self.energylens_observer is not None:
                self.energylens_recorder = Recorder(vllm_config)
                self.energylens_traced = tracing.endpoint(vllm_config) is not None

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            observer = self.energylens_observer
            if observer is None:
                return super().schedule(*args, **kwargs)
            start_s = observer.clock()
            output = super().schedule(*args, **kwargs)
            try:
                if output.total_num_scheduled_tokens:
                    observer.scheduled(output, self.energylens_recorder(output), start_s)
                if observer.attribution is not None:
                    requests.scheduled(observer, output)
            except Exception:
                observer.guard.failed("schedule")
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = super().update_from_output(scheduler_output, *args, **kwargs)
            observer = self.energylens_observer
            if observer is None:
                return outputs
            try:
                observer.ended(scheduler_output)
                if observer.asking or self.energylens_traced:
                    requests.answer(observer, outputs, self.energylens_traced)
                if not observer.has_reporter and observer.is_due(not self.has_unfinished_requests()):
                    observer.report()
                if observer.outbox:
                    transport.attach(outputs, observer.take_outbox)
            except Exception:
                observer.guard.failed("update")
            return outputs

    Observed.__name__ = f"Observed{base.__name__}"
    return Observed
