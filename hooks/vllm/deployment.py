"""VllmConfig -> what serving needs to know of the engine, in plain values."""

from __future__ import annotations

import re
from typing import Any

import vllm

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
    config, device_name = model.hf_config.to_dict(), _device_name()
    return Engine(
        config=config,
        deployment={
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "enable_expert_parallel": parallel.enable_expert_parallel,
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


def _capture_sizes(compilation: Any) -> list[int] | None:
    """The sizes that batches are padded to; None where vLLM has none, as on a CPU."""
    return sorted(compilation.cudagraph_capture_sizes or ()) or None


def _device_name() -> str:
    """The name of this engine's first GPU, "" if there is none. vLLM asks NVML, so no CUDA context is made."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return ""
    return str(current_platform.get_device_name())
