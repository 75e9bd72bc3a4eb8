"""Evaluate everything that can be deployed, and keep what a load allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from energylens_vllm.architectures import is_cascade, load_config, longest_request
from energylens_vllm.einsum import Cascade
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Integers
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.deployments import Deployments, evaluate
from energylens_vllm.explore.engine import Engine, limits
from energylens_vllm.explore.nothing import check_asked, check_quantization, nothing_fits, nothing_keeps_up
from energylens_vllm.explore.pareto import pareto_front
from energylens_vllm.explore.space import MOST_WAITING, Load, Space, engines

Booleans = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]  #: (engines done, engines in all)


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

    Requests longer than the model's context are refused, and the longest that has to fit is no longer than it.
    Raises EnergyLensError for a model or GPU that is not known, a degree that does not divide, a quantization that vLLM
    does not make, something asked for that no deployment has, a model that does not fit, a number of GPUs that no
    deployment has, and latencies or a rate that none reaches: each says how far off the nearest is.
    """
    space = space or Space()
    base = EnergyModel(model, Deployment(gpu=space.gpus[0]))
    found = list(engines(base.cascade, base.quantization, space))
    if not (isinstance(model, Cascade) or is_cascade(model)):  # which say nothing of a checkpoint
        load = _bounded(load_config(model if isinstance(model, Mapping) else os.fspath(model)), load)
        check_quantization(base, space)
    check_asked(base, found, space)
    kept: list[Engine] = []
    tables: list[Deployments] = []
    for done, deployment in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        engine = Engine.of(base.cascade, deployment, space)
        batch_limits, budgets = limits(engine, load, space)
        replicas = _replicas(deployment.num_gpus, load, space)
        if len(batch_limits) and len(replicas):
            tables.append(evaluate(engine, len(kept), batch_limits, budgets, replicas, load))
            kept.append(engine)
    if progress is not None:
        progress(len(found), len(found))
    if not tables:
        raise nothing_fits(base, found, load, space)
    table = Deployments.joined(tables)
    feasible = np.isfinite(table.token_j)
    for bound, latency in ((load.ttft_s, table.ttft_s), (load.tpot_s, table.tpot_s)):
        if bound is not None:
            feasible &= np.nan_to_num(latency, nan=np.inf) <= bound
    if load.ttft_s is None:
        feasible &= np.nan_to_num(table.waiting_share, nan=1.0) <= MOST_WAITING
    if not feasible.any():
        raise nothing_keeps_up(base.cascade.name, table, kept, load, space)
    front = np.zeros(len(table), dtype=bool)
    front[feasible] = pareto_front(table.token_j[feasible], table.tpot_s[feasible], table.gpus[feasible])
    flags = frozenset().union(*(engine.model.flags for engine in kept))
    return Exploration(base.cascade.name, load, space, tuple(kept), table, feasible, front, flags)


def _bounded(config: Mapping[str, object], load: Load) -> Load:
    """The load with the longest request that the model's context holds, unless one is given. Raises for longer ones."""
    most = longest_request(config)
    if most is None or load.longest <= most:
        return load
    if load.max_model_len is not None:
        raise EnergyLensError(f"max_model_len: {load.max_model_len}; accepted: up to {most}, the model's context")
    if load.prompt_tokens + load.output_tokens > most:
        raise EnergyLensError(
            f"prompt_tokens and output_tokens: {load.prompt_tokens + load.output_tokens:.0f} together; accepted: up to "
            f"{most}, the model's context"
        )
    return replace(load, max_model_len=most)


def _replicas(gpus: int, load: Load, space: Space) -> Integers:
    """Numbers of replicas to try. Without a rate more of them change nothing per token, so one stands for all."""
    if space.exactly:
        return np.array([space.max_gpus // gpus] if space.max_gpus % gpus == 0 else [], dtype=np.int64)
    return np.arange(1, (space.max_gpus // gpus if load.rate_per_s else 1) + 1)
