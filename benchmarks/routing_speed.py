"""What a routing decision costs: `rank` over 2 to 256 replicas, the best of many batches, in microseconds.

python benchmarks/routing_speed.py
"""

from __future__ import annotations

import time

import numpy as np

from energylens_vllm.cli.simulate import fleet_tables
from energylens_vllm.routing import Config, Request, Snapshots, rank


def microseconds(replicas: int, batches: int = 200, calls: int = 20) -> tuple[float, float]:
    """Least and median time of a decision."""
    kinds = fleet_tables("llama-3.1-8b", "H200-SXM,H100-SXM", 256)
    snapshots = Snapshots.empty([kinds[i % 2] for i in range(replicas)])
    random = np.random.default_rng(0)
    snapshots.running[:] = random.integers(0, 64, replicas)
    snapshots.mean_context[:] = 1000.0
    snapshots.kv_tokens_used[:] = snapshots.running * 1000
    snapshots.waiting_tokens[:] = random.integers(0, 3, replicas) * 700
    snapshots.prefill_tokens_per_s[:] = random.integers(0, 9000, replicas)
    request = Request(500, 200.0, np.zeros(replicas), 1.0, 0.05, previous=1, short_output=(10.0, 150.0))
    config = Config()
    took = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            rank(snapshots, request, config).best  # noqa: B018
        took.append((time.perf_counter() - start) / calls * 1e6)
    return min(took), float(np.median(took))


if __name__ == "__main__":
    print(f"{'replicas':>8} {'least us':>9} {'median us':>9}")
    for count in (2, 8, 16, 64, 256):
        least, median = microseconds(count)
        print(f"{count:8d} {least:9.1f} {median:9.1f}")
