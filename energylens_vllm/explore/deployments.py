"""Deployments of one engine, evaluated together: a row for each batch limit, step budget and number of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy import serving
from energylens_vllm.energy.batch import Array, Integers
from energylens_vllm.energy.station import Speed, arrivals, interpolated
from energylens_vllm.explore.engine import Engine
from energylens_vllm.explore.space import MAX_NUM_SEQS, Load
from energylens_vllm.explore.steady import Steady, steady


@dataclass(frozen=True, slots=True)
class Deployments:
    """N deployments; every array has shape (N,). Energy, power and rates are of all replicas together."""

    engine: Integers  #: index into `Exploration.engines`
    max_num_seqs: Integers
    max_num_batched_tokens: Integers
    replicas: Integers
    gpus: Integers
    running: Array  #: requests that run at a time in a data-parallel rank
    token_j: Array  #: joules an output token, idle time included where requests arrive at a rate
    low_j: Array
    high_j: Array
    power_w: Array
    tokens_per_s: Array
    tpot_s: Array
    ttft_s: Array  #: from the arrival: waiting in line, for the step under way, and the prompt's own steps
    idle_share: Array  #: of the time, in which no request is served
    waiting_share: Array  #: of requests, that wait in line

    def __len__(self) -> int:
        return len(self.engine)

    @classmethod
    def joined(cls, tables: Sequence[Deployments]) -> Deployments:
        """Tables one after the other."""
        return cls(*(np.concatenate([getattr(table, name) for table in tables]) for name in cls.__slots__))


def evaluate(
    engine: Engine, index: int, limits: Integers, budgets: Integers, replicas: Integers, load: Load
) -> Deployments:
    """Every pair of a batch limit and a budget, with every number of replicas. `index` is the engine's."""
    lengths = load.prompt_tokens, load.output_tokens, load.prefix_cache_hit_rate
    if load.rate_per_s is None:
        full = steady(engine.model, limits, budgets, *lengths)
        return Deployments.joined([_saturated(index, engine, limits, budgets, full, int(count)) for count in replicas])
    tables = []
    for budget in np.unique(budgets):
        here = limits[budgets == budget]
        sizes = _sizes(engine, here)
        full = steady(engine.model, sizes / engine.model.lockstep_ranks, budget, *lengths)
        tables.append(_at_rate(index, engine, here, int(budget), sizes, full, replicas, load))
    return Deployments.joined(tables)


def _sizes(engine: Engine, limits: Integers) -> Integers:
    """Requests of a server (see `serving.speed`) whose steps are predicted, up to the most that it runs: those of full
    ranks with each limit, and enough between them."""
    full = engine.model.lockstep_ranks * limits
    least, most = engine.deployment.pipeline_parallel_size, int(full.max())
    between = np.array([size for size in MAX_NUM_SEQS if least < size < most], dtype=np.int64)
    return np.unique(np.concatenate([[least], between, full]))


def _saturated(
    index: int, engine: Engine, limits: Integers, budgets: Integers, full: Steady, replicas: int
) -> Deployments:
    same = np.ones(len(limits), dtype=np.int64)
    return Deployments(
        engine=index * same,
        max_num_seqs=limits,
        max_num_batched_tokens=budgets,
        replicas=replicas * same,
        gpus=replicas * engine.deployment.num_gpus * same,
        running=limits.astype(np.float64),
        token_j=full.token_j,
        low_j=full.low_j,
        high_j=full.high_j,
        power_w=replicas * full.power_w,
        tokens_per_s=replicas * full.tokens_per_s,
        tpot_s=full.tpot_s,
        ttft_s=full.ttft_s + _until_scheduled_s(engine, full),
        idle_share=np.zeros(len(limits)),
        waiting_share=np.zeros(len(limits)),
    )


def _at_rate(
    index: int, engine: Engine, limits: Integers, budget: int, sizes: Integers, full: Steady, replicas: Integers,
    load: Load,
) -> Deployments:  # fmt: skip
    assert load.rate_per_s is not None
    together = engine.model.lockstep_ranks
    servers = replicas * engine.model.servers
    seen = arrivals(speed(engine, sizes, full, load.output_tokens), load.rate_per_s / servers, together * limits)
    at = np.searchsorted(sizes, together * limits)
    power_w = seen.power_w * servers[:, None]
    tokens_per_s = load.rate_per_s * load.output_tokens
    token_j = power_w / tokens_per_s

    def flat(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.broadcast_to(np.asarray(values), token_j.shape).ravel()

    def whole(values: npt.ArrayLike) -> Integers:
        return np.broadcast_to(np.asarray(values, dtype=np.int64), token_j.shape).ravel()

    return Deployments(
        engine=whole(index),
        max_num_seqs=whole(limits),
        max_num_batched_tokens=whole(budget),
        replicas=whole(replicas[:, None]),
        gpus=whole(replicas[:, None] * engine.deployment.num_gpus),
        running=flat(seen.running / together),
        token_j=flat(token_j),
        low_j=flat(token_j * (full.low_j / full.token_j)[at]),
        high_j=flat(token_j * (full.high_j / full.token_j)[at]),
        power_w=flat(power_w),
        tokens_per_s=flat(tokens_per_s),
        tpot_s=flat(seen.tpot_s),
        ttft_s=flat(seen.ttft_s),
        idle_share=flat(seen.idle_share),
        waiting_share=flat(seen.waiting_share),
    )


def speed(engine: Engine, sizes: Integers, full: Steady, output_tokens: float) -> Speed:
    """`serving.speed`, with the time until a request is scheduled."""
    known, most = sizes.astype(np.float64), int(sizes[-1])
    until_s = interpolated(most, known, _until_scheduled_s(engine, full))
    found = serving.speed(engine.model, known, full, output_tokens)
    # Who comes alone does not wait.
    return replace(found, ttft_s=found.ttft_s + np.where(np.arange(most) > 0, until_s, 0.0))


def _until_scheduled_s(engine: Engine, full: Steady) -> Array:
    """How long a request waits that arrives at random while others run: half of the step under way, and with
    asynchronous scheduling the next step, which is scheduled already."""
    step_s = full.tpot_s / engine.deployment.pipeline_parallel_size
    return (1.5 if engine.model.async_scheduling else 0.5) * step_s
