"""Real vLLM over a fake executor, with accounts and a GPU that is made up:  python accounts.py MODEL LOG

Prints one JSON object: what requests were told, what was executed, and what /metrics shows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from scenarios import allow_asynchronous_scheduling, finish, prompts, start
from vllm import SamplingParams

from energylens_vllm.hooks.vllm import start as hook_start
from energylens_vllm.meter.gpu import State


class SteadyGpu:
    """Draws 120 W."""

    label, uuid, counts = "3", "GPU-3", "gpu"

    def open(self) -> list[SteadyGpu]:
        return [self]

    def close(self) -> None:
        pass

    def power_w(self) -> float:
        return 120.0

    def counter_j(self) -> float:
        return time.perf_counter() // 0.1 * 12.0

    def state(self) -> State:
        return State(limit_w=700.0, throttled=frozenset({"power_cap"}))


def run(model: str, log: str, asynchronous: bool) -> dict[str, Any]:
    name = f"accounts {asynchronous}"
    hook_start.gpus_of = lambda vllm_config: (SteadyGpu(), 1)
    settings = {"attribution": True, "request_log": log, "report_interval_s": 0.5}
    llm = start(
        model, name, step_s=0.004, async_scheduling=asynchronous, enable_prefix_caching=True, max_num_batched_tokens=64,
        additional_config={"energylens": settings},
    )  # fmt: skip
    asked = [SamplingParams(max_tokens=8, ignore_eos=True, extra_args={"energylens": 1}) for _ in range(2)]
    plain = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = llm.generate(prompts(100, 40, 7), [asked[0], plain, asked[1]], use_tqdm=False)
    outputs += llm.generate(prompts(100), asked[0], use_tqdm=False)
    engine = llm.llm_engine
    engine.add_request("given up", prompts(0, 0, 0, 200)[3], plain)
    for _ in range(4):
        engine.step()
    engine.abort_request(["given up"])
    end = time.monotonic() + 14.0
    while time.monotonic() < end:  # an engine without a reporting thread reports in steps only
        outputs += llm.generate(prompts(0, 9)[1:], plain, use_tqdm=False)
        time.sleep(0.2)
    observer = engine.engine_core.engine_core.scheduler.energylens_observer
    result = finish(llm, name, outputs)
    result["told"] = [output.kv_transfer_params for output in outputs]
    result["open"] = [account.as_dict() for account in observer.attribution.open_accounts]
    result["asking"] = sorted(observer.asking)
    result["listeners"] = [type(listener).__name__ for listener in observer.listeners]
    return result


if __name__ == "__main__":
    allow_asynchronous_scheduling()
    os.environ["ENERGYLENS_GPU"] = "H200-SXM"
    for asynchronous in (False, True):
        result = run(sys.argv[1], f"{sys.argv[2]}.{asynchronous}", asynchronous)
        print(json.dumps({"name": asynchronous} | result), flush=True)
