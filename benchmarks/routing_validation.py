"""The simulator against mixed runs recorded on one GPU: energy, time to first token, time per token.

    python benchmarks/routing_validation.py [tests/data]

The recorders draw requests from a seed, so arrivals and lengths are drawn again here, not guessed from the steps;
when the stream began is what lets no request be scheduled before it arrives. Simulated requests have the same arrivals
and lengths, and both sides end where the recording does, with what is unfinished left out of the latencies. Energy is
the counter's over the time from the first arrival to the end, with idle time included on both sides.

Where the host is what bounds steps with prompts, its speed decides, and that changed by half within these recordings
from one second to another. The last columns take it from the recording, too: launches' recorded over predicted time.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from energylens_vllm.calibrate.recording import IDLE_GAP_S, Recording, load
from energylens_vllm.cli.simulate import replica_table
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.routing.engine import Engine
from energylens_vllm.routing.table import Reader, StepTable
from energylens_vllm.routing.trace import Arrival


@dataclass(frozen=True)
class Case:
    """A recording. `last_scheduled`: its recorder noted an output's time at the step scheduled last, the one after."""

    file: str
    model: str
    deployment: Deployment
    draw: Callable[[float], list[Arrival]]
    last_scheduled: bool = False


@dataclass
class Seen:
    """A request as it was recorded; steps by index."""

    first_step: int = 0
    prompt: int = 0
    prompt_step: int = 0  #: computed the last of the prompt
    tokens: int = 0
    last_step: int = 0
    context: int = 0


@dataclass(frozen=True)
class Comparison:
    """Relative errors of what is simulated, and what was recorded (J, s, s)."""

    phase: str
    requests: int
    energy: float
    ttft: float
    tpot: float
    recorded: tuple[float, float, float]
    same_host: tuple[float, float, float]  #: energy, TTFT, TPOT with the host as fast as it was recorded


class HostAsRecorded(Reader):
    """A table whose launches take `factor(time of the engine, decodes)` times as long."""

    def __init__(self, engine: Engine, factor: Callable[[float, int], float]) -> None:
        super().__init__(engine.table)
        self.engine, self.factor = engine, factor

    def mixed(self, n: int, context: float, new: int, pairs: float) -> tuple[float, float, float]:
        gpu_s, joules, host_s = super().mixed(n, context, new, pairs)
        took_s = host_s * self.factor(self.engine.taken_s, n)
        # The GPU burns idle power while it waits for the host.
        return gpu_s, joules + self.engine.table.idle_w * (max(gpu_s, took_s) - max(gpu_s, host_s)), took_s


def drawn_at_once(rate: float) -> list[Arrival]:
    """The requests of the recordings on an H200: numpy's generator, a seed for each rate."""
    draw = np.random.default_rng({1: 1, 4: 2, 12: 3, 30: 4}[int(rate)])
    at_s = np.cumsum(draw.exponential(1 / rate, int(rate * 12 * 1.3) + 5))
    prompts = np.clip(draw.lognormal(np.log(600), 0.8, len(at_s)), 8, 8000).astype(int)
    outputs = np.clip(draw.lognormal(np.log(200), 0.6, len(at_s)), 4, 1500).astype(int)
    return [Arrival(*each) for each in zip(at_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)]


def drawn_in_turn(rate: float, seconds: float = 6.0) -> list[Arrival]:
    """The requests of `record_steps.py`."""
    draw, at_s = random.Random(int(rate)), 0.0
    arrivals = []
    while at_s <= seconds:
        prompt = int(min(8000, max(16, draw.lognormvariate(6.397, 0.8))))
        arrivals.append(Arrival(at_s, prompt, int(min(2000, max(4, draw.lognormvariate(5.298, 0.6))))))
        at_s += draw.expovariate(rate)
    return arrivals


def on(gpu: str, **more: object) -> Deployment:
    return Deployment(gpu=gpu, max_num_seqs=512, async_scheduling=True, **more)  # type: ignore[arg-type]


CASES = {
    "H200 llama8b": Case("h200_vllm/llama8b", "llama-3.1-8b", on("H200-SXM"), drawn_at_once, last_scheduled=True),
    "H200 qwen30b": Case("h200_vllm/qwen30b", "qwen3-30b-a3b", on("H200-SXM"), drawn_at_once, last_scheduled=True),
    "H100 llama8b-fp8": Case(
        "h100_vllm/llama8b-fp8", "llama-3.1-8b", on("H100-SXM", quantization="fp8"), drawn_in_turn
    ),
    "H100 llama8b-eager": Case(
        "h100_vllm/llama8b-eager", "llama-3.1-8b", on("H100-SXM", enforce_eager=True), drawn_in_turn
    ),
    "H100 qwen14b": Case("h100_vllm/qwen14b", "qwen3-14b", on("H100-SXM"), drawn_in_turn),
}


def recovered(recording: Recording, steps: np.ndarray) -> list[Seen]:
    """Requests that begin in these steps: zero of their tokens are computed, and the step after holds them in the same
    order with as many tokens as they then had."""
    live: list[Seen] = []
    every: list[Seen] = []
    for step in steps.tolist():
        kept: list[Seen] = []
        started: list[Seen] = []  # listed first in their own step, after the others from the next one on
        waiting = list(live)
        for new, computed in recording.requests(step):
            if computed == 0:
                one = Seen(step)
                every.append(one)
            else:
                match = next((each for each in waiting if each.context == computed), None)
                if match is None:  # it began in the phase before
                    continue
                waiting = waiting[waiting.index(match) + 1 :]
                one = match
            one.context = computed + new
            if new > 1 or computed == 0 or not one.tokens:
                # A chunk of the prompt: whether it is the last one shows when a single token follows.
                one.prompt, one.prompt_step, one.tokens = one.context, step, 1
            else:
                one.tokens += 1
            one.last_step = step
            (started if computed == 0 else kept).append(one)
        live = kept + started
    return every


def compare(case: Case, recording: Recording, phase: str, table: StepTable) -> Comparison:
    """One phase, recorded and simulated."""
    steps = np.flatnonzero(recording.phase == recording.phases.index(phase))
    taken_s = recording.end_s
    if case.last_scheduled:
        taken_s = np.append(taken_s[1:], np.nan)
    seen = recovered(recording, steps)
    arrivals = case.draw(float(phase.removeprefix("mix_r")))[: len(seen)]
    # Requests are added in order of arrival, so the recorded ones are the first that were drawn.
    assert all(one.prompt == each.prompt_tokens for one, each in zip(seen, arrivals, strict=True) if one.tokens > 1)
    scheduled_s = np.array([recording.start_s[one.first_step] for one in seen])
    at_s = np.array([each.at_s for each in arrivals])
    began_s = float((scheduled_s - at_s).min())
    # An energy counter reading ends the time that is compared.
    end_s = float(recording.counter[np.searchsorted(recording.counter[:, 0], recording.start_s[steps[-1]]) - 1, 0])
    counted_j = np.interp([began_s + at_s[0], end_s], recording.counter[:, 0], recording.counter[:, 1])

    measured_j = float(counted_j[1] - counted_j[0])
    until_s = end_s - began_s

    def simulated(factor: Callable[[float, int], float] | None) -> tuple[int, tuple[float, float, float], list[float]]:
        """Requests, errors of energy, TTFT and TPOT, and the recorded medians of the last two."""
        engine, jobs = Engine(table), []
        if factor is not None:
            engine.read = HostAsRecorded(engine, factor)
        for order, arrival in enumerate(each for each in arrivals if each.at_s <= until_s):
            engine.advance(arrival.at_s)
            jobs.append(engine.submit(arrival, order, arrival.at_s))
        engine.advance(until_s)
        energy_j = engine.energy_until(until_s) - table.idle_w * at_s[0]
        first, each_token = [], []
        for one, each, job in zip(seen, arrivals, jobs, strict=False):
            prompt_s, last_s = taken_s[one.prompt_step] - began_s, taken_s[one.last_step] - began_s
            if one.tokens > 1 and prompt_s <= until_s and job.first_s <= until_s:
                first.append((prompt_s - each.at_s, job.first_s - each.at_s))
            if one.tokens == each.output_tokens and last_s <= until_s and job.end_s <= until_s:
                each_token.append(np.array([last_s - prompt_s, job.end_s - job.first_s]) / (one.tokens - 1))
        (ttft, simulated_ttft), (tpot, simulated_tpot) = (np.median(pairs, axis=0) for pairs in (first, each_token))
        errors = energy_j / measured_j - 1, float(simulated_ttft / ttft - 1), float(simulated_tpot / tpot - 1)
        return len(first), errors, [float(ttft), float(tpot)]

    count, errors, recorded = simulated(None)
    _, same_host, _ = simulated(host_factor(recording, steps, taken_s, table, began_s))
    return Comparison(phase, count, *errors, (measured_j, recorded[0], recorded[1]), same_host)


def host_factor(
    recording: Recording, steps: np.ndarray, taken_s: np.ndarray, table: StepTable, began_s: float
) -> Callable[[float, int], float]:
    """Recorded over predicted time of launches, by the time since the beginning and by whether the step decodes, too
    (launches on an idle GPU were quicker): the median of three in turn. A launch lasts from its schedule until the
    output before is taken; only those count in which it is the host that is waited for, and with fewer than five the
    prediction stands."""
    read = table.reader()
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for before, step in pairwise(steps.tolist()):
        requests = recording.requests(step)
        new = sum(each for each, computed in requests if each > 1 or computed == 0)
        decodes = sum(each == 1 and computed > 0 for each, computed in requests)
        launch_s = taken_s[before] - recording.start_s[step]
        idle = recording.start_s[step] - recording.start_s[before] > IDLE_GAP_S
        if not new or not 0 < launch_s < 1 or not (idle or all(each == 1 for each, _ in recording.requests(before))):
            continue
        gpu_s, _, host_s = read.mixed(decodes, 1000.0, new, new * new / 2)
        if host_s > 1.5 * gpu_s:
            found[decodes > 0].append((recording.start_s[step] - began_s, launch_s / host_s))
    smooth = [
        (at_s, [float(np.median(factors[max(i - 1, 0) : i + 2])) for i in range(len(factors))])
        for at_s, factors in (tuple(zip(*each, strict=True)) if len(each) > 4 else ((0.0,), (1.0,)) for each in found)
    ]
    return lambda now, decodes: float(np.interp(now, *smooth[decodes > 0]))


def comparisons(folder: Path, name: str) -> list[Comparison]:
    """All mixed phases of a case."""
    case = CASES[name]
    recording = load(folder / f"{case.file}_steps.npz")
    table = replica_table(EnergyModel(case.model, case.deployment))
    phases = sorted((p for p in recording.phases if p.startswith("mix")), key=lambda p: float(p.removeprefix("mix_r")))
    return [compare(case, recording, phase, table) for phase in phases]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/data")
    print("| run | requests | energy | TTFT | TPOT | host as recorded: energy, TTFT, TPOT |\n" + "| --- " * 6 + "|")
    for name in CASES:
        for each in comparisons(folder, name):
            joules, ttft, tpot = each.recorded
            print(
                f"| {name}, {each.phase.removeprefix('mix_r')}/s | {each.requests} | {joules:.0f} J {each.energy:+.1%} "
                f"| {ttft * 1e3:.1f} ms {each.ttft:+.1%} | {tpot * 1e3:.2f} ms {each.tpot:+.1%} "
                f"| {', '.join(f'{error:+.1%}' for error in each.same_host)} |"
            )


if __name__ == "__main__":
    main()
