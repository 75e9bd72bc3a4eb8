"""Why nothing was found, in one line that says how far off the nearest is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.precision import ONLINE_QUANTIZATIONS, widths
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.deployments import Deployments
from energylens_vllm.explore.engine import Engine, limits
from energylens_vllm.explore.memory import cuda_bytes
from energylens_vllm.explore.space import MOST_WAITING, Load, Space
from energylens_vllm.hardware.profile import load_profile


def check_quantization(base: EnergyModel, space: Space) -> None:
    """Raise for a quantization that vLLM does not make of the checkpoint that `base` was made of."""
    name, stored = base.cascade.name, base.quantization
    for method in space.quantization or ():
        if method not in ((None, *ONLINE_QUANTIZATIONS) if stored is None else (None, stored)):
            accepted = ", ".join(("none", *(ONLINE_QUANTIZATIONS if stored is None else (stored,))))
            raise EnergyLensError(
                f"quantization: vLLM does not make {method!r} of {name}, which is stored in "
                f"{stored or base.deployment.dtype}; accepted: {accepted}, or a checkpoint in {method!r} as the model"
            )


def check_asked(base: EnergyModel, found: Sequence[Deployment], space: Space) -> None:
    """Raise for what was asked for and no deployment in `found` has."""
    name, where = base.cascade.name, _where(space)
    if not found:
        return  # and why is for `nothing_fits` to say
    if space.enable_eplb and not any(each.enable_eplb for each in found):
        copies = " or ".join(map(str, space.num_redundant_experts))
        raise EnergyLensError(
            f"enable_eplb: no deployment of {name} on {where} takes {copies} redundant experts; accepted: expert "
            "parallelism of a network with experts, and numbers that fill all ranks alike"
        )
    if space.dcp_comm_backend != ("ag_rs",) and all(each.decode_context_parallel_size == 1 for each in found):
        raise EnergyLensError(
            f"dcp_comm_backend: no deployment of {name} on {where} splits contexts; accepted: GPUs that hold the same "
            "KV heads, as with latent attention or more tensor-parallel GPUs than KV heads"
        )
    used = {each.all2all_backend for each in found}
    for field, asked, missing in (
        ("all2all_backend", " or ".join(space.all2all_backend), used.isdisjoint(space.all2all_backend)),
        ("enable_dbo", "dual-batch overlap", space.enable_dbo and not any(each.enable_dbo for each in found)),
    ):
        if missing:
            raise EnergyLensError(
                f"{field}: no deployment of {name} on {where} uses {asked}; accepted: data and expert parallelism of a "
                "network with experts, and GPUs on which DeepEP was measured"
            )


def _where(space: Space) -> str:
    return f"{'' if space.exactly else 'up to '}{space.max_gpus} x {' or '.join(dict.fromkeys(space.gpus))}"


def nothing_fits(base: EnergyModel, found: Sequence[Deployment], load: Load, space: Space) -> EnergyLensError:
    name, where = base.cascade.name, f"{space.max_gpus} x {' or '.join(space.gpus)}"
    sizes = sorted({deployment.num_gpus for deployment in found})
    if not sizes:
        asked = (space.tensor_parallel_size, space.pipeline_parallel_size, space.data_parallel_size,
                 space.prefill_context_parallel_size)  # fmt: skip
        least = math.prod(min(degrees or (1,)) for degrees in asked)
        needed = f": they take {least} GPUs at least" if least > space.max_gpus else ""
        return EnergyLensError(f"no degrees of parallelism that were asked for run {name} on {_where(space)}{needed}")
    smallest = min(
        max(base.cascade.weight_bytes(widths(each.dtype, each.quantization, each.kv_cache_dtype), each.mesh))
        for each in found
    )
    room = space.gpu_memory_utilization * max(cuda_bytes(load_profile(gpu)) for gpu in space.gpus)
    weights = f"a GPU would hold {smallest / 1e9:.1f} GB of weights at least, and vLLM may use {room / 1e9:.1f} GB"
    if smallest > room:
        return EnergyLensError(f"{name} does not fit {where}: {weights}")
    if space.exactly:
        fitting = [count for count in sizes if _has_room(base, found, count, load, space)]
        if fitting and not any(space.max_gpus % count == 0 for count in fitting):
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
    same = [deployment for deployment in found if deployment.num_gpus == gpus]
    return any(len(limits(Engine.of(base.cascade, each, space), load, space)[0]) for each in same)


def nothing_keeps_up(
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
            several = f"{table.replicas[least]} replicas of " if table.replicas[least] > 1 else ""
            return EnergyLensError(
                f"{field}: no deployment of {name} keeps it within {bound * 1e3:.4g} ms; the nearest, "
                f"{several}{kept[table.engine[least]].title}, has {values[least] * 1e3:.4g} ms"
            )
    if load.ttft_s is None and np.nanmin(table.waiting_share) > MOST_WAITING:
        return EnergyLensError(
            f"rate: at {load.rate_per_s:g} requests a second more than {MOST_WAITING:.0%} of them wait in line in each "
            f"deployment of {name} on up to {space.max_gpus} GPUs; accepted: a lower rate, more GPUs, or a ttft"
        )
    if load.ttft_s is None:
        return EnergyLensError(
            f"rate and tpot: deployments of {name} that keep the tpot let more than {MOST_WAITING:.0%} of requests "
            "wait in line; accepted: a lower rate, a longer tpot, more GPUs, or a ttft"
        )
    return EnergyLensError(
        f"ttft and tpot: deployments of {name} keep one or the other, none keeps both; accepted: a longer one of them"
    )
