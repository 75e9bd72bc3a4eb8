"""Errors of the shipped profiles, and of predictions from fits that have not seen what they predict.

    python benchmarks/accuracy.py                            # recorded steps, shipped profiles
    python benchmarks/accuracy.py DATA OPERATIONS            # and held out; arguments as fit_profiles.py's
    python benchmarks/accuracy.py DATA OPERATIONS --serving  # and each series of serving runs held out: half an hour

Errors are means of |predicted / measured - 1|. Steady windows are back-to-back prefills and decodes of one batch; mixed
load is scored over all of a run's mixed windows together, idle time included.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from fit_profiles import (
    RUNS,
    Row,
    Run,
    held_out_rows,
    held_out_runs,
    mlenergy_rows,
    prior,
    recorded_runs,
    row_errors,
    start_from,
    with_kernels_of,
)

from energylens_vllm.cli.table import percent, table
from energylens_vllm.energy.batch import Array
from energylens_vllm.hardware.profile import load_profile


def mape(log_errors: Array) -> float:
    """Mean |predicted / measured - 1|."""
    return float(np.abs(np.expm1(log_errors)).mean()) if len(log_errors) else float("nan")


def steady(run: Run) -> Array:
    return np.array([name.startswith(("decode", "prefill")) for name in run.windows_scored])


def recorded() -> None:
    """Shipped profiles on all recorded steps."""
    rows = []
    for gpu, names in RUNS.items():
        profile = load_profile(gpu)
        for run in (Run(gpu, name) for name in names):
            time_error, energy_error = run.errors(profile)
            model = run.energy_model(profile)
            predicted, windows, scored = run.windows.predict(model), run.windows, run.scored
            inside = [
                ((low <= measured) & (measured <= high))[scored].mean()
                for low, measured, high in (
                    (predicted.low_j, windows.energy_j, predicted.high_j),
                    (predicted.low_s, windows.busy_s, predicted.high_s),
                )
            ]
            mixed = scored.copy()
            mixed[scored] = ~steady(run)
            whole = predicted.energy_j[mixed].sum() / windows.energy_j[mixed].sum() - 1 if mixed.any() else float("nan")
            kept = steady(run)
            rows.append(
                [
                    gpu, run.name, "yes" if run.fitted else "no", str(kept.sum()), percent(mape(energy_error[kept])),
                    percent(mape(time_error[kept])), percent(whole, signed=True),
                    percent(inside[0]), percent(inside[1]),
                ]
            )  # fmt: skip
    headers = ["GPU", "run", "fitted", "steady windows", "energy", "time", "mixed, energy", "J inside", "s inside"]
    print("Recorded steps, shipped profiles:\n" + table(headers, rows, left=3) + "\n")


def held_out(operations: pathlib.Path) -> None:
    """Each model predicted from a fit on the recorded steps of the others on the same GPU."""
    rows = []
    for gpu in RUNS:
        runs = recorded_runs(gpu)
        for run, (time_error, energy_error) in zip(
            runs, held_out_runs(prior(gpu, operations), runs).values(), strict=True
        ):
            kept = steady(run)
            rows.append([
                gpu, run.name, percent(mape(energy_error[kept])), percent(mape(time_error[kept])),
                percent(mape(energy_error[~kept])), percent(mape(time_error[~kept])),
            ])  # fmt: skip
    headers = ["GPU", "run", "steady: energy", "time", "mixed: energy", "time"]
    print("Recorded steps, the model held out of the fit:\n" + table(headers, rows, left=2) + "\n")


def serving(title: str, rows: Sequence[Row], errors: Mapping[str, tuple[Array, Array]]) -> None:
    """Errors of serving runs by series, and of rows on several GPUs together."""
    lines = [
        [series, str(len(times)), percent(mape(energies)), percent(float(np.expm1(energies).mean()), signed=True),
         percent(mape(times))]
        for series, (times, energies) in errors.items()
    ]  # fmt: skip
    several = {row.series for row in rows if row.gpus > 1}
    for name, chosen in (("all", set(errors)), ("on several GPUs", several)):
        times, energies = (np.concatenate([errors[series][i] for series in errors if series in chosen]) for i in (0, 1))
        lines.append([name, str(len(times)), percent(mape(energies)), "", percent(mape(times))])
    print(f"{title}:\n" + table(["series", "rows", "energy per token", "bias", "time per token"], lines) + "\n")


def by_series(rows: Sequence[Row], times: Array, energies: Array) -> dict[str, tuple[Array, Array]]:
    series = np.array([row.series for row in rows])
    return {str(name): (times[series == name], energies[series == name]) for name in dict.fromkeys(series)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=pathlib.Path)
    parser.add_argument("operations", nargs="?", type=pathlib.Path)
    parser.add_argument("--serving", action="store_true", help="hold each series of serving runs out (slow)")
    args = parser.parse_args()
    recorded()
    if args.data is None:
        return
    held_out(args.operations)
    for gpu in ("H100-SXM", "B200-SXM"):
        rows = mlenergy_rows(args.data, gpu)
        serving(f"{gpu}, serving runs, shipped profile", rows, by_series(rows, *row_errors(rows, load_profile(gpu))))
        if args.serving:
            start = replace(start_from(load_profile("H200-SXM"), gpu, args.operations), vllm_release="0.11.1")
            start = with_kernels_of(
                start, load_profile("B200-SXM" if gpu == "H100-SXM" else "H100-SXM"), args.operations
            )
            serving(f"{gpu}, serving runs, the series held out of the fit", rows, held_out_rows(start, rows))


if __name__ == "__main__":
    main()
