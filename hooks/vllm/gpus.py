"""VllmConfig -> which GPUs of this host are this engine's."""

from __future__ import annotations

import os
from typing import Any

from energylens_vllm.meter.nvml import Nvml


def gpus_of(vllm_config: Any) -> tuple[Nvml, int] | None:
    """NVML for the GPUs of this engine on this host, and how many there are; None if there are none, or they cannot be
    told (Ray).

    As `vllm.v1.worker.gpu_worker` chooses them: each data-parallel rank of a host takes the next ones of those that
    CUDA_VISIBLE_DEVICES shows.
    """
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    if not current_platform.is_cuda():
        return None
    if parallel.distributed_executor_backend in ("ray", "external_launcher"):
        return None
    if getattr(parallel, "data_parallel_backend", "mp") == "ray":
        return None
    count = getattr(parallel, "local_world_size", parallel.world_size)
    rank = getattr(parallel, "data_parallel_rank_local", None)
    if rank is None:
        rank = getattr(parallel, "data_parallel_index", 0)
    if getattr(parallel, "nnodes_within_dp", 1) > 1:
        rank = 0
    assigned = getattr(parallel, "assigned_physical_gpu_ids", None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if assigned is None else ",".join(map(str, assigned))
    return Nvml(visible, rank * count, count), count
