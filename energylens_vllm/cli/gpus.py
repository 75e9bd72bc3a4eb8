"""List the GPU profiles that `--gpu` knows by name, or every coefficient of one.

A profile is calibrated if its energy was fitted on measurements of that GPU; else it comes from cited constants and its
intervals are wide.
"""

from __future__ import annotations

import argparse
import json

from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.hardware import known_gpus, load_profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "gpu", nargs="?", metavar="GPU", help="show this profile's coefficients with uncertainty and source"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.gpu is not None:
        profile = load_profile(args.gpu)
        print(json.dumps(profile.to_json()) if args.json else _coefficients(args.gpu))
    elif args.json:
        print(json.dumps([load_profile(name).to_json() for name in known_gpus()]))
    else:
        print(_overview())
    return 0


def _overview() -> str:
    rows = []
    for profile in map(load_profile, known_gpus()):
        rows.append(
            [
                profile.name,
                quantity(profile.memory_bytes, "B"),
                quantity(profile["memory.bandwidth_bytes_per_s"], "B/s"),
                quantity(profile["compute.bfloat16.peak_flops"], "FLOP/s"),
                quantity(profile["power.limit_w"], "W"),
                quantity(profile["power.static_w"], "W"),
                "yes" if profile.calibrated else "no",
            ]
        )
    return table(["gpu", "memory", "bandwidth", "bf16 peak", "limit", "static", "calibrated"], rows)


def _coefficients(gpu: str) -> str:
    rows = [
        [name, f"{c.value:.4g}", percent(c.std), c.unit, c.source]
        for name, c in sorted(load_profile(gpu).coefficients.items())
    ]
    # Sources are long and come last, unpadded.
    sources = [row.pop() for row in rows]
    lines = table(["coefficient", "value", "± std", "unit"], rows).splitlines()
    return "\n".join(f"{line}  {source}" for line, source in zip(lines, ["source", *sources], strict=True))
