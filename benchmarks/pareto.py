"""Whether predictions put configurations in the right order, and find the right Pareto front.

    python benchmarks/pareto.py DATA        # DATA/mlenergy_v3/calibration.csv, which is not part of this repository

Of each model and workload, over all that was measured of it (GPUs, their number, number formats, batch limits):
`order` is Spearman's rank correlation of joules a token. The front is of joules against seconds a token; `found` is
the share of the measured front that the predicted front holds, `right` the share of the predicted front that is on the
measured one, and `excess` how many more joules the predicted front takes, in the mean over the latencies of the
measured front: at each, the cheapest of the predicted front that is measured to be as fast, against the cheapest of
all.

A single series (one GPU count, one format) is a front by itself, all of it or nearly so: its recovery says little, and
the line "several series" leaves those models out. The shipped profiles are fitted on these very rows, by series; what a
fit without a series makes of it is in benchmarks/accuracy.py DATA OPERATIONS.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from fit_profiles import Row, mlenergy_rows, row_errors

from energylens_vllm.cli.table import percent, table
from energylens_vllm.energy.batch import Array
from energylens_vllm.explore.pareto import pareto_front
from energylens_vllm.hardware.profile import load_profile

#: Gaps smaller than this share of a joule or of a second are no gaps: repeated runs differ by more (2.6 %).
TIE = 0.026


class Score(NamedTuple):
    """Of one model under one workload."""

    name: str
    series: int
    rows: int
    front: int
    order: float
    found: float
    found_tied: float
    right: float
    excess: float


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def score(name: str, series: int, measured: tuple[Array, Array], predicted: tuple[Array, Array]) -> Score:
    """`measured` and `predicted`: joules and seconds a token of N configurations."""
    alone = np.zeros(len(measured[0]))
    truth, guess = (pareto_front(joules, seconds, alone) for joules, seconds in (measured, predicted))
    joules, seconds = measured
    excess = []
    for i in np.flatnonzero(truth):
        fast = guess & (seconds <= seconds[i])
        excess.append(joules[fast].min() / joules[i] - 1 if fast.any() else np.nan)
    # Of the measured front, what is on the predicted one or as good as a configuration that is.
    tied = [
        bool(np.any(guess & (joules <= joules[i] * (1 + TIE)) & (seconds <= seconds[i] * (1 + TIE))))
        for i in np.flatnonzero(truth)
    ]
    return Score(
        name, series, len(joules), int(truth.sum()), rank_correlation(joules, predicted[0]),
        float((truth & guess).sum() / truth.sum()), float(np.mean(tied)), float((truth & guess).sum() / guess.sum()),
        float(np.nanmean(excess)),
    )  # fmt: skip


def scores(rows: Sequence[Row], times: Array, energies: Array) -> list[Score]:
    """`times` and `energies`: log(predicted / measured) of each row."""
    joules, seconds = np.array([row.energy_j for row in rows]), np.array([row.time_s for row in rows])
    groups = np.array([f"{row.model} {row.series.split()[-1]}" for row in rows])
    found = []
    for name in dict.fromkeys(groups):
        here = groups == name
        measured = (joules[here], seconds[here])
        predicted = (measured[0] * np.exp(energies[here]), measured[1] * np.exp(times[here]))
        series = len({row.series for row, inside in zip(rows, here, strict=True) if inside})
        found.append(score(str(name), series, measured, predicted))
    return found


def mean(scored: Sequence[Score], name: str) -> list[str]:
    """A line of means: orders weigh alike, fronts by their points."""
    points = np.array([s.front for s in scored])
    found, tied = (
        float(np.average([getattr(s, at) for s in scored], weights=points)) for at in ("found", "found_tied")
    )
    guessed = np.array([s.found * s.front / s.right if s.right else 1.0 for s in scored])
    right = float(np.average([s.right for s in scored], weights=guessed))
    order = float(np.mean([s.order for s in scored]))
    excess = float(np.average([s.excess for s in scored], weights=points))
    rows, series = sum(s.rows for s in scored), sum(s.series for s in scored)
    values = [percent(value) for value in (found, tied, right, excess)]
    return [name, str(series), str(rows), str(points.sum()), f"{order:.3f}", *values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--requests-per-slot", type=float, default=3.0, help="rows below are not steady (default 3)")
    args = parser.parse_args()
    rows: list[Row] = []
    errors: list[tuple[Array, Array]] = []
    for gpu in ("H100-SXM", "B200-SXM"):
        these = mlenergy_rows(args.data, gpu, args.requests_per_slot)
        rows += these
        errors.append(row_errors(these, load_profile(gpu)))
    times, energies = (np.concatenate(parts) for parts in zip(*errors, strict=True))
    scored = scores(rows, times, energies)
    lines = [
        [s.name, str(s.series), str(s.rows), str(s.front), f"{s.order:.3f}",
         *(percent(value) for value in (s.found, s.found_tied, s.right, s.excess))]
        for s in scored
    ]  # fmt: skip
    lines += [mean(scored, "all"), mean([s for s in scored if s.series > 1], "several series")]
    headers = ["model, workload", "series", "rows", "front", "order", "found", f"within {TIE:.1%}", "right", "excess"]
    print(table(headers, lines))


if __name__ == "__main__":
    main()
