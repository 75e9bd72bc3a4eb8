"""VllmConfig -> what serving needs to know of the engine, in plain values."""

from __future__ import annotations

import re
from typing import Any

import vllm

from energylens_vllm.energy.expert_exchange import ALL2ALL_BACKENDS
from energylens_vllm.serving.start import Engine

#: speculative methods that draft on the CPU from the text so far; the others run a model that is not predicted
_MODEL_FREE_DRAFTS = ("ngram", "ngram_gpu", "suffix")


def describe(vllm_config: Any) -> Engine:
    """The engine that `vllm_config` configures."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    flags = set()
    if (draft := vllm_config.speculative_config) is not None and draft.method not in _MODEL_FREE_DRAFTS:
        flags.add("draft_model_not_modelled")
    if vllm_config.kv_transfer_config is not None:
        flags.add("kv_transfer_not_modelled")
    exchange = _exchange(parallel) if model.is_moe else {}
    balanced = parallel.enable_eplb and model.is_moe  # vLLM takes no notice of either in a dense network
    tokens_split = parallel.prefill_context_parallel_size > 1  # which makes vLLM use the backend, too
    modelled = [name for name, kernels in ALL2ALL_BACKENDS.items() if not (kernels and tokens_split)]
    if exchange.get("all2all_backend") not in (None, *modelled):
        flags.add("all2all_not_modelled")
        exchange = {}
    config, device_name = model.hf_config.to_dict(), _device_name()
    return Engine(
        config=config,
        deployment={
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "enable_expert_parallel": parallel.enable_expert_parallel,
            "enable_eplb": balanced,
            "num_redundant_experts": parallel.eplb_config.num_redundant_experts if balanced else 0,
            **exchange,
            **_context(parallel),
            "dtype": str(model.dtype).removeprefix("torch."),
            # A checkpoint's own says more than the name that vLLM gives it: bits, groups, what is left out.
            "quantization": None if config.get("quantization_config") else model.quantization,
            "kv_cache_dtype": vllm_config.cache_config.cache_dtype,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "enforce_eager": model.enforce_eager,
            # A build of one's own may be called "dev".
            "vllm_release": vllm.__version__ if re.match(r"\d+\.\d+", vllm.__version__) else None,
            # vLLM's CPU platform switches it off, which says nothing of the GPU that is predicted for there.
            "async_scheduling": scheduler.async_scheduling if device_name else None,
            "cudagraph_capture_sizes": _capture_sizes(compilation),
        },
        device_name=device_name,
        quantization=model.quantization,
        flags=frozenset(flags),
    )


def _exchange(parallel: Any) -> dict[str, Any]:
    """How tokens reach experts of other ranks; nothing where vLLM does not ask its own arguments for it."""
    ranks = parallel.data_parallel_size * parallel.prefill_context_parallel_size
    if ranks == 1 or not parallel.enable_expert_parallel:
        return {}
    return {
        "all2all_backend": parallel.all2all_backend,
        "enable_dbo": parallel.use_ubatching,
        "dbo_decode_token_threshold": max(parallel.dbo_decode_token_threshold, 1),
        "dbo_prefill_token_threshold": max(parallel.dbo_prefill_token_threshold, 1),
    }


def _context(parallel: Any) -> dict[str, Any]:
    """How contexts are split over GPUs. What vLLM leaves to the model (None) is its usual way by now or never asked."""
    given = {
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
    }
    if parallel.decode_context_parallel_size > 1:
        given["dcp_comm_backend"] = parallel.dcp_comm_backend or "ag_rs"
        given["dcp_q_replicate"] = bool(getattr(parallel, "dcp_q_replicate", False))  # not in 0.25
    return given


def _capture_sizes(compilation: Any) -> list[int] | None:
    """The sizes that batches are padded to; None where vLLM has none, as on a CPU."""
    return sorted(compilation.cudagraph_capture_sizes or ()) or None


def _device_name() -> str:
    """The name of this engine's first GPU, "" if there is none. vLLM asks NVML, so no CUDA context is made."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return ""
    return str(current_platform.get_device_name())


def kv_cache_tokens(vllm_config: Any) -> int:
    """Tokens that the KV cache of a running engine holds, as its blocks say; GPUs that share out contexts (decode
    context parallelism) keep parts of each block."""
    cache, parts = vllm_config.cache_config, vllm_config.parallel_config.decode_context_parallel_size
    return int(cache.num_gpu_blocks * cache.block_size * parts)
