"""The simulator against the mixed runs that were recorded on one H200: energy, time to first token, time per token.

    python benchmarks/routing_validation.py [tests/data/h200_vllm]

Requests are recovered from the recorded steps: one begins where zero of its tokens are computed, and the step after
holds it in the same order with as many tokens as it then had. It is taken to arrive half way
between that step's scheduling and the one before, as arrivals were not recorded. Simulated requests have the same
arrivals and lengths; energies cover the time from the first arrival to the last step's end, measured by the counter
with idle time included on both sides.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from energylens_vllm.calibrate.recording import IDLE_GAP_S, Recording, load
from energylens_vllm.cli.simulate import replica_table
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.routing.simulate import simulate
from energylens_vllm.routing.table import StepTable
from energylens_vllm.routing.trace import Arrival

MODELS = {"llama8b": "llama-3.1-8b", "qwen30b": "qwen3-30b-a3b"}


@dataclass
class Seen:
    """A request as it was recorded."""

    at_s: float
    prompt: int = 0
    first_s: float = float("nan")
    end_s: float = float("nan")
    tokens: int = 0
    context: int = 0
    new: int = 0


@dataclass(frozen=True)
class Comparison:
    """Relative errors of what is simulated."""

    phase: str
    requests: int
    energy: float
    ttft: float
    tpot: float


def recovered(recording: Recording, phase: str) -> list[Seen]:
    """Requests of a phase, from its first step on."""
    steps = np.flatnonzero(recording.phase == recording.phases.index(phase))
    live: list[Seen] = []
    every: list[Seen] = []
    for step in steps:
        kept: list[Seen] = []
        started: list[Seen] = []  # listed first in their own step, after the others from the next one on
        waiting = list(live)
        for new, computed in recording.requests(int(step)):
            if computed == 0:
                one = Seen(_arrival_s(recording, int(step)))
                every.append(one)
            else:
                match = next((each for each in waiting if each.context == computed), None)
                if match is None:  # it began in the phase before
                    continue
                waiting = waiting[waiting.index(match) + 1 :]
                one = match
            one.new, one.context = new, computed + new
            if new > 1 or computed == 0 or not one.tokens:
                # A chunk of the prompt: whether it is the last one shows when a single token follows.
                one.prompt, one.first_s, one.tokens = one.context, float(recording.end_s[step]), 1
            else:
                one.tokens += 1
            one.end_s = float(recording.end_s[step])
            (started if computed == 0 else kept).append(one)
        live = kept + started
    return every


def _arrival_s(recording: Recording, step: int) -> float:
    """When a request of a step's first chunk came: between the schedule before and this one, on average half way; at
    this one if the engine was idle."""
    here, before = float(recording.start_s[step]), float(recording.start_s[max(step - 1, 0)])
    return here if here - before > IDLE_GAP_S else (here + before) / 2


def compare(recording: Recording, phase: str, table: StepTable) -> Comparison:
    """One phase, recorded and simulated."""
    seen = recovered(recording, phase)
    start_s, end_s = min(each.at_s for each in seen), max(each.end_s for each in seen)
    arrivals = [Arrival(each.at_s - start_s, each.prompt, each.tokens) for each in seen]
    found = simulate("round-robin", [table], arrivals)
    counter = recording.counter
    measured_j = float(np.diff(np.interp([start_s, end_s], counter[:, 0], counter[:, 1]))[0])
    ttft = float(np.median([each.first_s - each.at_s for each in seen]))
    tpot = float(np.median([(each.end_s - each.first_s) / (each.tokens - 1) for each in seen if each.tokens > 1]))
    simulated_j = found.energy_j + table.idle_w * (end_s - start_s - found.duration_s)
    return Comparison(
        phase, len(seen), simulated_j / measured_j - 1, found.ttft_s[0] / ttft - 1, found.tpot_s[0] / tpot - 1
    )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/data/h200_vllm")
    print(f"{'run':16} {'requests':>8} {'energy':>8} {'TTFT':>8} {'TPOT':>8}")
    for name, model in MODELS.items():
        recording = load(folder / f"{name}_steps.npz")
        table = replica_table(EnergyModel(model, Deployment(gpu="H200-SXM", max_num_seqs=512)))
        for phase in recording.phases:
            if phase.startswith("mix"):
                each = compare(recording, phase, table)
                print(f"{name} {phase:8} {each.requests:8d} {each.energy:+8.1%} {each.ttft:+8.1%} {each.tpot:+8.1%}")


if __name__ == "__main__":
    main()
