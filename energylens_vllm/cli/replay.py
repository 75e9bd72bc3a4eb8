"""Predict every step of a recording and score time and energy against what was measured.

    energylens replay --config llama-3.1-8b --gpu H200-SXM steps.npz

The recording is a .npz file as benchmarks/record_steps.py writes it, or JSON lines with nothing measured, one step a
line: {"requests": [[new tokens, computed tokens], ...]}. Both are described in docs/formats.md.

A phase is scored over the stretch between the first and the last reading of the GPU's energy counter in it, without
its first half second. Time in which the engine had nothing to run counts as idle power. CUDA-graph sizes are those of
the recording, if it names them and no flag does.
"""

from __future__ import annotations

import argparse
import json
import math
from statistics import fmean

from energylens_vllm.calibrate.recording import load
from energylens_vllm.calibrate.replay import Score, replay, total
from energylens_vllm.cli.deployment import add_deployment_arguments, add_model_argument, energy_model
from energylens_vllm.cli.table import percent, quantity, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recording", metavar="STEPS", help="recorded steps, .npz or JSON lines")
    add_model_argument(parser, "--config")
    add_deployment_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    recording = load(args.recording)
    if args.cudagraph_capture_sizes is None and recording.capture_sizes is not None:
        args.cudagraph_capture_sizes = list(recording.capture_sizes) or None
        args.enforce_eager |= not recording.capture_sizes
    scores = replay(recording, energy_model(args))
    print(json.dumps(as_json(scores)) if args.json else as_text(scores))
    return 0


def summary(scores: list[Score]) -> dict[str, float]:
    """Over the measured phases: mean absolute errors, errors of the totals, and how many intervals hold the truth."""
    measured = [score for score in scores if score.measured]
    if not measured:
        return {}
    whole = total("all measured", measured)
    return {
        "energy_mape": fmean(abs(score.energy_error) for score in measured),
        "time_mape": fmean(abs(score.time_error) for score in measured),
        "energy_error": whole.energy_error,
        "time_error": whole.time_error,
        "energy_interval_coverage": fmean(score.low_j <= score.measured_j <= score.high_j for score in measured),
        "time_interval_coverage": fmean(score.low_s <= score.measured_s <= score.high_s for score in measured),
    }


def as_json(scores: list[Score]) -> dict[str, object]:
    def row(score: Score) -> dict[str, object]:
        names = (*Score.__slots__, "energy_error", "time_error")
        values: dict[str, object] = {name: getattr(score, name) for name in names}
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}

    whole = total("all", scores)
    return {
        "predicted_j": whole.predicted_j,
        "predicted_s": whole.predicted_s,
        **summary(scores),
        "phases": [row(score) for score in scores],
    }


def as_text(scores: list[Score]) -> str:
    headers = ["phase", "steps", "tokens", "step time", "measured", "error", "energy/step", "measured", "error"]
    rows = [
        [
            score.phase,
            f"{score.steps:.0f}",
            f"{score.tokens:.0f}",
            quantity(score.predicted_s / score.steps, "s"),
            quantity(score.measured_s / score.steps, "s"),
            percent(score.time_error, signed=True),
            quantity(score.predicted_j / score.steps, "J"),
            quantity(score.measured_j / score.steps, "J"),
            percent(score.energy_error, signed=True),
        ]
        for score in scores
        if score.steps
    ]
    lines = [table(headers, rows)]
    if found := summary(scores):
        lines.append("\n".join(
            f"{what}: MAPE {percent(found[f'{what}_mape'])} over phases, "
            f"{percent(found[f'{what}_error'], signed=True)} in all; "
            f"{percent(found[f'{what}_interval_coverage'])} of phases inside the 90 % interval"
            for what in ("energy", "time")
        ))  # fmt: skip
    else:
        whole = total("all", scores)
        lines.append(
            f"in all: {quantity(whole.predicted_s, 's')}, {quantity(whole.predicted_j, 'J')}; nothing was measured"
        )
    return "\n\n".join(lines)
