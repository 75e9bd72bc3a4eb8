"""How fast steps and deployments are predicted, beside AIConfigurator and GenZ on the same configurations.

    python benchmarks/explore_speed.py
    python benchmarks/explore_speed.py --peer VENV/bin/aiconfigurator --genz OTHER_VENV/bin/python

Each peer has an environment of its own (pip install aiconfigurator; pip install genz-llm). AIConfigurator is run once
as its users run it, on the same model, GPUs, lengths and bounds; its own clock is taken, which leaves out its start.
Its database is of vLLM 0.24 on H100. GenZ-LLM-Analyzer is called for decode steps of one context, ideal
as it comes (`system_eff` 1), and timed without its start. Everything runs on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.energy.batch import steps_from_arrays
from energylens_vllm.explore import Exploration, Load, Space, explore
from energylens_vllm.explore.explain import choices
from energylens_vllm.explore.steady import steady

MODEL, HUB_ID, GPU, SYSTEM = "llama-3.1-70b", "meta-llama/Meta-Llama-3.1-70B", "H100-SXM", "h100_sxm"
LOAD = Load(prompt_tokens=1000, output_tokens=300, ttft_s=1.0, tpot_s=0.05)
MODELS = (
    ("llama-3.1-8b", Deployment(gpu="H200-SXM")),
    ("llama-3.1-70b", Deployment(gpu=GPU, tensor_parallel_size=8)),
    ("llama-3.1-70b", Deployment(gpu=GPU, tensor_parallel_size=2, pipeline_parallel_size=4)),
    ("qwen3-30b-a3b", Deployment(gpu="H200-SXM", tensor_parallel_size=2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="PROGRAM", help="the aiconfigurator program")
    parser.add_argument("--genz", type=Path, metavar="PYTHON", help="a Python that has genz-llm")
    parser.add_argument("--steps", type=int, default=500_000, metavar="N", help="steps of a prediction")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print("Steps predicted a second, best of 5 (wall clock), and by the process's own time")
    for name, deployment in MODELS:
        wall, own = steps_per_second(EnergyModel(name, deployment), args.steps)
        tp, pp = deployment.tensor_parallel_size, deployment.pipeline_parallel_size
        print(f"  {name:15} {deployment.gpu:9} TP{tp} PP{pp}  {wall / 1e6:5.2f} M/s  {own / 1e6:5.2f} M/s")

    space = Space(gpus=(GPU,), max_gpus=8)
    found, seconds, own = timed(space)
    print(f"\nExploration of {MODEL} on up to 8 {GPU}, best of 5 (wall clock), and by the process's own time")
    print(f"  everything: {len(found.deployments)} deployments, {seconds:.2f} s, {own:.2f} s")
    if args.genz is not None:
        compare_genz(args.genz)
    if args.peer is None:
        return
    same = replace(space, quantization=(None,), kv_cache_dtype=("auto",), tensor_parallel_size=(2, 4, 8),
                   pipeline_parallel_size=(1,))  # fmt: skip
    found, seconds, own = timed(same)
    print(f"  16 bits, TP 2, 4 and 8: {len(found.deployments)} deployments, {seconds:.2f} s, {own:.2f} s")
    compare(found, seconds, args.peer)


def steps_per_second(model: EnergyModel, count: int) -> tuple[float, float]:
    """Of random steps: 1 to 511 decodes at contexts of 1,000, and none to two prompts of 500 tokens beside them."""
    rng = np.random.default_rng(0)
    decodes, prompts = rng.integers(1, 512, 4096), rng.integers(0, 3, 4096)
    sizes = decodes + prompts
    new = np.concatenate([np.repeat([1, 500], pair) for pair in zip(decodes, prompts, strict=True)])
    computed = np.concatenate([np.repeat([1000, 0], pair) for pair in zip(decodes, prompts, strict=True)])
    some = steps_from_arrays(new, computed, np.concatenate([[0], np.cumsum(sizes)]), model.masks)
    steps = some[rng.integers(0, 4096, count)]
    model.predict(some)  # compiles
    wall, own = [], []
    for _ in range(5):
        start = time.perf_counter(), time.process_time()
        model.predict(steps)
        wall.append(time.perf_counter() - start[0])
        own.append(time.process_time() - start[1])
    return count / min(wall), count / min(own)


def timed(space: Space) -> tuple[Exploration, float, float]:
    """The exploration, and its seconds by the clock on the wall and the process's own, after a first one."""
    found = explore(MODEL, LOAD, space)
    wall, own = [], []
    for _ in range(5):
        start = time.perf_counter(), time.process_time()
        found = explore(MODEL, LOAD, space)
        wall.append(time.perf_counter() - start[0])
        own.append(time.process_time() - start[1])
    return found, min(wall), min(own)


def compare(found: Exploration, seconds: float, program: Path) -> None:
    count, peer_seconds, rows = peer(program)
    each, peer_each = seconds / len(found.deployments), peer_seconds / count
    print(f"\nAIConfigurator: {count} configurations, {peer_seconds:.2f} s by its own clock")
    print(f"  a configuration takes {1e3 * peer_each:.3g} ms there, {1e3 * each:.3g} ms here: {peer_each / each:.0f} x")

    print("\nThe same configurations (16 bits, prompts 1,000, outputs 300), rows of its Pareto front")
    print("                    TPOT ms          TTFT ms      tokens/s/GPU     J/token")
    print("  TP  batch     there   here     there   here     there   here        here")
    ratios = []
    models: dict[int, EnergyModel] = {}
    for row in sorted(rows, key=lambda row: (int(row["tp"]), int(row["bs"]))):
        tp, batch = int(row["tp"]), int(row["bs"])
        model = models.setdefault(tp, EnergyModel(MODEL, Deployment(gpu=GPU, tensor_parallel_size=tp)))
        here = steady(model, [batch], [8192], LOAD.prompt_tokens, LOAD.output_tokens)
        theirs = [float(row["tpot"]), float(row["ttft"]), float(row["tokens/s/gpu"])]
        first_s = here.ttft_s[0] + 1.5 * here.tpot_s[0]  # the rest of the step under way, and the next one
        ours = [here.tpot_s[0] * 1e3, first_s * 1e3, here.tokens_per_s[0] / tp]
        ratios.append(np.log([a / b for a, b in zip(ours, theirs, strict=True)]))
        cells = [f"{a:7.1f} {b:7.1f}  " for a, b in zip(theirs, ours, strict=True)]
        print(f"  {tp:2} {batch:6}  {''.join(cells)} {here.token_j[0]:8.3f}")
    for name, values in zip(("TPOT", "TTFT", "tokens/s/GPU"), np.array(ratios).T, strict=True):
        factor, spread = np.exp(values.mean()), np.exp(values.std())
        most = int(np.argmax(np.abs(values)))
        print(f"  {name}: here / there {factor:.2f} on average, times or over {spread:.2f}; furthest apart "
              f"{np.exp(values[most]):.2f}")  # fmt: skip
    best = choices(found, HUB_ID, 1)[0]
    top = max((r for r in rows if float(r["tpot"]) <= 50 and float(r["ttft"]) <= 1000),
              key=lambda r: float(r["tokens/s/gpu"]))  # fmt: skip
    print(f"  best there (tokens/s/GPU): TP{top['tp']} batch {top['bs']}; best here (J/token): {best.title}, batch "
          f"{best.running:.0f}")  # fmt: skip
    power = {float(row["power_w"]) for row in rows}
    print("\nFeatures                                      there    here")
    for what, there, us in (
        ("energy and power of each configuration", "no" if power == {0.0} else "yes", "yes"),
        ("interval of each prediction", "no", "yes"),
        ("arrivals at a rate: idle time, waiting", "no", "yes"),
        ("models of one's own (einsums), fusion", "no", "yes"),
        ("measured operation tables at query time", "yes", "fitted"),
        ("TensorRT-LLM and SGLang", "yes", "no"),
        ("disaggregated prefill and decode", "yes", "no"),
        ("ready-made Kubernetes files", "yes", "no"),
    ):
        print(f"  {what:42}  {there:>6}  {us:>6}")


GENZ = """
import json, sys, time
from GenZ import decode_moddeling
def latency_ms(tp, batch):
    return float(decode_moddeling(model="meta-llama/Llama-3.1-70B", batch_size=batch, input_tokens=int(sys.argv[2]),
        output_tokens=0, Bb=1, system_name="H100_GPU", system_eff=1, bits="bf16", tensor_parallel=tp)["Latency"])
pairs = json.loads(sys.argv[1])
latency_ms(*pairs[0])
start = time.process_time()
found = [latency_ms(*pair) for pair in pairs]
print("RESULT", json.dumps([time.process_time() - start, found]))
"""


def compare_genz(program: Path, context: int = 1150) -> None:
    """Decode steps in 16 bits: how long each takes to predict, and what is predicted."""
    pairs = [(tp, batch) for tp in (4, 8) for batch in (1, 16, 64, 144)]
    done = subprocess.run(
        [program, "-c", GENZ, json.dumps(pairs), str(context)], capture_output=True, text=True, check=True
    )
    seconds, theirs = json.loads(done.stdout.rpartition("RESULT")[2])
    models = {tp: EnergyModel(MODEL, Deployment(gpu=GPU, tensor_parallel_size=tp)) for tp in (4, 8)}
    ours = [models[tp].step([(1, context)] * batch) for tp, batch in pairs]
    start = time.process_time()
    for tp, batch in pairs:
        models[tp].step([(1, context)] * batch)
    own = time.process_time() - start
    print(f"\nGenZ-LLM-Analyzer: decode steps of {MODEL}, contexts of {context:,}; CPU time of its process and ours")
    there_ms, here_ms = 1e3 * seconds / len(pairs), 1e3 * own / len(pairs)
    print(f"  a step takes {there_ms:.3g} ms there, {here_ms:.3g} ms here, one by one: {seconds / own:.0f} x")
    print("  TP  batch    ms there   here    J here (none there)")
    for (tp, batch), latency, step in zip(pairs, theirs, ours, strict=True):
        print(f"  {tp:2} {batch:6}    {latency:7.2f} {step.time_s * 1e3:7.2f}    {step.energy_j:8.2f}")
    ratios = np.log([step.time_s * 1e3 / latency for latency, step in zip(theirs, ours, strict=True)])
    factor, spread = np.exp(ratios.mean()), np.exp(ratios.std())
    print(
        f"  here / there {factor:.2f} on average, times or over {spread:.2f}: efficiencies and overheads are the user's"
    )


def peer(program: Path) -> tuple[int, float, list[dict[str, str]]]:
    """Configurations and seconds that it reports, and the rows of its Pareto front."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            program, "cli", "default", "--model-path", HUB_ID, "--total-gpus", "8", "--system", SYSTEM, "--backend",
            "vllm", "--serving-mode", "agg", "--isl", f"{LOAD.prompt_tokens:g}", "--osl", f"{LOAD.output_tokens:g}",
            "--ttft", "1000", "--tpot", "50", "--no-color", "--save-dir", folder,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        log = done.stdout + done.stderr
        count = re.search(r"completed with (\d+) results", log)
        seconds = re.search(r"All experiments completed in ([\d.]+) seconds", log)
        assert count is not None
        assert seconds is not None
        (table,) = Path(folder).rglob("pareto.csv")
        with table.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["gemm"] == "bfloat16"]
    return int(count[1]), float(seconds[1]), rows


if __name__ == "__main__":
    main()
