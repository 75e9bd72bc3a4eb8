"""What a router wants to know of an engine, each second: what it holds, what one more request costs there, and whether
that one would hold its latency targets.

The price and the room are those of `routing.rank` for a request of typical size (settings), so a router that reads only
these gauges and one that ranks by itself agree. The time that an engine with work has finished no step counts as time
that a request waits, so one that hangs shows no room; after `HUNG_S` its snapshots keep their old time, which makes
them stale for those who look at it. Until something is known there is no series: unknown is not 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from energylens_vllm.energy import EnergyModel
from energylens_vllm.routing import Request, Snapshot, StepTable, rank
from energylens_vllm.routing.policy import DEFAULT
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.observer import Step, StepObserver
from energylens_vllm.serving.predictor import ModelPredictor, Predictions
from energylens_vllm.serving.settings import Settings

SNAPSHOT_S = 1.0  #: how old what routers know of an engine may get
HUNG_S = 10.0  #: an engine with work that has finished no step for so long is not known to live
#: Weight of each second's steps in what is learnt of speed and of prompts that come.
LEARNING = 0.2


@dataclass(frozen=True, slots=True)
class Live:
    """What an engine holds at a moment."""

    requests: int  #: running or waiting
    waiting_tokens: int  #: prompt tokens not computed yet, of all requests
    kv_tokens_used: float
    kv_tokens: float  #: that its KV cache has room for


def tell_routers(observer: StepObserver, settings: Settings, look: Callable[[], Live]) -> None:
    """Tell routers what `look` sees of the engine, if the settings say so and steps are predicted."""
    if settings.routing and isinstance(observer.predictor, ModelPredictor):
        observer.report_interval_s = min(observer.report_interval_s, SNAPSHOT_S)
        observer.listeners.append(Replica(observer.predictor.model, look, settings, observer.clock))


class Replica:
    """A listener of `StepObserver` that tells what `look` sees. `look` is called by the thread that reports."""

    def __init__(
        self,
        model: EnergyModel,
        look: Callable[[], Live],
        settings: Settings,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._model, self._look, self._clock, self._wall = model, look, clock, wall
        self._table: StepTable | None = None
        self._request = Request(
            int(settings.typical_prompt_tokens),
            settings.typical_output_tokens,
            ttft_s=settings.ttft_target_s,
            tpot_s=settings.tpot_target_s,
        )
        self._time_factor = 1.0
        self._prefill_tokens_per_s = 0.0
        self._last_s = clock()  #: when a step ended, or the engine was seen without work
        self._reported_s = clock()

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Look at the engine, and add what is seen to the report."""
        live, now = self._look(), self._clock()
        if self._table is None:
            self._table = StepTable.compile(self._model, live.kv_tokens)
            self._describe(increments)
        self._learn(steps, predictions, now)
        if steps or not live.requests:
            self._last_s = now
        silent_s = now - self._last_s
        if silent_s < HUNG_S:
            increments.set("energylens_snapshot_timestamp_seconds", self._wall())
        increments.set("energylens_held_requests", live.requests)
        increments.set("energylens_waiting_tokens", live.waiting_tokens)
        increments.set("energylens_kv_used_tokens", live.kv_tokens_used)
        increments.set("energylens_kv_capacity_tokens", live.kv_tokens)
        snapshot = Snapshot(
            self._table,
            float(live.requests),
            float(live.waiting_tokens),
            live.kv_tokens_used,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            time_factor=self._time_factor,
        )
        verdict, request = rank([snapshot], self._request)[0], self._request
        increments.set("energylens_marginal_energy_joules", verdict.joules / request.expected_output_tokens)
        ttft = 1 - (verdict.ttft_s + silent_s) / request.ttft_s
        tpot = 1 - verdict.tpot_s / request.tpot_s
        if verdict.state == "infeasible" and min(ttft, tpot) >= DEFAULT.headroom:
            ttft = 0.0  # no sequence or no cache is free: the request would wait until one is
        increments.set("energylens_slo_headroom_ratio", ttft, "ttft")
        increments.set("energylens_slo_headroom_ratio", tpot, "tpot")

    def _learn(self, steps: Sequence[Step], predictions: Predictions | None, now: float) -> None:
        """How long steps took over what was predicted, and how many prompt tokens came a second."""
        since_s, self._reported_s = now - self._reported_s, now
        if since_s > 0:
            prefill = sum(step.batch.num_tokens - step.batch.num_decode_tokens for step in steps)
            self._prefill_tokens_per_s += LEARNING * (prefill / since_s - self._prefill_tokens_per_s)
        if steps and predictions is not None and (expected_s := float(predictions.time_s.sum())) > 0:
            ratio = sum(step.duration_s for step in steps) / expected_s
            self._time_factor += LEARNING * (ratio - self._time_factor)

    def _describe(self, increments: Increments) -> None:
        """What a router needs, besides the model and energylens_profile_info, to make the same step table."""
        deployment = self._model.deployment
        increments.set(
            "energylens_replica_info",
            1.0,
            str(deployment.data_parallel_size),
            str(deployment.prefill_context_parallel_size),
            str(deployment.decode_context_parallel_size),
            str(deployment.enable_expert_parallel).lower(),
            str(deployment.kv_cache_dtype),
            str(deployment.max_num_seqs),
            str(deployment.max_num_batched_tokens),
            str(deployment.enforce_eager).lower(),
            str(deployment.vllm_release),
        )
