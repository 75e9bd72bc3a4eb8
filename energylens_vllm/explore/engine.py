"""One engine: a way of running the model, the memory it has, and the limits with which it starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from energylens_vllm.einsum import Cascade
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Integers
from energylens_vllm.explore.memory import Memory
from energylens_vllm.explore.space import Load, Space
from energylens_vllm.hardware.profile import GpuProfile

DEFAULT_BACKEND, DEFAULT_COMBINE = Deployment().all2all_backend, Deployment().dcp_comm_backend


@dataclass(frozen=True, slots=True)
class Engine:
    """One way of running the model, whatever its batch limits."""

    model: EnergyModel
    memory: Memory

    @property
    def deployment(self) -> Deployment:
        return self.model.deployment

    @property
    def title(self) -> str:
        """The engine in a few words, such as "2 x H100-SXM, TP2, fp8"."""
        return _describe(self.deployment)

    @classmethod
    def of(cls, cascade: Cascade, deployment: Deployment, space: Space) -> Engine:
        """The engine of a deployment."""
        model = EnergyModel(cascade, deployment)
        return cls(model, Memory.of(model, space.gpu_memory_utilization))

    def with_profile(self, profile: GpuProfile) -> EnergyModel:
        """Its model on a GPU with other coefficients."""
        return EnergyModel(self.model.cascade, self.deployment, profile)


def _describe(deployment: Deployment) -> str:
    degrees = [
        f"{short}{degree}"
        for short, degree in (
            ("TP", deployment.tensor_parallel_size),
            ("PP", deployment.pipeline_parallel_size),
            ("DP", deployment.data_parallel_size),
            ("PCP", deployment.prefill_context_parallel_size),
            ("DCP", deployment.decode_context_parallel_size),
        )
        if degree > 1
    ]
    parts = [f"{deployment.num_gpus} x {deployment.gpu}", " ".join(degrees)]
    parts.append("EP" if deployment.enable_expert_parallel else "")
    copies = deployment.num_redundant_experts
    parts.append((f"EPLB +{copies}" if copies else "EPLB") if deployment.enable_eplb else "")
    parts.append("" if deployment.all2all_backend == DEFAULT_BACKEND else deployment.all2all_backend)
    parts.append("" if deployment.dcp_comm_backend == DEFAULT_COMBINE else deployment.dcp_comm_backend)
    parts.append("DBO" if deployment.enable_dbo else "")
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
