"""An offline LLM whose engine is a process of its own, over a fake executor:  python offline.py MODEL NAME

Prints a JSON object: what the requests got, the steps' log, and what the registry of this process shows.
"""

from __future__ import annotations

import json
import sys
import time

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams


def main(model: str, name: str) -> None:
    llm = LLM(
        model,
        served_model_name=name,
        load_format="dummy",
        gpu_memory_utilization=0.08,
        max_model_len=1024,
        disable_log_stats=False,
        enforce_eager=True,
        distributed_executor_backend="fake_executor.FakeExecutor",
        additional_config={"energylens": {"report_interval_s": 0.05}},
    )
    prompts = [{"prompt_token_ids": [(i + j) % 200 for j in range(length)]} for i, length in enumerate((12, 40, 7))]
    tokens = []
    for _ in range(2):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
        time.sleep(0.2)  # nobody reads what an idle engine might send
    shown = {
        " ".join((s.name, *(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")))): s.value
        for family in REGISTRY.collect()
        for s in family.samples
        if s.name.startswith("energylens_") and not s.name.endswith("_created")
    }
    print(json.dumps({"tokens": tokens, "metrics": shown}))


if __name__ == "__main__":
    main(*sys.argv[1:])
