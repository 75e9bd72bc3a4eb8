"""Joules a token and attainment of routing policies: loads, fleets, seeds, and a belief that is wrong by 20 %.

    python benchmarks/routing_results.py TRACE [--requests N] [--loads 0.5,1,2,4,8] [--seeds 3]

TRACE: Azure's conversation trace (CSV) or Mooncake's (.jsonl). Every figure is a mean over seeds, which draw the noise
of each replica. `energy*` is the energy policy with each second replica believed 20 % faster and cheaper than it is and
the others 20 % slower and dearer.
"""

from __future__ import annotations

import argparse
from statistics import fmean

from energylens_vllm.cli.simulate import believed, fleet_tables
from energylens_vllm.routing.policies import POLICIES
from energylens_vllm.routing.simulate import simulate
from energylens_vllm.routing.trace import at_load, read_arrivals

FLEETS = {"equal": "8xH200-SXM", "mixed": "3xH200-SXM,2xH100-SXM,2xA100-SXM-80GB,1xL40S"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=19_366)
    parser.add_argument("--loads", default="0.5,1,2,4,8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ttft", type=float, default=1.0)
    parser.add_argument("--tpot", type=float, default=0.05)
    args = parser.parse_args()
    names = [*POLICIES, "energy*"]
    print("| fleet | load | " + " | ".join(names) + " |")
    print("| --- " * (len(names) + 2) + "|")
    trace = read_arrivals(args.trace)[: args.requests]
    for fleet, text in FLEETS.items():
        tables = fleet_tables("llama-3.1-8b", text, 256)
        wrong = believed(tables, "0.8,1.2")
        for load in (float(each) for each in args.loads.split(",")):
            arrivals = at_load(trace, load)
            cells = []
            for name in names:
                runs = [
                    simulate(
                        name.rstrip("*"),
                        tables,
                        arrivals,
                        args.ttft,
                        args.tpot,
                        wrong if name[-1] == "*" else tables,
                        seed,
                    )
                    for seed in range(args.seeds)
                ]
                joules, share = (
                    fmean(getattr(run, what) for run in runs) for what in ("energy_per_output_token_j", "attainment")
                )
                cells.append(f"{joules:.3f} ({100 * share:.1f})")
            print(f"| {fleet} | {load:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
