"""vLLM's AsyncLLM, in the process of a Serve replica -> what the replica reports."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from energylens_vllm.hooks.vllm import transport
from energylens_vllm.hooks.vllm.deployment import describe as describe_engine
from energylens_vllm.hooks.vllm.deployment import kv_cache_tokens
from energylens_vllm.routing.report import MOST_ENDED, Report, describe
from energylens_vllm.serving import settings
from energylens_vllm.serving.increments import added
from energylens_vllm.serving.metrics import MEASURED_TIME, PREDICTED_TIME
from energylens_vllm.serving.start import REFERENCE_GPU, gpu_of

#: Seconds after which steps count 1/e of what they counted at first in the time factor and the rate of prefill.
MEMORY_S = 10.0
#: The time factor stays within this factor of 1: beyond it the model says nothing.
MOST_FACTOR = 1000.0


class EngineState(AggregateStatLoggerBase):
    """A stat logger of vLLM, for one replica. Of several data-parallel ranks it says the mean: a table is of one."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._vllm_config = vllm_config
        self._ranks = max(len(engine_indexes), 1)
        self._requests: dict[str, Any] = {}
        self._kv_usage: dict[int, float] = {}
        self._heard_s = self._reported_s = time.monotonic()
        self._predicted_s = self._measured_s = 0.0  # of steps lately
        self._prefilled, self._prefill_rate = 0, 0.0
        self._num_ended = 0
        self._ended: deque[tuple[int, int]] = deque(maxlen=MOST_ENDED)
        self._chars_per_token: float | None = None

    @classmethod
    def attach(cls, client: Any) -> EngineState:
        """Listen to an AsyncLLM, which has no public way to add a stat logger once it runs."""
        manager = client.logger_manager
        state = cls(client.vllm_config, manager.engine_indexes if manager is not None else [0])
        state._requests = client.output_processor.request_states
        if manager is not None:  # None with --disable-log-stats: only the requests are known then
            manager.stat_loggers.append(state)
        return state

    # -- what vLLM tells -------------------------------------------------------------------------------------------

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """After each step of an engine."""
        self._heard_s = time.monotonic()
        if scheduler_stats is not None:
            self._kv_usage[engine_idx] = scheduler_stats.kv_cache_usage
            reports = transport.reports_in(scheduler_stats) or ()
            self._predicted_s += added(reports, PREDICTED_TIME)
            self._measured_s += added(reports, MEASURED_TIME)
        if iteration_stats is not None:
            self._prefilled += iteration_stats.num_prompt_tokens
            for request in iteration_stats.finished_requests:
                self._num_ended += 1
                self._ended.append((request.num_prompt_tokens, request.num_generation_tokens))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    # -- what the replica tells ------------------------------------------------------------------------------------

    @property
    def kv_tokens(self) -> float:
        """What the cache of a rank holds."""
        return kv_cache_tokens(self._vllm_config) / self._ranks

    def model(self) -> dict[str, Any]:
        """The model of this replica, for routers to make a step table of."""
        engine = describe_engine(self._vllm_config)
        gpu = settings.load(self._vllm_config.additional_config).gpu or gpu_of(engine.device_name) or REFERENCE_GPU
        return describe(engine.config, {**engine.deployment, "gpu": gpu}, self.kv_tokens)

    def report(self) -> Report:
        """How it is doing now."""
        now = time.monotonic()
        passed, self._reported_s = max(now - self._reported_s, 1e-3), now
        fades = min(passed / MEMORY_S, 1.0)
        self._prefill_rate += fades * (self._prefilled / passed - self._prefill_rate)
        self._prefilled = 0
        factor = 1.0
        if self._predicted_s > 0 and self._measured_s > 0:
            factor = min(max(self._measured_s / self._predicted_s, 1 / MOST_FACTOR), MOST_FACTOR)
            self._predicted_s *= 1 - fades
            self._measured_s *= 1 - fades
        requests = list(self._requests.values())
        waiting = sum(each.prompt_len for each in requests if each.is_prefilling)
        context = sum(_context(each) for each in requests)
        used = sum(self._kv_usage.values()) / self._ranks * self.kv_tokens if self._kv_usage else context / self._ranks
        self._learn_chars(requests)
        return Report(
            sampled_s=time.time(),
            running=len(requests) / self._ranks,
            waiting_tokens=waiting / self._ranks,
            kv_tokens_used=used,
            mean_context=context / len(requests) if requests else 0.0,
            prefill_tokens_per_s=self._prefill_rate / self._ranks,
            time_factor=factor,
            silent_s=now - self._heard_s if requests else 0.0,
            chars_per_token=self._chars_per_token,
            num_ended=self._num_ended,
            ended=tuple(self._ended),
        )

    def _learn_chars(self, requests: list[Any]) -> None:
        chars = sum(len(each.prompt) for each in requests if each.prompt)
        tokens = sum(each.prompt_len for each in requests if each.prompt)
        if tokens:
            ratio = max(chars / tokens, 0.1)
            last = self._chars_per_token
            self._chars_per_token = ratio if last is None else last + 0.1 * (ratio - last)


def _context(request: Any) -> int:
    """Tokens of a request so far, prompt and output."""
    detokenizer = request.detokenizer
    return int(request.prompt_len) + (detokenizer.num_output_tokens() if detokenizer is not None else 0)
