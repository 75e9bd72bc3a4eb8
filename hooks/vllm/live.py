"""What a scheduler holds now, read by the reporting thread beside the engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from energylens_vllm.serving.replica import Live


def looker(scheduler: Any) -> Callable[[], Live]:
    """A function that looks at `scheduler`. Any thread may call it."""
    config = scheduler.kv_cache_config
    block_size = min(group.kv_cache_spec.block_size for group in config.kv_cache_groups)
    # As vLLM says how many tokens its cache holds: groups of layers share the blocks, of which GPUs that share out
    # contexts keep parts.
    parts = scheduler.vllm_config.parallel_config.decode_context_parallel_size
    kv_tokens = config.num_blocks // len(config.kv_cache_groups) * block_size * parts

    def look() -> Live:
        requests = list(scheduler.requests.values())  # in one go: the engine's thread cannot change it meanwhile
        waiting = sum(max(each.num_prompt_tokens - each.num_computed_tokens, 0) for each in requests)
        return Live(len(requests), waiting, scheduler.kv_cache_manager.usage * kv_tokens, kv_tokens)

    return look
