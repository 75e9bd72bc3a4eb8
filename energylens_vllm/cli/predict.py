"""Predict the time, energy and power of one engine step.

The batch is given by its decoding requests, by its prefill chunks, or request by request:

    energylens predict llama-3.1-8b --decode 64 --context 1000
    energylens predict llama-3.1-70b -tp 4 --decode 64 --prefill 4096
    energylens predict qwen3-30b-a3b --requests '[[1, 100], [512, 2048]]'

Energies are of all GPUs of the deployment together.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from energylens_vllm.cli.deployment import add_deployment_arguments, add_model_argument, energy_model
from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy import StepPrediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    batch = parser.add_argument_group("batch")
    batch.add_argument("--decode", type=int, default=0, metavar="N", help="requests that decode one token each")
    batch.add_argument(
        "--context", type=int, default=1000, metavar="TOKENS", help="computed tokens of each of those; default 1000"
    )
    batch.add_argument(
        "--prefill", type=int, nargs="+", default=[], metavar="TOKENS", help="new prompts of so many tokens each"
    )
    batch.add_argument(
        "--requests", metavar="JSON", help="instead: a list of [new tokens, computed tokens], one of each request"
    )
    add_deployment_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    batch = requests(args)
    step = energy_model(args).step(batch)
    print(json.dumps(as_json(step)) if args.json else as_text(step, tokens=sum(new for new, _ in batch)))
    return 0


def requests(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(new tokens, computed tokens) of each request of the batch that the flags describe."""
    if args.requests is not None:
        if args.decode or args.prefill:
            raise EnergyLensError("--requests: give either it or --decode and --prefill, not both")
        return parse_requests(args.requests, "--requests")
    for flag, value in (("--decode", args.decode), ("--context", args.context)):
        if value < 0:
            raise EnergyLensError(f"{flag}: {value} is negative; accepted: 0 or more")
    batch = [(1, args.context)] * args.decode + [(tokens, 0) for tokens in args.prefill]
    if not batch:
        raise EnergyLensError("batch: it is empty; give --decode, --prefill or --requests")
    return batch


def parse_requests(text: str, field: str) -> list[tuple[int, int]]:
    """Read `[[new tokens, computed tokens], ...]`; `field` is named in errors."""
    try:
        pairs = json.loads(text)
    except json.JSONDecodeError as error:
        raise EnergyLensError(f"{field}: {text!r} is not JSON ({error}); accepted: [[new, computed], ...]") from None
    whole = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(count) is int for count in pair) for pair in pairs
    )
    if not whole:
        raise EnergyLensError(f"{field}: {text!r}; accepted: [[new, computed], ...] in whole numbers")
    return [(new, computed) for new, computed in pairs]


def as_json(step: StepPrediction) -> dict[str, object]:
    return {
        "time_s": step.time_s,
        "energy_j": step.energy_j,
        "power_w": step.power_w,
        "interval_s": list(step.interval_s),
        "interval_j": list(step.interval_j),
        "components_j": dict(step.components),
        "phases_j": dict(step.phases),
        "flags": sorted(step.flags),
    }


def as_text(step: StepPrediction, tokens: int) -> str:
    low_s, high_s = (quantity(bound, "s") for bound in step.interval_s)
    low_j, high_j = (quantity(bound, "J") for bound in step.interval_j)
    lines = [
        table(
            ["", "predicted", "90 % interval"],
            [
                ["step time", quantity(step.time_s, "s"), f"{low_s} .. {high_s}"],
                ["energy", quantity(step.energy_j, "J"), f"{low_j} .. {high_j}"],
                ["energy per token", quantity(step.energy_j / tokens, "J"), ""],
                ["power", quantity(step.power_w, "W"), ""],
            ],
        ),
        table(
            ["energy by", "", "share"],
            [
                [name.replace("_", " "), quantity(energy_j, "J"), percent(energy_j / step.energy_j)]
                for split in (step.components, step.phases)
                for name, energy_j in split.items()
                if energy_j
            ],
        ),
    ]
    if step.flags:
        lines.append("flags: " + ", ".join(sorted(step.flags)))
    return "\n\n".join(lines)
