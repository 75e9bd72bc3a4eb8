"""Predict the time, energy and power of one engine step, or of a server under steady load.

The batch of a step is given by its decoding requests, by its prefill chunks, or request by request:

    energylens predict llama-3.1-8b --decode 64 --context 1000
    energylens predict llama-3.1-70b -tp 4 --decode 64 --prefill 4096
    energylens predict qwen3-30b-a3b --requests '[[1, 100], [512, 2048]]'

A load is given by how many requests are in the server at all times, each replaced when it ends, and their lengths:

    energylens predict llama-3.1-8b --concurrency 64 --prompt-tokens 512 --output-tokens 256

or by the rate at which they arrive, at random or as a trace file has them:

    energylens predict llama-3.1-8b --rate 5 --prompt-tokens 512 --output-tokens 256
    energylens predict llama-3.1-8b --trace AzureLLMInferenceTrace_conv.csv

Energies are of all GPUs of the deployment together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from energylens_vllm.cli.deployment import add_deployment_arguments, add_model_argument, energy_model
from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy import OpenServing, ServingPrediction, StepPrediction

_LOAD = ("concurrency", "rate", "trace", "prompt_tokens", "output_tokens", "prefix_cache_hit_rate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_batch_arguments(parser)
    load = parser.add_argument_group("load", "instead of a batch")
    load.add_argument("--concurrency", type=float, metavar="N", help="requests in the server at all times")
    load.add_argument("--rate", type=float, metavar="N", help="instead: requests a second that arrive at random")
    load.add_argument(
        "--trace", metavar="FILE", help="instead: requests as they come, Azure's CSV or Mooncake's JSON lines"
    )
    load.add_argument("--prompt-tokens", type=float, metavar="TOKENS", help="mean length of their prompts")
    load.add_argument("--output-tokens", type=float, metavar="TOKENS", help="mean length of their outputs")
    load.add_argument(
        "--prefix-cache-hit-rate", type=float, metavar="SHARE", help="share of prompt tokens found in the prefix cache"
        " (default: that of chats, of a trace 0)",
    )  # fmt: skip
    add_deployment_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `requests` reads."""
    batch = parser.add_argument_group("batch")
    batch.add_argument("--decode", type=int, default=0, metavar="N", help="requests that decode one token each")
    batch.add_argument(
        "--context", type=int, default=1000, metavar="TOKENS", help="computed tokens of each of those (default: 1000)"
    )
    batch.add_argument(
        "--prefill", type=int, nargs="+", default=[], metavar="TOKENS", help="new prompts of so many tokens each"
    )
    batch.add_argument(
        "--requests", metavar="JSON", help="instead: a list of [new tokens, computed tokens], one of each request"
    )


def run(args: argparse.Namespace) -> int:
    if any(getattr(args, name) is not None for name in _LOAD):
        load: ServingPrediction | OpenServing
        if args.rate is None and args.trace is None:
            load = steady(args)
            text = load_as_text(load)
        else:
            load = open_load(args)
            text = open_load_as_text(load)
        print(json.dumps(asdict(load) | {"flags": sorted(load.flags)}) if args.json else text)
        return 0
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
    counts = [("--decode", args.decode, 0), ("--context", args.context, 0)]
    for flag, tokens, least in [*counts, *(("--prefill", tokens, 1) for tokens in args.prefill)]:
        if tokens < least:
            raise EnergyLensError(f"{flag}: {tokens} is too few; accepted: {least} or more")
    batch = [(1, args.context)] * args.decode + [(tokens, 0) for tokens in args.prefill]
    if not batch:
        raise EnergyLensError("batch: it is empty; give --decode, --prefill or --requests")
    return batch


def steady(args: argparse.Namespace) -> ServingPrediction:
    """The prediction of the closed queue that the flags describe."""
    _no_batch(args)
    _needs(args, "concurrency", "prompt_tokens", "output_tokens")
    return energy_model(args).serving(
        args.concurrency,
        args.prompt_tokens,
        args.output_tokens,
        prefix_cache_hit_rate=args.prefix_cache_hit_rate,
    )


def open_load(args: argparse.Namespace) -> OpenServing:
    """The prediction of the arrivals that the flags describe."""
    from energylens_vllm.energy.arrivals import read_trace, simulate

    _no_batch(args)
    if sum(given is not None for given in (args.concurrency, args.rate, args.trace)) > 1:
        raise EnergyLensError("load: give one of --concurrency, --rate and --trace")
    if args.trace is None:
        _needs(args, "rate", "prompt_tokens", "output_tokens")
        return energy_model(args).open_serving(
            args.rate, args.prompt_tokens, args.output_tokens, args.prefix_cache_hit_rate
        )
    if args.prompt_tokens is not None or args.output_tokens is not None:
        raise EnergyLensError("--trace: it has lengths of its own; leave --prompt-tokens and --output-tokens out")
    hit_rate = args.prefix_cache_hit_rate or 0.0
    if not 0 <= hit_rate < 1:
        raise EnergyLensError(f"--prefix-cache-hit-rate: {hit_rate!r}; accepted: 0 up to, not including, 1")
    return simulate(energy_model(args), read_trace(args.trace, hit_rate))


def _no_batch(args: argparse.Namespace) -> None:
    if args.decode or args.prefill or args.requests is not None:
        raise EnergyLensError("batch: give either one (--decode, --prefill, --requests) or a load, not both")


def _needs(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise EnergyLensError(f"--{name.replace('_', '-')}: it is missing; a load needs it")


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
    for new, computed in pairs:
        if new < 1 or computed < 0:
            raise EnergyLensError(f"{field}: [{new}, {computed}]; accepted: 1 or more new, 0 or more computed tokens")
    if not pairs:
        raise EnergyLensError(f"{field}: it is empty; accepted: [[new, computed], ...]")
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
        "waste_j": step.waste_j,
        "padding_j": step.padding_j,
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
                *(
                    [what, quantity(energy_j, "J"), ""]
                    for what, energy_j in (
                        ("waste: waiting for the hottest experts", step.waste_j),
                        ("waste: rows that fill experts' tiles up", step.padding_j),
                    )
                    if energy_j
                ),
            ],
        ),
        *(
            table(
                [f"energy by {what}", "", "share"],
                [
                    [name.replace("_", " "), quantity(energy_j, "J"), percent(energy_j / step.energy_j)]
                    for name, energy_j in split.items()
                    if energy_j
                ],
            )
            for what, split in (("component", step.components), ("phase", step.phases))
        ),
    ]
    return "\n\n".join([*lines, *_flags(step.flags)])


def load_as_text(load: ServingPrediction) -> str:
    low_j, high_j = (quantity(bound, "J") for bound in load.interval_j)
    rows = [
        ["energy per output token", quantity(load.energy_per_output_token_j, "J"), f"{low_j} .. {high_j}"],
        ["energy per request", quantity(load.energy_per_request_j, "J"), ""],
        ["of that for prefill", percent(load.prefill_energy_share), ""],
        ["power", quantity(load.power_w, "W"), ""],
        ["output tokens per second", f"{load.output_tokens_per_s:.4g}", ""],
        ["inter-token latency", quantity(load.inter_token_latency_s, "s"), ""],
        ["time to first token", quantity(load.time_to_first_token_s, "s"), ""],
    ]
    return "\n\n".join([table(["", "predicted", "90 % interval"], rows), *_flags(load.flags)])


def open_load_as_text(load: OpenServing) -> str:
    means = [
        ["requests per second", f"{load.rate_per_s:.4g}"],
        ["energy per output token", quantity(load.energy_per_output_token_j, "J")],
        ["energy per request", quantity(load.energy_per_request_j, "J")],
        ["power", quantity(load.power_w, "W")],
        ["while idle", quantity(load.idle_power_w, "W")],
        ["busy", percent(load.utilisation)],
        ["requests running", f"{load.running:.3g}"],
        ["requests that wait for a full batch", percent(load.waiting_share)],
    ]
    latencies = [
        [name, quantity(mean, "s"), *(quantity(value, "s") for value in by_percentile.values())]
        for name, mean, by_percentile in (
            ("time to first token", load.mean_ttft_s, load.ttft_s),
            ("time per output token", load.mean_tpot_s, load.tpot_s),
        )
    ]
    headers = ["", "mean", *(f"{percentile} %" for percentile in load.ttft_s)]
    return "\n\n".join([table(["", "predicted"], means), table(headers, latencies), *_flags(load.flags)])


def _flags(flags: frozenset[str]) -> list[str]:
    return ["flags: " + ", ".join(sorted(flags))] if flags else []
