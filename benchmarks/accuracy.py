"""Errors of the shipped profiles, and of predictions from fits that have not seen what they predict.

    python benchmarks/accuracy.py                            # recorded steps, shipped profiles
    python benchmarks/accuracy.py DATA OPERATIONS            # and held out; arguments as fit_profiles.py's
    python benchmarks/accuracy.py DATA OPERATIONS --single   # series of serving runs on one GPU held out as well
    python benchmarks/accuracy.py DATA OPERATIONS --json F   # and keep every held-out error in F, for accuracy_plots.py

Errors are means of |predicted / measured - 1|. Steady windows are back-to-back prefills and decodes of one batch; mixed
load is scored over all of a run's mixed windows together, idle time included. "Inside" is the share of windows, or
rows, whose measured value lies in the shipped profile's 90 % interval around the prediction.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fit_profiles import (
    RUNS,
    Row,
    Run,
    estimates,
    held_out_rows,
    held_out_runs,
    mlenergy_rows,
    prior,
    recorded_runs,
    row_errors,
    start_from,
    with_kernels_of,
)

from energylens_vllm import EnergyModel
from energylens_vllm.cli.table import percent, table
from energylens_vllm.energy.batch import Array
from energylens_vllm.hardware.profile import GpuProfile, load_profile


def mape(log_errors: Array) -> float:
    """Mean |predicted / measured - 1|."""
    return float(np.abs(np.expm1(log_errors)).mean()) if len(log_errors) else float("nan")


def bias(log_errors: Array) -> float:
    return float(np.expm1(log_errors).mean()) if len(log_errors) else float("nan")


def steady(run: Run) -> Array:
    return np.array([name.startswith(("decode", "prefill")) for name in run.windows_scored])


class Held(NamedTuple):
    """Errors of what was held out, as logarithms of predicted over measured, and half-widths of 90 % intervals as
    logarithms too; all of one shape (N,)."""

    times: Array
    energies: Array
    time_widths: Array
    energy_widths: Array

    @property
    def inside(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether time and energy lie in their intervals."""
        return np.abs(self.times) <= self.time_widths, np.abs(self.energies) <= self.energy_widths


def run_widths(run: Run, profile: GpuProfile) -> tuple[Array, Array]:
    predicted = run.windows.predict(run.energy_model(profile))
    times, energies = np.log(predicted.high_s / predicted.busy_s), np.log(predicted.high_j / predicted.energy_j)
    return times[run.scored], energies[run.scored]


def row_widths(rows: Sequence[Row], profile: GpuProfile) -> Array:
    """Of energy alone: serving estimates have no interval of time."""
    return np.log([load.interval_j[1] / load.energy_per_output_token_j for load in estimates(rows, profile)])


def recorded() -> None:
    """Shipped profiles on all recorded steps."""
    rows = []
    for gpu, names in RUNS.items():
        profile = load_profile(gpu)
        for run in (Run(gpu, name) for name in names):
            time_error, energy_error = run.errors(profile)
            predicted, windows, scored = run.windows.predict(run.energy_model(profile)), run.windows, run.scored
            held = Held(time_error, energy_error, *run_widths(run, profile))
            mixed = scored.copy()
            mixed[scored] = ~steady(run)
            whole = predicted.energy_j[mixed].sum() / windows.energy_j[mixed].sum() - 1 if mixed.any() else float("nan")
            kept = steady(run)
            time_inside, energy_inside = (inside.mean() for inside in held.inside)
            rows.append(
                [
                    gpu, run.name, "yes" if run.fitted else "no", str(kept.sum()), percent(mape(energy_error[kept])),
                    percent(mape(time_error[kept])), percent(whole, signed=True),
                    percent(energy_inside), percent(time_inside),
                ]
            )  # fmt: skip
    headers = ["GPU", "run", "fitted", "steady windows", "energy", "time", "mixed, energy", "J inside", "s inside"]
    print("Recorded steps, shipped profiles:\n" + table(headers, rows, left=3) + "\n")


def counted_routing() -> None:
    """Two H200s whose routers like some experts far more: predicted from what the plugin counted, and without."""
    rows = []
    for name in ("qwen30b-uneven-tp2", "qwen30b-uneven-ep2"):
        run, profile = Run("H200-SXM", name), load_profile("H200-SXM")
        with_counts = run.energy_model(profile)
        without = replace(run.deployment, expert_routing="uniform")
        both = [run.windows.predict(each) for each in (with_counts, EnergyModel(with_counts.cascade, without, profile))]
        measured = run.windows
        for i, window in enumerate(measured.names):
            rows.append([name, window] + [
                percent(value - 1, signed=True)
                for each in both
                for value in (each.energy_j[i] / measured.energy_j[i], each.busy_s[i] / measured.busy_s[i])
            ])  # fmt: skip
    headers = ["run", "window", "energy, counted", "time", "energy, uniform", "time"]
    print("Experts unevenly liked, as counted live and as if uniform:\n" + table(headers, rows, left=2) + "\n")


def held_out(operations: pathlib.Path) -> dict[str, dict[str, Held]]:
    """Each model predicted from a fit on the recorded steps of the others on the same GPU."""
    found: dict[str, dict[str, Held]] = {}
    rows = []
    for gpu in RUNS:
        runs, profile = recorded_runs(gpu), load_profile(gpu).at_release("0.25.1")
        errors = held_out_runs(prior(gpu, operations), runs, profile)
        found[gpu] = {run.name: Held(*errors[run.name], *run_widths(run, profile)) for run in runs}
        for run in runs:
            rows.append([gpu, run.name, *_held_line(found[gpu][run.name], steady(run))])
        kinds: dict[str, list[tuple[Held, Array]]] = {}
        for run in runs:
            kind = "eager" if run.deployment.enforce_eager else "experts" if run.experts else "dense"
            kinds.setdefault(kind, []).append((found[gpu][run.name], steady(run)))
        for kind, parts in kinds.items():
            together = Held(*(np.concatenate(column) for column in zip(*(held for held, _ in parts), strict=True)))
            rows.append([gpu, f"all: {kind}", *_held_line(together, np.concatenate([kept for _, kept in parts]))])
    headers = ["GPU", "run", "steady: energy", "time", "mixed: energy", "time", "J inside", "s inside"]
    print("Recorded steps, the model held out of the fit:\n" + table(headers, rows, left=2) + "\n")
    return found


def _held_line(held: Held, kept: Array) -> list[str]:
    time_inside, energy_inside = held.inside
    return [
        percent(mape(held.energies[kept])), percent(mape(held.times[kept])),
        percent(mape(held.energies[~kept])), percent(mape(held.times[~kept])),
        percent(energy_inside.mean()), percent(time_inside.mean()),
    ]  # fmt: skip


def serving(title: str, rows: Sequence[Row], errors: Mapping[str, Held]) -> None:
    """Errors of serving runs by series, and of rows on several GPUs together."""
    several = {row.series for row in rows if row.gpus > 1}
    lines = []
    for name in (*errors, "all", "on several GPUs"):
        chosen = {"all": set(errors), "on several GPUs": several & set(errors)}.get(name, {name})
        if parts := [errors[series] for series in errors if series in chosen]:
            held = Held(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            lines.append(
                [name, str(len(held.times)), percent(mape(held.energies)), percent(bias(held.energies), signed=True),
                 percent(mape(held.times)), percent(held.inside[1].mean())]
            )  # fmt: skip
    headers = ["series", "rows", "energy per token", "bias", "time per token", "J inside"]
    print(f"{title}:\n" + table(headers, lines) + "\n")


def by_series(rows: Sequence[Row], errors: tuple[Array, Array], widths: Array) -> dict[str, Held]:
    series = np.array([row.series for row in rows])
    none = np.full(len(rows), np.inf)
    parts = (*errors, none, widths)
    return {str(name): Held(*(part[series == name] for part in parts)) for name in dict.fromkeys(series)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=pathlib.Path)
    parser.add_argument("operations", nargs="?", type=pathlib.Path)
    parser.add_argument("--single", action="store_true", help="hold out series of serving runs on one GPU as well")
    parser.add_argument("--json", type=pathlib.Path, help="file for every held-out error")
    args = parser.parse_args()
    recorded()
    counted_routing()
    if args.data is None:
        return
    kept: dict[str, dict[str, Held]] = held_out(args.operations)
    everything: list[Row] = []
    missed: dict[str, Held] = {}
    starts = {"H100-SXM": ("H100-SXM", "B200-SXM"), "B200-SXM": ("H200-SXM", "H100-SXM")}
    for gpu, (known, other) in starts.items():
        profile, rows = load_profile(gpu), mlenergy_rows(args.data, gpu)
        widths = row_widths(rows, profile)
        serving(f"{gpu}, serving runs, shipped profile", rows, by_series(rows, row_errors(rows, profile), widths))
        steps = load_profile(known).at_release("0.25.1")
        start = replace(start_from(steps, gpu, args.operations), vllm_release="0.11.1")
        start = with_kernels_of(start, load_profile(other), args.operations)
        for series, errors in held_out_rows(start, rows, profile, several=not args.single).items():
            chosen = np.array([row.series == series for row in rows])
            none = np.full(chosen.sum(), np.inf)
            missed[series] = Held(*errors, none, widths[chosen])
        everything += rows
    serving("Serving runs, the series held out of the fit", everything, missed)
    if args.json:
        kept["serving"] = missed
        args.json.write_text(json.dumps(_plain(kept), indent=1) + "\n")


def _plain(found: Mapping[str, Mapping[str, Held]]) -> dict[str, Any]:
    """For JSON: logarithms of predicted over measured, rounded."""
    return {
        group: {
            name: {"time": held.times.round(4).tolist(), "energy": held.energies.round(4).tolist()}
            for name, held in runs.items()
        }
        for group, runs in found.items()
    }


if __name__ == "__main__":
    main()
