"""What splitting contexts over two GPUs changes in recorded steps, and what the model says of it.

    python benchmarks/context_parallel.py

Llama-3.1-8B with one KV head and DeepSeek-V2-Lite on two H200s with tensor parallelism, each recorded with and without
decode context parallelism (record_steps.py). Changes are of a phase's mean step, with over without, measured and as
predicted: so errors of the profile in either do not count, and what is left is the model of split contexts. No profile
and no coefficient was fitted on these recordings.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from record_steps import CASES

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.calibrate.recording import load
from energylens_vllm.calibrate.replay import Score, replay
from energylens_vllm.cli.table import percent, table

DATA = pathlib.Path(__file__).parents[1] / "tests" / "data" / "h200_vllm"
#: with whole contexts, and the same with split ones
PAIRS = (("llama8b-mqa-tp2", "llama8b-mqa-dcp2"), ("deepseek-lite-tp2", "deepseek-lite-dcp2"))


@dataclass(frozen=True)
class Change:
    """Of a phase, split contexts over whole ones: measured and predicted seconds and joules a step."""

    case: str
    phase: str
    whole_s: float  #: measured
    time: tuple[float, float]
    energy: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        """Predicted over measured change of time and of energy, less one."""
        (measured_s, predicted_s), (measured_j, predicted_j) = self.time, self.energy
        return predicted_s / measured_s - 1, predicted_j / measured_j - 1


def scores(case: str) -> dict[str, Score]:
    """Of each phase that was measured for long enough."""
    config, arguments, _ = CASES[case]
    recording = load(DATA / f"{case}_steps.npz")
    sizes: dict[str, Any] = {"cudagraph_capture_sizes": recording.capture_sizes}
    model = EnergyModel(config, Deployment(gpu="H200-SXM", **arguments, **sizes))
    return {score.phase: score for score in replay(recording, model) if score.measured}


def changes() -> Iterator[Change]:
    for whole_case, split_case in PAIRS:
        whole, split = scores(whole_case), scores(split_case)
        for phase, one in whole.items():
            if phase in split and phase != "fill":
                other = split[phase]
                yield Change(
                    split_case,
                    phase,
                    one.measured_s / one.steps,
                    (_per_step(other, "measured_s") / _per_step(one, "measured_s"),
                     _per_step(other, "predicted_s") / _per_step(one, "predicted_s")),
                    (_per_step(other, "measured_j") / _per_step(one, "measured_j"),
                     _per_step(other, "predicted_j") / _per_step(one, "predicted_j")),
                )  # fmt: skip


def _per_step(score: Score, name: str) -> float:
    return float(getattr(score, name)) / score.steps


def spread(errors: Iterable[float]) -> float:
    """Root mean square of relative errors."""
    logs = [math.log1p(error) for error in errors]
    return math.sqrt(sum(each * each for each in logs) / len(logs))


def main() -> None:
    found = list(changes())
    rows = [
        (
            each.case.removesuffix("-dcp2"),
            each.phase,
            f"{each.whole_s * 1e3:.2f} ms",
            *(f"x {value:.2f}" for value in each.time),
            percent(each.errors[0], signed=True),
            *(f"x {value:.2f}" for value in each.energy),
            percent(each.errors[1], signed=True),
        )
        for each in found
    ]
    head = ("model", "phase", "step", "time", "predicted", "error", "energy", "predicted", "error")
    print(table(head, rows, left=2))
    for index, what in enumerate(("time", "energy")):
        of_all = spread(each.errors[index] for each in found)
        decodes = spread(each.errors[index] for each in found if each.phase.startswith("decode"))
        print(f"{what}: {decodes:.1%} off in decodes, {of_all:.1%} in all phases (root mean square)")


if __name__ == "__main__":
    main()
