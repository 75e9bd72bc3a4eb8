"""A tiny Qwen3-MoE on vLLM's CPU worker, whose routers tell what they choose:  python choices.py MODEL

Prints a JSON object: for each layer how often its router chose each expert while requests were served, what the plugin
has counted meanwhile, and the counts that its predictor knows.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from energylens_vllm.hooks.vllm import expert_counts as counting
from energylens_vllm.serving import expert_counts as learning

EXPERTS = 8


def main(model: str) -> None:
    counting.PUBLISH_S, counting.CHUNK = 0.1, 16  # steps of several chunks
    learning.MIN_TOKENS, learning.LEAST_INTERVAL_S = 256, 0.0
    llm = LLM(
        model,
        load_format="dummy",
        gpu_memory_utilization=0.08,
        max_model_len=1024,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        disable_log_stats=False,
        enforce_eager=True,
        additional_config={"energylens": {"learn_expert_routing": True}},
    )
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    layers = [m for m in core.model_executor.driver_worker.worker.get_model().modules() if isinstance(m, MoERunner)]
    chosen = _listen(layers)
    prompts = [
        {"prompt_token_ids": [(7 * i + j) % 200 for j in range(length)]} for i, length in enumerate(range(3, 60))
    ]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    observer = core.scheduler.energylens_observer
    (learnt,) = (listener for listener in observer.listeners if isinstance(listener, learning.LearntRouting))
    time.sleep(1.0)  # the last counts are published
    for _ in range(2):  # what the first learns the second takes over
        observer.report()
        learnt.wait()
    known = observer.predictor.model._expert_counts
    print(json.dumps({
        "chosen": [chosen[id(layer.router)].tolist() for layer in layers],
        "published": learning.Reader(learnt._read._at)().selections.tolist(),
        "known": None if known is None else np.asarray(known).tolist(),
        "failures": dict(observer.guard.failures),
    }))  # fmt: skip


def _listen(layers: list[Any]) -> dict[int, Any]:
    """Have each layer's router like other experts (dummy weights are all alike), and note what it chooses."""
    random = torch.Generator().manual_seed(0)
    likes = {id(layer.router): 1e-3 * torch.randn(EXPERTS, generator=random) for layer in layers}
    chosen = {id(layer.router): np.zeros(EXPERTS, np.int64) for layer in layers}
    kind = type(layers[0].router)
    original = kind._compute_routing

    def compute(self: BaseRouter, hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        logits = router_logits + likes[id(self)].to(router_logits.dtype)
        weights, ids = original(self, hidden_states, logits, *args, **kwargs)
        chosen[id(self)] += np.bincount(ids.flatten().numpy(), minlength=EXPERTS)
        return weights, ids

    kind._compute_routing = compute
    return chosen


if __name__ == "__main__":
    main(*sys.argv[1:])
