"""Room for the KV cache as vLLM found it when it started, beside what `energylens explore` goes by.

    python benchmarks/memory.py

Recorded: engines of vLLM 0.25.1 on an H100 (benchmarks/results/serve_h100), started with 0.92 of its memory as
benchmarks/in_process.py says. Published: start-up logs of others, with the release's defaults where they say nothing.
That of Qwen3-235B-A22B (vllm-project/vllm#21348, July 2025) had a KV connector loaded; those of release 0.11 or soon
after are llm-d-benchmark's (config_explorer/empirical-vllm-memory-results.md), which do not say which release it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli.table import percent, table
from energylens_vllm.explore.memory import BLOCK_TOKENS, Memory

RECORDED = Path(__file__).parent / "results" / "serve_h100"
UTILIZATION = 0.92  # of benchmarks/in_process.py, which recorded them
GIB = 2.0**30


@dataclass(frozen=True)
class Start:
    """One start of vLLM: bytes of a GPU that it had for the cache, and that it would have by our reckoning."""

    name: str
    source: str
    found: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.found - 1


def recorded() -> Iterator[Start]:
    for file in sorted(RECORDED.glob("*.json")):
        run = json.loads(file.read_text())
        given = {name: value for name, value in run["engine"]["deployment"].items() if name in Deployment.accepted()}
        deployment = Deployment(**given)
        memory = Memory.of(EnergyModel(run["engine"]["config"], deployment), UTILIZATION)
        (stage,) = memory.stages
        token_bytes = float(stage.request_bytes(BLOCK_TOKENS)) / BLOCK_TOKENS
        room = float(memory.cache_bytes(stage, deployment.max_num_batched_tokens, deployment.max_num_seqs))
        yield Start(run["title"], "recorded", run["kv_tokens"] * token_bytes, room)


#: Model, quantization, GPU, how many, release, sequences and tokens of a step, utilization, GiB found for the cache.
LOGS = (
    ("llama-2-7b", None, "H100-SXM", 1, "0.8", 256, 8192, 0.9, 56.18),
    ("qwen3-235b-a22b-fp8", None, "H100-SXM", 4, "0.9", 1024, 8192, 0.9, 8.11),
    ("qwen3-0.6b", None, "H100-SXM", 1, "0.11", 1024, 8192, 0.9, 64.45),
    ("llama-3.1-8b", None, "H100-SXM", 1, "0.11", 1024, 8192, 0.9, 51.38),
    ("gpt-oss-20b", None, "H100-SXM", 1, "0.11", 1024, 8192, 0.9, 50.28),
    ("qwen3-32b", None, "H100-SXM", 1, "0.11", 1024, 8192, 0.9, 4.45),
    ("llama-3.3-70b", "fp8", "H100-SXM", 2, "0.11", 1024, 8192, 0.9, 32.0),
    ("llama-3.1-8b", None, "A100-SXM-80GB", 1, "0.31", 256, 2048, 0.92, 56.21),
)


def published() -> Iterator[Start]:
    for model, quantization, gpu, gpus, release, sequences, tokens, utilization, found_gib in LOGS:
        deployment = Deployment(
            gpu=gpu, tensor_parallel_size=gpus, quantization=quantization, vllm_release=release,
            max_num_seqs=sequences, max_num_batched_tokens=tokens,
        )  # fmt: skip
        memory = Memory.of(EnergyModel(model, deployment), utilization)
        room = min(float(memory.cache_bytes(stage, tokens, sequences)) for stage in memory.stages)
        name = f"{model}, {quantization}" if quantization else model
        yield Start(f"{name}, {gpus} x {gpu}, vLLM {release}", "published", found_gib * GIB, room)


def main() -> None:
    rows = [
        [start.name, start.source, f"{start.found / GIB:.2f}", f"{start.predicted / GIB:.2f}",
         percent(start.error, signed=True)]
        for start in (*recorded(), *published())
    ]  # fmt: skip
    print(table(["GiB of a GPU for the KV cache", "", "vLLM", "here", "off"], rows, left=2))


if __name__ == "__main__":
    main()
