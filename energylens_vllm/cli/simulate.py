"""Try routing policies on a trace: joules, latencies and attainment of a fleet, simulated step by step.

    energylens simulate --model llama-3.1-8b --fleet 8xH200-SXM --trace AzureLLMInferenceTrace_conv.csv --load 4
    energylens simulate --model llama-3.1-8b --fleet 4xH200-SXM,2xA100-SXM-80GB:2,2xL40S --trace mooncake.jsonl

A fleet is COUNTxGPU, or COUNTxGPU:TP for replicas of several GPUs, separated by commas. The trace is CSV with
TIMESTAMP, ContextTokens and GeneratedTokens (Azure's; --columns names others), or Mooncake's JSON lines with prefix
blocks. The step model is the truth, with noise of the size it states for itself when --seed is given; --belief 1.2
tells the energy policy that steps take 1.2 times the time and joules they do, --belief 0.8,1.2 each replica in turn.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from energylens_vllm.cli.deployment import add_model_argument
from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.memory import Memory
from energylens_vllm.routing.policies import POLICIES, policy
from energylens_vllm.routing.simulate import Outcome, simulate
from energylens_vllm.routing.table import StepTable
from energylens_vllm.routing.trace import COLUMNS, at_load, read_arrivals

#: Tokens of a request over which its whole blocks of cache, and layers that keep a window only, are averaged.
TYPICAL_TOKENS = 4096.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, "--model")
    parser.add_argument("--fleet", required=True, metavar="LIST", help="replicas, such as 4xH200-SXM,2xA100-SXM-80GB:2")
    parser.add_argument("--trace", required=True, metavar="FILE", help="requests: CSV, or Mooncake's .jsonl")
    parser.add_argument(
        "--columns", default=",".join(COLUMNS), metavar="A,B,C",
        help=f"of the CSV: time, prompt and output tokens (default: {','.join(COLUMNS)})",
    )  # fmt: skip
    parser.add_argument("--load", type=float, default=1.0, metavar="X", help="times as fast (default: 1)")
    parser.add_argument("--requests", type=int, metavar="N", help="the first N only")
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help=f"again for more (default: all: {', '.join(POLICIES)})"
    )
    parser.add_argument("--ttft", type=float, default=1.0, metavar="S", help="target to the first token (default: 1)")
    parser.add_argument("--tpot", type=float, default=0.05, metavar="S", help="target a token (default: 0.05)")
    parser.add_argument("--belief", default="1", metavar="X[,X]", help="what the policy believes (default: the truth)")
    parser.add_argument("--seed", type=int, metavar="N", help="draw noise (default: none)")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="of each replica (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    names = list(args.policy or POLICIES)
    for name in names:
        policy(name)  # refused before anything runs
    columns = tuple(args.columns.split(","))
    if len(columns) != 3:
        raise EnergyLensError(f"columns: {args.columns!r}; accepted: three names, separated by commas")
    arrivals = at_load(read_arrivals(args.trace, (columns[0], columns[1], columns[2])), args.load)
    if args.requests is not None:
        if args.requests < 1:
            raise EnergyLensError(f"requests: {args.requests}; accepted: 1 or more")
        arrivals = arrivals[: args.requests]
    if not (args.ttft > 0 and args.tpot > 0):
        raise EnergyLensError(f"ttft, tpot: {args.ttft:g}, {args.tpot:g}; accepted: more than 0 seconds")
    fleet = fleet_tables(args.model, args.fleet, args.max_num_seqs)
    beliefs = believed(fleet, args.belief)
    found = [simulate(name, fleet, arrivals, args.ttft, args.tpot, beliefs, args.seed) for name in names]
    print(json.dumps([asdict(outcome) for outcome in found]) if args.json else as_text(found))
    return 0


def fleet_tables(model: str, fleet: str, max_num_seqs: int) -> list[StepTable]:
    """Step tables of a fleet given as text; equal replicas share one. Raises EnergyLensError."""
    tables: list[StepTable] = []
    for entry in fleet.split(","):
        match = re.fullmatch(r"(?:(\d+)x)?([^:]+)(?::(\d+))?", entry.strip())
        if match is None or match[1] == "0":
            raise EnergyLensError(f"fleet: {entry!r}; accepted: COUNTxGPU or COUNTxGPU:TP, such as 4xH200-SXM:2")
        deployment = Deployment(gpu=match[2], tensor_parallel_size=int(match[3] or 1), max_num_seqs=max_num_seqs)
        tables += [replica_table(EnergyModel(model, deployment))] * int(match[1] or 1)
    return tables


def replica_table(model: EnergyModel, utilization: float = 0.92) -> StepTable:
    """The table of one engine, with the KV cache that vLLM would find room for. Raises EnergyLensError if none."""
    deployment = model.deployment
    memory = Memory.of(model, utilization)
    tokens = min(
        float(memory.cache_bytes(stage, deployment.max_num_batched_tokens, deployment.max_num_seqs))
        / (float(stage.request_bytes(TYPICAL_TOKENS)) / TYPICAL_TOKENS)
        for stage in memory.stages
    )
    if tokens < 16:
        raise EnergyLensError(f"fleet: the model does not fit {deployment.num_gpus} x {deployment.gpu}")
    return StepTable.compile(model, tokens)


def believed(fleet: list[StepTable], factors: str) -> list[StepTable]:
    """What a policy is told: tables wrong by factors that replicas take in turn. Raises EnergyLensError."""
    try:
        values = [float(each) for each in factors.split(",")]
    except ValueError:
        values = [0.0]
    if min(values) <= 0:
        raise EnergyLensError(f"belief: {factors!r}; accepted: numbers above 0, separated by commas")
    made: dict[tuple[int, float], StepTable] = {}
    for i, each in enumerate(fleet):
        factor = values[i % len(values)]
        if (id(each), factor) not in made:
            made[id(each), factor] = each if factor == 1 else each.scaled(factor, factor)
    return [made[id(each), values[i % len(values)]] for i, each in enumerate(fleet)]


def as_text(outcomes: list[Outcome]) -> str:
    headers = ["policy", "J/token", "attainment", "TTFT p50", "p99", "TPOT p50", "p99", "power", "in use", "preempted"]
    return table(
        headers,
        [
            [
                each.policy,
                f"{each.energy_per_output_token_j:.4f}",
                percent(each.attainment),
                quantity(each.ttft_s[0], "s"),
                quantity(each.ttft_s[1], "s"),
                quantity(each.tpot_s[0], "s"),
                quantity(each.tpot_s[1], "s"),
                quantity(each.energy_j / each.duration_s, "W"),
                percent(sum(each.used) / len(each.used)),
                str(each.preemptions),
            ]
            for each in outcomes
        ],
    )
