"""Find the deployments of a model that serve a load with least energy.

    energylens explore --model llama-3.1-70b --gpu H100-SXM --max-gpus 8 --prompt 1000 --output 300 --tpot 50ms
    energylens explore --model qwen3-30b-a3b --gpu H100-SXM --gpu H200-SXM --prompt 1000 --output 300 --rate 20/s

Tries every degree of parallelism that vLLM accepts for the model, number formats, batch limits and, for a rate,
replicas; keeps those that fit the memory as vLLM divides it, and the latencies; prints the best ones, why, and the
command that starts each. How good the answers of a quantized model are is not judged: give --quantization none to leave
the weights as they are.

Without --rate a deployment is taken to be always full; with it, requests arrive at random and idle time counts.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from pathlib import Path

from energylens_vllm.architectures import hub_ids, is_cascade, known_models, load_config
from energylens_vllm.architectures import quantization as quantization_of
from energylens_vllm.cli.deployment import add_model_argument
from energylens_vllm.cli.table import quantity, table
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.explain import Choice, as_json, choices, dumps, measured_releases, row
from energylens_vllm.explore.search import Exploration, explore
from energylens_vllm.explore.space import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, VLLM_RELEASE, Load, Space

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0}
_PER_SECOND = {"/s": 1.0, "": 1.0, "/min": 1 / 60, "/h": 1 / 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser._negative_number_matcher = re.compile(r"^-\.?\d")  # "--rate -3/s" is a rate that is refused, not a flag
    add_model_argument(parser, "--model")
    parser.add_argument("--gpu", action="append", metavar="NAME", help="GPU to try; again for more (default: H200-SXM)")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--max-gpus", type=int, default=8, metavar="N", help="most GPUs in all (default: 8)")
    count.add_argument("--gpus", type=int, metavar="N", help="exactly so many GPUs in all")

    load = parser.add_argument_group("load")
    load.add_argument("--prompt", type=float, required=True, metavar="TOKENS", help="mean length of prompts")
    load.add_argument("--output", type=float, required=True, metavar="TOKENS", help="mean length of outputs")
    load.add_argument(
        "--ttft",
        metavar="TIME",
        help="longest mean time to the first token, such as 1s (default: any"
        ", but with a rate no more than 5 %% of requests wait in line)",
    )
    load.add_argument("--tpot", metavar="TIME", help="longest mean time per output token, such as 50ms")
    load.add_argument("--rate", metavar="RATE", help="requests that arrive, such as 20/s (default: as many as can)")
    load.add_argument(
        "--prefix-cache-hit-rate", type=float, default=0.0, metavar="SHARE",
        help="share of prompt tokens found in the prefix cache (default: 0)",
    )  # fmt: skip
    load.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="longest request (default: twice prompt and output, as far as the model's context goes)",
    )

    tried = parser.add_argument_group("what is tried", "under vLLM's own names; one value or several")
    for short, name, what in (
        ("-tp", "tensor", "GPUs that share each layer"),
        ("-pp", "pipeline", "groups of layers"),
        ("-dp", "data", "engines that share experts"),
    ):
        tried.add_argument(
            f"--{name}-parallel-size", short, type=int, nargs="+", metavar="N", help=f"{what} (default: all that can)"
        )
    tried.add_argument(
        "--prefill-context-parallel-size", "-pcp", type=int, nargs="+", default=[1], metavar="N",
        help="GPUs that split each step's tokens, of latent attention (default: 1)",
    )  # fmt: skip
    tried.add_argument(
        "--decode-context-parallel-size", "-dcp", type=int, nargs="+", metavar="N",
        help="of the tensor-parallel GPUs, that share out each KV cache (default: 1, and as many as can)",
    )  # fmt: skip
    tried.add_argument(
        "--dcp-comm-backend", nargs="+", default=["ag_rs"], metavar="NAME",
        help="how these put their outputs together, ag_rs or a2a (default: ag_rs)",
    )  # fmt: skip
    tried.add_argument(
        "--enable-expert-parallel", "-ep", action=argparse.BooleanOptionalAction,
        help="whole experts on each GPU (default: with and without)",
    )  # fmt: skip
    tried.add_argument(
        "--expert-routing", default="uniform", metavar="HOW",
        help="how tokens choose experts: uniform, zipf:ALPHA, collapsed, or a file of counts (default: uniform)",
    )  # fmt: skip
    tried.add_argument(
        "--enable-eplb", action="store_true",
        help="also experts placed by their load, with expert parallelism",
    )  # fmt: skip
    tried.add_argument(
        "--num-redundant-experts", type=int, nargs="+", metavar="N", help="copies to try with it (default: 0)"
    )
    tried.add_argument(
        "--all2all-backend", nargs="+", metavar="NAME",
        help="how tokens reach other ranks' experts, where data and expert parallelism go together "
        "(default: allgather_reducescatter; DeepEP's are deepep_low_latency and deepep_high_throughput)",
    )  # fmt: skip
    tried.add_argument(
        "--enable-dbo", action="store_true", help="also dual-batch overlap there, with DeepEP as vLLM has it"
    )
    tried.add_argument(
        "--quantization", "-q", nargs="+", metavar="METHOD",
        help='of the weights; "none" leaves them as they are (default: none and, where the GPU computes in it, fp8)',
    )  # fmt: skip
    tried.add_argument("--kv-cache-dtype", nargs="+", metavar="TYPE", help="of the KV cache (default: auto and fp8)")
    for flag, values in (("--max-num-seqs", MAX_NUM_SEQS), ("--max-num-batched-tokens", MAX_NUM_BATCHED_TOKENS)):
        span = f"{len(values)} from {values[0]} to {values[-1]}"
        tried.add_argument(flag, type=int, nargs="+", metavar="N", help=f"limits of a step (default: {span})")
    tried.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="memory vLLM takes (default: 0.9)"
    )
    tried.add_argument(
        "--vllm-release", default=VLLM_RELEASE, metavar="X.Y.Z", help=f"release to predict (default: {VLLM_RELEASE})"
    )
    tried.add_argument(
        "--power-limit-w", type=float, nargs="+", metavar="WATTS", help="power limits of each GPU (default: its own)"
    )

    parser.add_argument("--top", type=int, default=5, metavar="N", help="deployments to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--csv", metavar="FILE", help="write every deployment to a CSV file")
    parser.add_argument("--html", metavar="FILE", help="write a report with charts, one file that needs no network")


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise EnergyLensError(f"--top: {args.top}; accepted: 1 or more")
    if args.gpus is not None and args.gpus < 1:  # of `Space` it is `max_gpus`, which nobody wrote
        raise EnergyLensError(f"--gpus: {args.gpus}; accepted: 1 or more")
    started = time.perf_counter()
    found = explore(args.model, _load(args), _space(args), _progress(started))
    seconds = time.perf_counter() - started
    served, quantized = _served(args.model)
    best = choices(found, served, args.top, quantized)
    if args.csv:
        _write_csv(found, Path(args.csv))
    if args.html:
        from energylens_vllm.explore.report import report  # only here: the charts are a megabyte

        Path(args.html).write_text(report(found, best), encoding="utf-8")
    print(dumps(as_json(found, best)) if args.json else as_text(found, best, seconds))
    return 0


def _load(args: argparse.Namespace) -> Load:
    return Load(
        prompt_tokens=_positive("--prompt", args.prompt),
        output_tokens=_positive("--output", args.output),
        ttft_s=_measure("--ttft", args.ttft, _SECONDS, "a time such as 1s or 50ms"),
        tpot_s=_measure("--tpot", args.tpot, _SECONDS, "a time such as 1s or 50ms"),
        rate_per_s=_measure("--rate", args.rate, _PER_SECOND, "a rate such as 20/s or 90/min"),
        prefix_cache_hit_rate=args.prefix_cache_hit_rate,
        max_model_len=args.max_model_len,
    )


def _space(args: argparse.Namespace) -> Space:
    def several(name: str) -> tuple[int, ...] | None:
        values = getattr(args, name)
        return None if values is None else tuple(values)

    methods = None if args.quantization is None else tuple(None if q == "none" else q for q in args.quantization)
    return Space(
        gpus=tuple(args.gpu or ["H200-SXM"]),
        max_gpus=args.gpus if args.gpus is not None else args.max_gpus,
        exactly=args.gpus is not None,
        tensor_parallel_size=several("tensor_parallel_size"),
        pipeline_parallel_size=several("pipeline_parallel_size"),
        data_parallel_size=several("data_parallel_size"),
        prefill_context_parallel_size=tuple(args.prefill_context_parallel_size),
        decode_context_parallel_size=several("decode_context_parallel_size"),
        dcp_comm_backend=tuple(args.dcp_comm_backend),
        enable_expert_parallel=args.enable_expert_parallel,
        quantization=methods,
        kv_cache_dtype=None if args.kv_cache_dtype is None else tuple(args.kv_cache_dtype),
        max_num_seqs=several("max_num_seqs") or MAX_NUM_SEQS,
        max_num_batched_tokens=several("max_num_batched_tokens") or MAX_NUM_BATCHED_TOKENS,
        gpu_memory_utilization=args.gpu_memory_utilization,
        vllm_release=args.vllm_release,
        expert_routing=args.expert_routing,
        enable_eplb=args.enable_eplb,
        num_redundant_experts=several("num_redundant_experts") or (0,),
        all2all_backend=tuple(args.all2all_backend or Space.all2all_backend),
        enable_dbo=args.enable_dbo,
        power_limit_w=None if args.power_limit_w is None else tuple(args.power_limit_w),
    )


def _positive(flag: str, value: float) -> float:
    if not 1 <= value < 1e9:
        raise EnergyLensError(f"{flag}: {value:g}; accepted: 1 token or more")
    return value


def _measure(flag: str, text: str | None, units: dict[str, float], accepted: str) -> float | None:
    """A positive number with a unit, in seconds or per second."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(.*?)\s*", text)
    try:
        value = float(match[1]) * units[match[2]] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise EnergyLensError(f"{flag}: {text!r}; accepted: {accepted}, more than 0")
    return value


def _served(model: str) -> tuple[str, bool]:
    """What `vllm serve` calls the model, and whether its checkpoint is quantized."""
    if is_cascade(model):  # vLLM serves what it describes, under a name of its own
        return Path(model).stem, False
    quantized = quantization_of(load_config(model)) is not None
    if model in known_models():
        return hub_ids(model)[0], quantized
    return str(Path(model).parent) if model.endswith(".json") else model, quantized


def _progress(started: float):  # type: ignore[no-untyped-def]
    """A bar on a terminal, once it has taken a second."""
    if not sys.stderr.isatty():
        return None
    shown = False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if shown or time.perf_counter() - started > 1.0:
            shown = True
            filled = 30 * done // max(total, 1)
            end = "\n" if done == total else ""
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r[{bar}] {done}/{total} engines", end=end, file=sys.stderr, flush=True)

    return show


def _write_csv(found: Exploration, path: Path) -> None:
    rows = [row(found, index) for index in range(len(found.deployments))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_text(found: Exploration, best: list[Choice], seconds: float) -> str:
    engines, count = len(found.engines), len(found.deployments)
    lines = [
        f"{found.name}: {count} deployments of {engines} engines fit, {int(found.feasible.sum())} carry the load, "
        f"{int(found.front.sum())} are on the Pareto front of energy, latency and GPUs ({seconds:.1f} s)",
        table(
            ["", "deployment", "replicas", "running", "J/token", "90 % interval", "power", "tokens/s/GPU", "TPOT",
             "TTFT"],
            [
                [
                    str(number),
                    choice.title,
                    str(choice.replicas),
                    f"{choice.running:.3g}",
                    f"{choice.token_j:.3g}",
                    "{:.3g} .. {:.3g}".format(*choice.interval_j),
                    quantity(choice.power_w, "W"),
                    f"{choice.tokens_per_s_per_gpu:.4g}",
                    quantity(choice.tpot_s, "s"),
                    quantity(choice.ttft_s, "s"),
                ]
                for number, choice in enumerate(best, 1)
            ],
            left=2,
        ),
    ]  # fmt: skip
    lines += [
        f"{number}. {choice.why}\n   {choice.command}"
        + (f"   # on each of {choice.replicas} replicas" if choice.replicas > 1 else "")
        for number, choice in enumerate(best, 1)
    ]
    measured = " and ".join(f"{release} on {gpu}" for gpu, release in measured_releases(found).items())
    lines.append(f"for vLLM {found.space.vllm_release}, from measurements of {measured}")
    if found.flags:
        lines.append("flags: " + ", ".join(sorted(found.flags)))
    return "\n\n".join(lines)
