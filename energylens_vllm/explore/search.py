"""Evaluate everything that can be deployed, and keep what a load allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energylens_vllm.einsum import Cascade
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Array, Integers
from energylens_vllm.energy.overlap import DualBatch
from energylens_vllm.energy.precision import widths
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.arrivals import Speed, arrivals, interpolated
from energylens_vllm.explore.memory import Memory, cuda_bytes
from energylens_vllm.explore.pareto import pareto_front
from energylens_vllm.explore.space import Load, Space, engines
from energylens_vllm.explore.steady import Steady, steady
from energylens_vllm.hardware.profile import GpuProfile, load_profile

Booleans = npt.NDArray[np.bool_]
#: Share of requests that may wait in line where no bound on the time to first token is given.
MOST_WAITING = 0.05

Progress = Callable[[int, int], None]  #: (engines done, engines in all)


@dataclass(frozen=True, slots=True)
class Engine:
    """One way of running the model, whatever its batch limits."""

    model: EnergyModel
    memory: Memory
    dual_batch: bool = False

    @property
    def deployment(self) -> Deployment:
        return self.model.deployment

    @property
    def title(self) -> str:
        """The engine in a few words, such as "2 x H100-SXM, TP2, fp8"."""
        return _describe(self.deployment) + (", DBO" if self.dual_batch else "")

    def with_profile(self, profile: GpuProfile) -> EnergyModel:
        """Its model on a GPU with other coefficients."""
        return _model(self.model.cascade, self.deployment, self.dual_batch, profile)


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


@dataclass(frozen=True)
class Exploration:
    """All deployments of a model that fit, and which of them keep the load's latencies."""

    name: str
    load: Load
    space: Space
    engines: tuple[Engine, ...]
    deployments: Deployments
    feasible: Booleans  #: keeps up with the rate, and the latencies
    front: Booleans  #: not beaten in joules a token, time per output token and GPUs together
    flags: frozenset[str]

    def best(self, count: int = 5) -> list[int]:
        """Indices of the deployments that take least energy, the best one of each engine, best first."""
        chosen: dict[int, int] = {}
        order = np.lexsort((self.deployments.tpot_s, self.deployments.gpus, self.deployments.token_j))
        for index in order[self.feasible[order]]:
            chosen.setdefault(int(self.deployments.engine[index]), int(index))
            if len(chosen) == count:
                break
        return list(chosen.values())

    def evaluate(self, index: int) -> tuple[Engine, float, int]:
        """Engine, running requests and step budget of one deployment, as `steady` takes them."""
        table = self.deployments
        engine = self.engines[table.engine[index]]
        running = max(float(table.running[index]), float(engine.deployment.pipeline_parallel_size))
        return engine, running, int(table.max_num_batched_tokens[index])


def explore(
    model: Mapping[str, object] | str | os.PathLike[str] | Cascade,
    load: Load,
    space: Space | None = None,
    progress: Progress | None = None,
) -> Exploration:
    """Every deployment of `model` in `space`, and which of them carry `load`.

    Raises EnergyLensError for a model or GPU that is not known, a degree that does not divide, a model that does not
    fit, a number of GPUs that no deployment has, and latencies or a rate that none reaches: each says how far off the
    nearest is.
    """
    space = space or Space()
    base = EnergyModel(model, Deployment(gpu=space.gpus[0]))
    found = list(engines(base.cascade, base.quantization, space))
    ways = [(deployment, dual) for deployment in found for dual in _dual_batches(deployment, space)]
    kept: list[Engine] = []
    tables: list[Deployments] = []
    for done, (deployment, dual) in enumerate(ways):
        if progress is not None:
            progress(done, len(ways))
        engine_model = _model(base.cascade, deployment, dual)
        engine = Engine(engine_model, Memory.of(engine_model, space.gpu_memory_utilization), dual)
        limits, budgets = _limits(engine, load, space)
        replicas = _replicas(deployment.num_gpus, load, space)
        if len(limits) and len(replicas):
            tables.append(_evaluate(engine, len(kept), limits, budgets, replicas, load))
            kept.append(engine)
    if progress is not None:
        progress(len(ways), len(ways))
    if not tables:
        raise _nothing_fits(base, found, load, space)
    table = Deployments(*(np.concatenate(column) for column in zip(*map(_columns, tables), strict=True)))
    feasible = np.isfinite(table.token_j)
    for bound, latency in ((load.ttft_s, table.ttft_s), (load.tpot_s, table.tpot_s)):
        if bound is not None:
            feasible &= np.nan_to_num(latency, nan=np.inf) <= bound
    if load.ttft_s is None:
        feasible &= np.nan_to_num(table.waiting_share, nan=1.0) <= MOST_WAITING
    if not feasible.any():
        raise _nothing_keeps_up(base.cascade.name, table, kept, load, space)
    front = np.zeros(len(table), dtype=bool)
    front[feasible] = pareto_front(table.token_j[feasible], table.tpot_s[feasible], table.gpus[feasible])
    flags = frozenset().union(*(engine.model.flags for engine in kept))
    return Exploration(base.cascade.name, load, space, tuple(kept), table, feasible, front, flags)


def _dual_batches(deployment: Deployment, space: Space) -> tuple[bool, ...]:
    """Without dual-batch overlap, and with it where vLLM has it: its exchanges are those of DeepEP's kernels."""
    both = space.enable_dbo and deployment.data_parallel_size > 1 and deployment.enable_expert_parallel
    return (False, True) if both else (False,)


def _model(
    cascade: Cascade, deployment: Deployment, dual_batch: bool, profile: GpuProfile | None = None
) -> EnergyModel:
    return EnergyModel(cascade, deployment, profile, DualBatch() if dual_batch else None)


def _limits(engine: Engine, load: Load, space: Space) -> tuple[Integers, Integers]:
    """(max_num_seqs, max_num_batched_tokens) with which vLLM starts and memory holds a full batch; pairs in order of
    the budget, then of the limit."""
    stages = engine.deployment.pipeline_parallel_size
    tried = np.array(sorted(set(space.max_num_seqs)))
    tried = tried[tried >= stages]  # fewer requests than stages leave some of them empty at all times
    limits: list[int] = []
    budgets: list[int] = []
    for budget in sorted(set(space.max_num_batched_tokens)):
        most = engine.memory.most_running(load.prompt_tokens, load.output_tokens, budget, tried)
        most = np.where(engine.memory.fits(load.longest, budget, tried), np.floor(most), 0)
        here = tried[most >= tried]
        if len(here) < len(tried):  # what fills the memory, if no more than the first limit that does not fit
            full = int(most[len(here)])
            if full >= stages and full > (here[-1] if len(here) else 0):
                here = np.append(here, full)
        here = here[here <= budget]
        limits += here.tolist()
        budgets += [budget] * len(here)
    return np.array(limits, dtype=np.int64), np.array(budgets, dtype=np.int64)


def _replicas(gpus: int, load: Load, space: Space) -> Integers:
    """Numbers of replicas to try. Without a rate more of them change nothing per token, so one stands for all."""
    if space.exactly:
        return np.array([space.max_gpus // gpus] if space.max_gpus % gpus == 0 else [], dtype=np.int64)
    return np.arange(1, (space.max_gpus // gpus if load.rate_per_s else 1) + 1)


def _evaluate(
    engine: Engine, index: int, limits: Integers, budgets: Integers, replicas: Integers, load: Load
) -> Deployments:
    full = steady(engine.model, limits, budgets, load.prompt_tokens, load.output_tokens, load.prefix_cache_hit_rate)
    if load.rate_per_s is None:
        columns = [_saturated(index, engine, limits, budgets, full, int(count)) for count in replicas]
    else:
        columns = [
            _at_rate(index, engine, limits[here], budgets[here], _rows(full, here), replicas, load)
            for here in (np.flatnonzero(budgets == budget) for budget in np.unique(budgets))
        ]
    return Deployments(*(np.concatenate(column) for column in zip(*map(_columns, columns), strict=True)))


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
    index: int, engine: Engine, limits: Integers, budgets: Integers, full: Steady, replicas: Integers, load: Load
) -> Deployments:
    assert load.rate_per_s is not None
    ranks = engine.deployment.data_parallel_size
    rates = load.rate_per_s / (replicas * ranks)  # of one data-parallel rank
    seen = arrivals(speed(engine, limits, full, load.output_tokens), rates, limits)
    power_w = seen.power_w * (replicas * ranks)[:, None]
    tokens_per_s = load.rate_per_s * load.output_tokens
    token_j = power_w / tokens_per_s

    def flat(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.broadcast_to(np.asarray(values), token_j.shape).ravel()

    def whole(values: npt.ArrayLike) -> Integers:
        return np.broadcast_to(np.asarray(values, dtype=np.int64), token_j.shape).ravel()

    return Deployments(
        engine=whole(index),
        max_num_seqs=whole(limits),
        max_num_batched_tokens=whole(budgets),
        replicas=whole(replicas[:, None]),
        gpus=whole(replicas[:, None] * engine.deployment.num_gpus),
        running=flat(seen.running),
        token_j=flat(token_j),
        low_j=flat(token_j * full.low_j / full.token_j),
        high_j=flat(token_j * full.high_j / full.token_j),
        power_w=flat(power_w),
        tokens_per_s=flat(tokens_per_s),
        tpot_s=flat(seen.tpot_s),
        ttft_s=flat(seen.ttft_s),
        idle_share=flat(seen.idle_share),
        waiting_share=flat(seen.waiting_share),
    )


def speed(engine: Engine, sizes: Integers, full: Steady, output_tokens: float) -> Speed:
    """One data-parallel rank at 1 .. sizes[-1] requests, from closed queues of `sizes` (ascending) requests.

    Fewer requests than pipeline stages leave as many stages empty: completions and power above idle are in proportion.
    """
    ranks = engine.deployment.data_parallel_size
    most, least = int(sizes[-1]), int(sizes[0])
    known = sizes.astype(np.float64)
    idle_w = engine.model.idle_power_w / ranks
    part = np.minimum(np.arange(1, most + 1) / least, 1.0)
    completions = interpolated(most, known, full.tokens_per_s / (ranks * output_tokens))
    power_w = interpolated(most, known, full.power_w / ranks)
    until_s = interpolated(most, known, _until_scheduled_s(engine, full))  # who comes alone does not wait
    return Speed(
        completions_per_s=completions * part,
        power_w=idle_w + (power_w - idle_w) * part,
        tpot_s=interpolated(most, known, full.tpot_s),
        ttft_s=interpolated(most, known, full.ttft_s) + np.where(np.arange(most) > 0, until_s, 0.0),
        idle_w=idle_w,
    )


def _until_scheduled_s(engine: Engine, full: Steady) -> Array:
    """How long a request waits that arrives at random while others run: half of the step under way, and with
    asynchronous scheduling the next step, which is scheduled already."""
    step_s = full.tpot_s / engine.deployment.pipeline_parallel_size
    wanted = engine.deployment.async_scheduling
    ahead = engine.model.profile.async_scheduling if wanted is None else wanted
    return (1.5 if ahead else 0.5) * step_s


def _columns(table: Deployments) -> list[np.ndarray]:
    return [getattr(table, name) for name in Deployments.__slots__]


def _rows(full: Steady, index: Integers) -> Steady:
    values = {name: getattr(full, name)[index] for name in Steady.__slots__ if name != "components_j"}
    return Steady(**values, components_j={name: part[index] for name, part in full.components_j.items()})


# -- why nothing was found --------------------------------------------------------------------------------------------


def _nothing_fits(base: EnergyModel, found: Sequence[Deployment], load: Load, space: Space) -> EnergyLensError:
    name, where = base.cascade.name, f"{space.max_gpus} x {' or '.join(space.gpus)}"
    sizes = sorted({deployment.num_gpus for deployment in found})
    if not sizes:
        return EnergyLensError(f"no degrees of parallelism that were asked for run {name} on up to {where}")
    smallest = min(
        max(base.cascade.weight_bytes(widths(each.dtype, each.quantization, each.kv_cache_dtype), each.mesh))
        for each in found
    )
    room = space.gpu_memory_utilization * max(cuda_bytes(load_profile(gpu)) for gpu in space.gpus)
    weights = f"a GPU would hold {smallest / 1e9:.1f} GB of weights at least, and vLLM may use {room / 1e9:.1f} GB"
    if smallest > room:
        return EnergyLensError(f"{name} does not fit {where}: {weights}")
    if space.exactly and not any(space.max_gpus % count == 0 and _has_room(base, found, count, load, space)
                                 for count in sizes):  # fmt: skip
        fitting = [count for count in sizes if _has_room(base, found, count, load, space)]
        if fitting:
            return EnergyLensError(
                f"gpus: no deployment of {name} uses exactly {space.max_gpus} GPUs; an engine takes "
                f"{', '.join(map(str, fitting))} of them"
            )
    return EnergyLensError(
        f"{name} does not fit {where}: {weights}; what is left holds no request of {load.longest} tokens "
        "(max_model_len) beside the activations of a step"
    )


def _has_room(base: EnergyModel, found: Sequence[Deployment], gpus: int, load: Load, space: Space) -> bool:
    """Whether an engine of so many GPUs can be started with any batch limit."""
    for deployment in found:
        if deployment.num_gpus == gpus:
            model = EnergyModel(base.cascade, deployment)
            if len(_limits(Engine(model, Memory.of(model, space.gpu_memory_utilization)), load, space)[0]):
                return True
    return False


def _nothing_keeps_up(
    name: str, table: Deployments, kept: Sequence[Engine], load: Load, space: Space
) -> EnergyLensError:
    if not np.isfinite(table.token_j).any():
        return EnergyLensError(
            f"rate: no deployment of {name} on up to {space.max_gpus} GPUs keeps up with {load.rate_per_s:g} requests "
            "a second; accepted: a lower rate, or more GPUs"
        )
    for field, bound, values in (("tpot", load.tpot_s, table.tpot_s), ("ttft", load.ttft_s, table.ttft_s)):
        if bound is not None and np.nanmin(values) > bound:
            least = int(np.nanargmin(values))
            return EnergyLensError(
                f"{field}: no deployment of {name} keeps it within {bound * 1e3:.4g} ms; the nearest, "
                f"{kept[table.engine[least]].title}, has {values[least] * 1e3:.4g} ms"
            )
    if load.ttft_s is None and load.rate_per_s is not None:
        return EnergyLensError(
            f"rate: at {load.rate_per_s:g} requests a second more than {MOST_WAITING:.0%} of them wait in line in each "
            f"deployment of {name} on up to {space.max_gpus} GPUs; accepted: a lower rate, more GPUs, or a ttft"
        )
    return EnergyLensError(
        f"ttft and tpot: deployments of {name} keep one or the other, none keeps both; accepted: a longer one of them"
    )


def _describe(deployment: Deployment) -> str:
    degrees = [
        f"{short}{degree}"
        for short, degree in (
            ("TP", deployment.tensor_parallel_size),
            ("PP", deployment.pipeline_parallel_size),
            ("DP", deployment.data_parallel_size),
        )
        if degree > 1
    ]
    parts = [f"{deployment.num_gpus} x {deployment.gpu}", " ".join(degrees)]
    parts.append("EP" if deployment.enable_expert_parallel else "")
    parts.append(deployment.quantization or "")
    parts.append(f"{deployment.kv_cache_dtype} KV" if deployment.kv_cache_dtype != "auto" else "")
    parts.append(f"{deployment.power_limit_w:.0f} W" if deployment.power_limit_w is not None else "")
    return ", ".join(part for part in parts if part)
