"""One engine: a way of running the model, the memory it has, and the limits with which it starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from energylens_vllm.einsum import Cascade
from energylens_vllm.energy import Deployment, DualBatch, EnergyModel
from energylens_vllm.energy.batch import Integers
from energylens_vllm.explore.memory import Memory
from energylens_vllm.explore.space import Load, Space
from energylens_vllm.hardware.profile import GpuProfile


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

    @classmethod
    def of(cls, cascade: Cascade, deployment: Deployment, space: Space, dual_batch: bool = False) -> Engine:
        """The engine of a deployment."""
        model = _model(cascade, deployment, dual_batch)
        return cls(model, Memory.of(model, space.gpu_memory_utilization), dual_batch)

    def with_profile(self, profile: GpuProfile) -> EnergyModel:
        """Its model on a GPU with other coefficients."""
        return _model(self.model.cascade, self.deployment, self.dual_batch, profile)


def dual_batches(deployment: Deployment, space: Space) -> tuple[bool, ...]:
    """Without dual-batch overlap, and with it where vLLM has it: its exchanges are those of DeepEP's kernels."""
    both = space.enable_dbo and deployment.data_parallel_size > 1 and deployment.enable_expert_parallel
    return (False, True) if both else (False,)


def _model(
    cascade: Cascade, deployment: Deployment, dual_batch: bool, profile: GpuProfile | None = None
) -> EnergyModel:
    return EnergyModel(cascade, deployment, profile, DualBatch() if dual_batch else None)


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


def limits(engine: Engine, load: Load, space: Space) -> tuple[Integers, Integers]:
    """(max_num_seqs, max_num_batched_tokens) with which vLLM starts and memory holds a full batch; pairs in order of
    the budget, then of the limit."""
    stages = engine.deployment.pipeline_parallel_size
    tried = np.array(sorted(set(space.max_num_seqs)))
    tried = tried[tried >= stages]  # fewer requests than stages leave some of them empty at all times
    found: list[int] = []
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
        found += here.tolist()
        budgets += [budget] * len(here)
    return np.array(found, dtype=np.int64), np.array(budgets, dtype=np.int64)
