"""Room for the KV cache as vLLM found it when it started, beside what `energylens explore` goes by.

    python benchmarks/memory.py

Recorded: engines of vLLM 0.25.1 on an H100 (benchmarks/results/serve_h100), started with 0.92 of its memory as
benchmarks/in_process.py says. Published: start-up logs of others, with defaults where they say nothing; the one of
Qwen3-235B-A22B had a KV connector loaded, which takes memory of its own.
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


def published() -> Iterator[Start]:
    """Whose logs say GiB for the cache: 56.18 and 8.1."""
    for name, gpus, sequences, found_gib in (("llama-2-7b", 1, 256, 56.18), ("qwen3-235b-a22b-fp8", 4, 1024, 8.1)):
        memory = Memory.of(EnergyModel(name, Deployment(gpu="H100-SXM", tensor_parallel_size=gpus)), 0.9)
        room = min(float(memory.cache_bytes(stage, 8192, sequences)) for stage in memory.stages)
        yield Start(f"{name} on {gpus} H100", "published", found_gib * GIB, room)


def main() -> None:
    rows = [
        [start.name, start.source, f"{start.found / GIB:.2f}", f"{start.predicted / GIB:.2f}",
         percent(start.error, signed=True)]
        for start in (*recorded(), *published())
    ]  # fmt: skip
    print(table(["GiB of a GPU for the KV cache", "", "vLLM", "here", "off"], rows, left=2))


if __name__ == "__main__":
    main()
