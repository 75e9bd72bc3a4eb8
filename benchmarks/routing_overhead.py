"""What routing by energy adds to a host's latency, beside the host's own policy in the same run.

    python benchmarks/routing_overhead.py --host ray        # with the Python of tools/ray.sh as $RAY_PYTHON

Replicas answer at once, one token. Policies take turns request by request, so that whatever else the machine does falls
on all alike. Milliseconds from sending a request to the end of its answer, one after the other, one client.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: name -> asks one request, raises if there is no answer
Policies = dict[str, Callable[[], object]]


@contextmanager
def ray() -> Iterator[Policies]:
    """Ray Serve: its router of power of two choices, ours in its place, and ours over two deployments."""
    sys.path.insert(0, str(ROOT / "tests" / "hooks"))
    from ray_serve import cluster

    gpus = ["H200-SXM/2", "L40S"]
    apps = {name: {"policy": name, "gpus": gpus} for name in ("default", "router", "fleet")}
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), 8866, apps, step_s=0.0) as running:
        for name in ("router", "fleet"):
            running.settle(name, "L40S")

        def asks(name: str) -> Callable[[], object]:
            def ask() -> object:
                answer = running.ask(name, "some words " * 200, 1)
                assert answer.complete, answer
                return answer

            return ask

        yield {name: asks(name) for name in apps}


HOSTS: dict[str, Callable[[], object]] = {"ray": ray}


def measure(policies: Policies, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by policy."""
    times: dict[str, list[float]] = {name: [] for name in policies}
    for number in range(requests + 20):
        for name, ask in policies.items():
            start = time.perf_counter()
            ask()
            if number >= 20:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=sorted(HOSTS), required=True)
    parser.add_argument("--requests", type=int, default=500, help="of each policy")
    options = parser.parse_args()
    with HOSTS[options.host]() as policies:  # type: ignore[attr-defined]
        times = measure(policies, options.requests)
    print(f"{options.host}: ms of {options.requests} requests each\n")
    print("| policy | p10 | p50 | p90 |\n| --- | --- | --- | --- |")
    for name, values in times.items():
        tenths = statistics.quantiles(values, n=10)
        print(f"| {name} | {tenths[0]:.1f} | {statistics.median(values):.1f} | {tenths[8]:.1f} |")


if __name__ == "__main__":
    main()
