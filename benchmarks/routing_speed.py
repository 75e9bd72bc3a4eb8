"""What a routing decision costs (`rank` over 2 to 256 replicas, of many batches, in microseconds), and what simulating
a trace on eight replicas costs, in seconds of one core.

python benchmarks/routing_speed.py [TRACE]
"""

from __future__ import annotations

import sys
import time

import numpy as np

from energylens_vllm.cli.simulate import fleet_tables
from energylens_vllm.routing import Config, Request, Snapshots, rank
from energylens_vllm.routing.policies import POLICIES
from energylens_vllm.routing.simulate import simulate
from energylens_vllm.routing.trace import read_arrivals


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


def simulation_s(trace: str, name: str) -> tuple[int, float]:
    """Requests, and CPU seconds to simulate them."""
    arrivals, tables = read_arrivals(trace), fleet_tables("llama-3.1-8b", "8xH200-SXM", 256)
    start_s = time.process_time()
    simulate(name, tables, arrivals, 1.0, 0.05)
    return len(arrivals), time.process_time() - start_s


if __name__ == "__main__":
    print(f"{'replicas':>8} {'least us':>9} {'median us':>9}")
    for count in (2, 8, 16, 64, 256):
        least, median = microseconds(count)
        print(f"{count:8d} {least:9.1f} {median:9.1f}")
    for trace in sys.argv[1:2]:
        for policy in POLICIES:
            requests, took_s = simulation_s(trace, policy)
            print(f"{requests} requests on 8 replicas, {policy}: {took_s:.1f} s")
