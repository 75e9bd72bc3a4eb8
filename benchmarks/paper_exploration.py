"""The exploration of the EnergyLens paper (Song et al., arXiv 2605.14249) on 8 A100, and its claims beside ours.

    python benchmarks/paper_exploration.py

Llama-3-70B under tensor parallelism of 2, 4 and 8; Qwen3-30B-A3B under 2, 4 and 8, and with experts on 2 and 4 GPUs of
their own (attention tensor-parallel, or data-parallel); batches of 1 to 64, prompts of 256 to 8,192 tokens; Megatron's
overlap in 4 stages with 1, 4 and 16 SMs for communication. Steps of one phase each: a prefill takes all prompts of the
batch at once, a decode has one token of each, with the prompt as context. What does not fit into 80 GB is left out.
docs/paper.md tells where we differ from the paper and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from energylens_vllm.cli.table import percent, table
from energylens_vllm.einsum import Cascade, fuse, unfuse
from energylens_vllm.energy import Deployment, EnergyModel, Overlap
from energylens_vllm.energy.batch import Array, Steps, steps_from_requests
from energylens_vllm.explore.memory import Memory
from energylens_vllm.explore.pareto import pareto_front

GPU = "A100-SXM-80GB"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SMS = (1, 4, 16)
#: SM counts beside the paper's, to see how fine the choice is.
ALL_SMS = (1, 2, 4, 8, 12, 16, 24, 32)
PHASES = ("prefill", "decode")
SWIGLU = "SwiGLU in the GEMM before it"
APART = "vLLM's kernels against every einsum alone"


@dataclass(frozen=True)
class Sharding:
    """A way of splitting a model."""

    name: str
    model: str
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False

    @property
    def deployment(self) -> Deployment:
        return Deployment(
            gpu=GPU, tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size,
            enable_expert_parallel=self.enable_expert_parallel, max_num_batched_tokens=BATCHES[-1] * LENGTHS[-1],
        )  # fmt: skip


SHARDINGS = (
    *(Sharding(f"TP {n}", "llama-3-70b", n) for n in (2, 4, 8)),
    *(Sharding(f"TP {n}", "qwen3-30b-a3b", n) for n in (2, 4, 8)),
    *(Sharding(f"EP {n}, attention TP", "qwen3-30b-a3b", n, 1, True) for n in (2, 4)),
    *(Sharding(f"EP {n}, attention DP", "qwen3-30b-a3b", 1, n, True) for n in (2, 4)),
)


@dataclass(frozen=True)
class Grid:
    """One phase of one sharding over all batches and lengths that fit: arrays over those, per token of the phase."""

    sharding: Sharding
    phase: str
    batch: Array
    length: Array
    token_j: Array
    step_s: Array
    communication_s: Array  #: part of `step_s`
    communication_j: Array  #: part of `token_j`, static power during communication included


def grid(sharding: Sharding, phase: str, overlap: Overlap | None = None, cascade: Cascade | None = None) -> Grid:
    model = EnergyModel(cascade or sharding.model, sharding.deployment, overlap=overlap)
    ranks = sharding.data_parallel_size
    cells = [(n, c) for n, c in itertools.product(BATCHES, LENGTHS) if n >= ranks and fits(sharding, n // ranks, c)]
    batch, length = (np.array(column, dtype=np.float64) for column in zip(*cells, strict=True))
    steps = [
        steps_from_requests([(c, 0) if phase == "prefill" else (1, c)] * (n // ranks), model.masks) for n, c in cells
    ]
    found = model.predict(concatenate(steps))
    tokens = batch / ranks * (length if phase == "prefill" else 1.0)
    exchanged = found.components["communication"] + (
        (found.components["static"] + found.components["host_gap"]) * found.communication_s / found.time_s
    )
    return Grid(
        sharding, phase, batch, length, found.energy_j / tokens, found.time_s, found.communication_s,
        exchanged / tokens,
    )  # fmt: skip


def fits(sharding: Sharding, batch: int, length: int) -> bool:
    """Whether weights, cache and a chunk of 8,192 tokens fit."""
    memory = MEMORY[sharding]
    return all(
        float(memory.cache_bytes(stage, min(batch * length, 8192), batch)) >= batch * float(stage.request_bytes(length))
        for stage in memory.stages
    )


MEMORY = {each: Memory.of(EnergyModel(each.model, each.deployment), 0.95) for each in SHARDINGS}


def concatenate(steps: list[Steps]) -> Steps:
    """Single steps as one array of steps."""

    def join(parts: Iterator[Array]) -> Array:
        return np.concatenate(list(parts))

    attention = [
        type(steps[0].attention[i])(
            *(
                join(getattr(step.attention[i], name) for step in steps)
                for name in ("decode_pairs", "prefill_pairs", "decode_keys", "prefill_keys")
            )
        )
        for i in range(len(steps[0].attention))
    ]
    fields = ("tokens", "decode_tokens", "sequences", "decode_sequences")
    return Steps(*(join(getattr(step, name) for step in steps) for name in fields), tuple(attention))


def spread(values: Array) -> float:
    return float(values.max() / values.min())


def explore() -> list[list[str]]:
    """Joules a token over the whole grid; returns the lines on spreads."""
    lines, summary = [], []
    for phase in PHASES:
        for model in dict.fromkeys(each.model for each in SHARDINGS):
            grids = [grid(each, phase) for each in SHARDINGS if each.model == model]
            for g in grids:
                lines.append([
                    phase, model, g.sharding.name, str(len(g.batch)), f"{g.token_j.min():.3g}",
                    f"{g.token_j.max():.3g}", f"{spread(g.token_j):.2f}x",
                    percent(float(np.median(g.communication_s / g.step_s))),
                    percent(float(np.median(g.communication_j / g.token_j))),
                ])  # fmt: skip
            everything = np.concatenate([g.token_j for g in grids])
            at_once = same_load(grids)
            summary.append([
                phase, model, f"{spread(everything):.2f}x", f"{max(at_once):.2f}x", f"{float(np.median(at_once)):.2f}x"
            ])  # fmt: skip
    headers = ["phase", "model", "sharding", "cells", "min J/token", "max", "spread", "comm. time", "comm. energy"]
    print("One step of each batch and length (communication: medians)\n" + table(headers, lines, left=3) + "\n")
    return summary


def same_load(grids: list[Grid]) -> list[float]:
    """Spreads over shardings, at each batch and length that all hold."""
    cells: dict[tuple[float, float], list[float]] = {}
    for g in grids:
        for n, c, joules in zip(g.batch, g.length, g.token_j, strict=True):
            cells.setdefault((n, c), []).append(joules)
    return [max(joules) / min(joules) for joules in cells.values() if len(joules) == len(grids)]


def overlap() -> None:
    """Time and energy relative to none, and which SM counts are on the front."""
    lines = []
    for sharding in SHARDINGS:
        if sharding.data_parallel_size > 1:
            continue  # each rank's batch is another's: the same picture at smaller steps
        for phase in PHASES:
            plain = grid(sharding, phase)
            found = {sms: grid(sharding, phase, Overlap(4, sms)) for sms in ALL_SMS}
            joules = np.stack([plain.token_j, *(found[sms].token_j for sms in ALL_SMS)])
            seconds = np.stack([plain.step_s, *(found[sms].step_s for sms in ALL_SMS)])
            best = [("none", *map(str, ALL_SMS))[i] for i in joules.argmin(axis=0)]
            choices = ", ".join(f"{name}: {best.count(name)}" for name in dict.fromkeys(best))
            sizes = [pareto_front(j, s, np.zeros(len(j))).sum() for j, s in zip(joules.T, seconds.T, strict=True)]
            lines.append([
                sharding.model, sharding.name, phase,
                *(f"{np.median(found[n].step_s / plain.step_s):.2f} / {np.median(found[n].token_j / plain.token_j):.2f}"
                  for n in SMS),
                f"{np.mean(sizes):.1f}", choices,
            ])  # fmt: skip
    headers = ["model", "sharding", "phase", *(f"{n} SMs" for n in SMS), "front", "least energy with"]
    print(
        "Overlap in 4 stages: time / energy relative to none (medians over batches and lengths); mean choices on\n"
        f"the front, of none and {', '.join(map(str, ALL_SMS))} SMs; in how many cells each takes the least energy\n"
        + table(headers, lines, left=3)
        + "\n"
    )


def fusion() -> dict[str, list[float]]:
    """Savings of Llama-3-70B's fusions at TP 8, by phase: of what runs over every einsum alone, and of SwiGLU."""
    base = SHARDINGS[2]
    cascade = EnergyModel(base.model, base.deployment).cascade
    others = {
        APART: (unfuse(cascade), cascade),
        SWIGLU: (cascade, fuse(cascade, {"layer.swiglu": ["gate_up", "act"]})),
        "the whole MLP in one kernel": (cascade, fuse(cascade, {"layer.mlp": ["gate_up", "act", "down"]})),
    }
    saved: dict[str, list[float]] = {}
    for name, (before, after) in others.items():
        for phase in PHASES:
            old, new = (grid(base, phase, cascade=each).token_j for each in (before, after))
            saved.setdefault(name, []).append(float(np.mean(1 - new / old)))
    return saved


def main() -> None:
    summary = explore()
    overlap()
    saved = fusion()
    headers = ["phase", "model", "spread over all", "most over shardings at one load", "median"]
    print("Spreads of joules a token\n" + table(headers, summary, left=2) + "\n")
    print("Fusions of Llama-3-70B at TP 8, mean saving\n" + table(
        ["fusion", *PHASES], [[name, *(percent(value) for value in both)] for name, both in saved.items()]
    ) + "\n")  # fmt: skip
    shares = {phase: grid(SHARDINGS[2], phase) for phase in PHASES}
    by_phase = {row[0]: row for row in summary if row[1] == "llama-3-70b"}
    large = {p: f"{(g.communication_s / g.step_s).max():.0%} / {(g.communication_j / g.token_j).max():.0%}"
             for p, g in shares.items()}  # fmt: skip
    medians = {
        p: f"{np.median(g.communication_s / g.step_s):.0%} / {np.median(g.communication_j / g.token_j):.0%}"
        for p, g in shares.items()
    }

    def both(phase: int) -> str:
        return " / ".join(percent(saved[name][phase]) for name in (APART, SWIGLU))

    print(
        "The paper's claims, and the same here\n"
        + table(
            ["claim", "paper", "here"],
            [
                ["energy per token, prefill: largest over smallest (70B)", "1.47x", by_phase["prefill"][2]],
                ["energy per token, decode: largest over smallest (70B)", "52.9x", by_phase["decode"][2]],
                ["all-reduce of 70B at TP 8, prefill: time / energy, median", "23 %", medians["prefill"]],
                ["all-reduce of 70B at TP 8, decode: time / energy, median", "23 %", medians["decode"]],
                ["  most of any batch and length, prefill", "", large["prefill"]],
                ["  most of any batch and length, decode", "", large["decode"]],
                ["fusion, prefill: all of vLLM's / SwiGLU's alone", "4.37 %", both(0)],
                ["fusion, decode: all of vLLM's / SwiGLU's alone", "8.18 %", both(1)],
                ["Pareto front recovered (benchmarks/pareto.py, serving runs)", "69 %", "see there"],
            ],
        )
    )


if __name__ == "__main__":
    main()
