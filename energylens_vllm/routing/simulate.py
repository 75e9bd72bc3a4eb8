"""Requests, replicas and a policy -> joules, latencies, attainment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from energylens_vllm.energy.batch import Array
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing.engine import Engine, Job, calibrated_noise
from energylens_vllm.routing.policies import Setting, policy
from energylens_vllm.routing.table import StepTable
from energylens_vllm.routing.trace import Arrival


@dataclass(frozen=True, slots=True)
class Outcome:
    """A fleet over a trace. All replicas burn idle power from the first arrival to the last completion."""

    policy: str
    energy_j: float
    output_tokens: int
    energy_per_output_token_j: float
    duration_s: float
    attainment: float  #: share of requests within both targets
    ttft_s: tuple[float, float]  #: median, 99th percentile
    tpot_s: tuple[float, float]
    preemptions: int
    hit_tokens: int
    used: tuple[float, ...]  #: share of the time in which each replica runs


def simulate(
    name: str,
    tables: Sequence[StepTable],
    arrivals: Sequence[Arrival],
    ttft_s: float = math.inf,
    tpot_s: float = math.inf,
    beliefs: Sequence[StepTable] | None = None,
    seed: int | None = None,
) -> Outcome:
    """Run a trace on replicas under a policy. `tables` are the truth, with calibrated noise when `seed` is given;
    `beliefs` (default: the same) is what the policy is told. Raises EnergyLensError for an empty fleet or trace."""
    if not tables or not arrivals:
        raise EnergyLensError("simulate: needs a replica and a request at least")
    engines = [
        Engine(table, None if seed is None else calibrated_noise(table, 1009 * seed + i))
        for i, table in enumerate(tables)
    ]
    choose = policy(name)(Setting(engines, beliefs or tables, ttft_s, tpot_s, seed or 0))
    jobs: list[Job] = []
    for order, arrival in enumerate(arrivals):
        now = arrival.at_s
        for engine in engines:
            engine.advance(now)
        jobs.append(engines[choose(arrival, now)].submit(arrival, order, now))
    for engine in engines:
        engine.advance(math.inf)
    return _outcome(name, engines, jobs, ttft_s, tpot_s)


def _outcome(name: str, engines: Sequence[Engine], jobs: Sequence[Job], ttft_s: float, tpot_s: float) -> Outcome:
    end_s = max(job.end_s for job in jobs)
    energy_j = sum(engine.energy_until(end_s) for engine in engines)
    tokens = sum(job.arrival.output_tokens for job in jobs)
    first = np.array([job.first_s - job.arrival.at_s for job in jobs])
    several = np.array([job.arrival.output_tokens > 1 for job in jobs])
    each = np.array([(job.end_s - job.first_s) / max(job.arrival.output_tokens - 1, 1) for job in jobs])
    within = (first <= ttft_s) & ((each <= tpot_s) | ~several)

    def two(values: Array) -> tuple[float, float]:
        low, high = np.percentile(values, (50, 99)) if len(values) else (math.nan, math.nan)
        return float(low), float(high)

    return Outcome(
        policy=name,
        energy_j=energy_j,
        output_tokens=tokens,
        energy_per_output_token_j=energy_j / tokens,
        duration_s=end_s,
        attainment=float(within.mean()),
        ttft_s=two(first),
        tpot_s=two(each[several]),
        preemptions=sum(engine.preemptions for engine in engines),
        hit_tokens=sum(engine.hit_tokens for engine in engines),
        used=tuple(engine.busy_s / end_s for engine in engines),
    )
