"""Open arrivals in closed form against a simulation of every step, with the same step model. Takes three minutes.

    python benchmarks/open_arrivals.py

Prompts and outputs are lognormal (medians 500 and 150 tokens, sigma 0.8 and 0.7), arrivals Poisson; the closed form is
given the rate that came out. Differences are of the closed form, relative to the simulation.
"""

from __future__ import annotations

import time

import numpy as np

from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.arrivals import poisson_trace, simulate

CASES = (
    ("llama-3.1-8b", Deployment(gpu="H200-SXM"), (0.2, 2.0, 10.0, 20.0)),
    ("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=8), (6.0,)),
    ("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=4), (2.0, 4.0)),
    (
        "qwen3-30b-a3b",
        Deployment(gpu="H200-SXM", data_parallel_size=4, enable_expert_parallel=True),
        (0.5, 2.0, 10.0),
    ),
)


def main() -> None:
    random = np.random.default_rng(1)
    prompts = np.clip(random.lognormal(np.log(500), 0.8, 2000), 8, 6000).round()
    outputs = np.clip(random.lognormal(np.log(150), 0.7, 2000), 2, 1000).round()
    lines = []
    for name, deployment, rates in CASES:
        model = EnergyModel(name, deployment)
        for rate in rates:
            trace = poisson_trace(rate, prompts, outputs, int(np.clip(150 * rate, 600, 3000)))
            start = time.perf_counter()
            simulated = simulate(model, trace)
            middle = time.perf_counter()
            found = model.open_serving(simulated.rate_per_s, trace.prompt_tokens, trace.output_tokens, 0.0)
            seconds = time.perf_counter() - middle, middle - start
            pairs = [
                (found.power_w, simulated.power_w), (found.mean_tpot_s, simulated.mean_tpot_s),
                (found.tpot_s[99], simulated.tpot_s[99]), (found.mean_ttft_s, simulated.mean_ttft_s),
                (found.ttft_s[50], simulated.ttft_s[50]), (found.ttft_s[99], simulated.ttft_s[99]),
            ]  # fmt: skip
            lines.append([
                name, f"{deployment.num_gpus} x {deployment.gpu}", str(deployment.max_num_seqs), f"{rate:g}/s",
                percent(simulated.utilisation), percent(found.utilisation - simulated.utilisation, signed=True),
                *(percent(a / b - 1, signed=True) for a, b in pairs), *(quantity(s, "s") for s in seconds),
            ])  # fmt: skip
    headers = ["model", "GPUs", "max_num_seqs", "rate", "utilised", "diff.", "power", "TPOT mean", "99 %", "TTFT mean",
               "50 %", "99 %", "closed form", "simulated"]  # fmt: skip
    print(table(headers, lines, left=2))


if __name__ == "__main__":
    main()
