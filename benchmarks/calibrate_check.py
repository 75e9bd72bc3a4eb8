"""Fit measured points of an H100 again, and score the profile on steps that vLLM ran on the same GPU.

    python benchmarks/calibrate_check.py                 # with the points of benchmarks/results/calibrate_h100
    python benchmarks/calibrate_check.py POINTS.jsonl    # with those of another run of `energylens calibrate`

The fit starts from a profile of another H100 (base.json: that of an earlier day, fitted on recordings of one GPU), as
it would on a GPU that nobody has measured. Prints the errors of the points before and after, what was fitted, and the
errors over recorded windows of vLLM (tests/data/h100_vllm) on the GPU whose points are kept, as its idle power of 119 W
tells (others' draw 131 W and more): of the base, of the calibrated profile, and of the shipped one of today, which is
fitted on some of them. Joules of the calibrated profile know nothing of these recordings; its seconds are those of
kernels alone times what the shipped profile makes of them in steps (calibrate/reference.py).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.calibrate.collectives import Row
from energylens_vllm.calibrate.collectives_fit import power_errors, powered
from energylens_vllm.calibrate.measured import Log, Measured
from energylens_vllm.calibrate.points import points
from energylens_vllm.calibrate.profile_fit import Compared, Fitted, Machine, compare, fit_points, start_profile
from energylens_vllm.calibrate.recording import load
from energylens_vllm.calibrate.windows import measured_windows
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.hardware import GpuProfile, load_profile

HERE = pathlib.Path(__file__).parent
POINTS = HERE / "results" / "calibrate_h100" / "points.jsonl"
RECORDINGS = HERE.parent / "tests" / "data" / "h100_vllm"
TOP_CLOCK_HZ = 1980e6
#: recording -> the model, and what else `Deployment` needs to know
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama8b-steady": ("llama-3.1-8b", {}),
    "qwen32b": ("qwen3-32b", {}),
    "qwen30b-routed": ("qwen3-30b-a3b", {}),
}
KINDS = {
    "idle": "idle", "spin": "idle", "memory": "memory", "launch": "launch", "linear": "GEMM bf16",
    "linear_fp8": "GEMM fp8", "decode": "attention, decode", "prefill": "attention, prefill", "experts": "experts",
}  # fmt: skip


def read_points(path: pathlib.Path) -> dict[str, Measured]:
    header = json.loads(path.open().readline())
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, folder)
        return Log(pathlib.Path(copy), header, resume=True).measured


def fit(measured: dict[str, Measured]) -> tuple[GpuProfile, Fitted]:
    """The profile that the fit starts from, and what it makes of it."""
    base = load_profile(POINTS.parent / "base.json")
    machine = Machine("NVIDIA H100 80GB HBM3", base.sm_count, base.memory_bytes, 3.352e12, TOP_CLOCK_HZ, 700.0)
    start = start_profile(base, machine, same_gpu=True)
    return start.profile, fit_points(start, points(), measured, TOP_CLOCK_HZ, "points")


def point_errors(rows: tuple[Compared, ...]) -> dict[str, str]:
    """Mean absolute error of power, and of time, by kind."""
    found = {}
    for kind in dict.fromkeys(KINDS.values()):
        own = [row for row in rows if KINDS.get(row.kind) == kind]
        powers = [abs(row.predicted_w / row.power_w - 1) for row in own if row.predicted_w]
        times = [abs(row.predicted_s / row.time_s - 1) for row in own if row.predicted_s]
        cells = [f"{np.mean(errors):6.1%}" if errors else "     -" for errors in (times, powers)]
        found[kind] = f"{len(own):3d}  " + "  ".join(cells)
    return found


def step_errors(name: str, profile: GpuProfile) -> dict[str, tuple[float, float]]:
    """Mean absolute errors of time and energy over a recording's windows, by kind of load."""
    model, given = RUNS[name]
    recording = load(RECORDINGS / f"{name}_steps.npz")
    deployment = Deployment(
        gpu="H100-SXM",
        vllm_release="0.25.1",
        max_num_seqs=512,
        cudagraph_capture_sizes=recording.capture_sizes,
        **given,
    )
    energy = EnergyModel(model, deployment, profile)
    windows = measured_windows(recording, energy.masks)
    predicted = windows.predict(energy)
    found = {}
    kinds = np.array([window.partition("_")[0] for window in windows.names])
    for kind in dict.fromkeys(kinds.tolist()):
        own = kinds == kind
        found[kind] = (
            float(np.mean(np.abs(predicted.busy_s[own] / windows.busy_s[own] - 1))),
            float(np.mean(np.abs(predicted.energy_j[own] / windows.energy_j[own] - 1))),
        )
    return found


def print_collectives() -> None:
    """Power of a GPU in collectives among two, measured and predicted. The H100s' were repeated in CUDA graphs, which
    added 20 to 45 us to each (docs/calibrate.md): the share of the time in which they run is that of the shipped times.
    """
    for gpu, folder in (("H200-SXM", "calibrate_h200_pair"), ("H100-SXM", "calibrate_h100")):
        stored = json.loads((HERE / "results" / folder / "collectives.json").read_text())
        rows = [Row(**{"host_s": 0.0} | {k: v for k, v in row.items() if k != "graph"}) for row in stored]
        collectives = Collectives.load(gpu)
        node = collectives.interconnect
        own = powered(node, rows, "rows")
        errors = [float(np.mean(np.abs(np.expm1(power_errors(each, rows))))) for each in (node, own)]
        print(f"\ncollectives of two {gpu}, {len(rows)} rows of 4 KiB to 256 MiB: power of a GPU off")
        for what, each, error in zip(("shipped", "a fit of its own"), (node, own), errors, strict=True):
            driving, byte = each["communication_power_w"], each["energy_per_link_byte_j"]
            print(f"{what:16s} {error:6.1%}, with {driving:.0f} W and {byte:.2g} J/B")
        if gpu == "H200-SXM":
            print("time of a launch, predicted over measured, where the host does not bound it:")
            for op in dict.fromkeys(row.op for row in rows):
                ratios = [
                    float(collectives.time_s(op, float(row.bytes), 2, "nccl").time_s) / row.time_s
                    for row in rows
                    if row.op == op and not row.bound_by_host
                ]
                print(f"{op:16s} {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=pathlib.Path, nargs="?", default=POINTS)
    measured = read_points(parser.parse_args().points)
    base, fitted = fit(measured)
    before = point_errors(compare(points(), measured, base, TOP_CLOCK_HZ))
    after = point_errors(fitted.compared)
    print("points                n  time   power  off with the base; time   power  off calibrated")
    for kind, text in before.items():
        print(f"{kind:20s} {text}   {'':14s} {after[kind][5:]}")
    print("\ncoefficient                                   base  calibrated          std")
    for name in fitted.fitted:
        old, new = base[name], fitted.profile.coefficients[name]
        if abs(new.value / old - 1) >= 0.005:
            print(f"{name:40s} {old:9.3g}   {new.value:9.3g}  {new.value / old - 1:+6.1%}  {new.std:5.1%}")
    print("\nrecorded steps of vLLM   time, energy off:  base        calibrated           shipped")
    profiles = base, fitted.profile, load_profile("H100-SXM").at_release("0.25.1")
    for name in RUNS:
        errors = [step_errors(name, profile) for profile in profiles]
        for kind in errors[0]:
            cells = "   ".join(f"{time:7.1%} {energy:7.1%}" for time, energy in (each[kind] for each in errors))
            print(f"{name:20s} {kind:12s}  {cells}")
    print_collectives()


if __name__ == "__main__":
    main()
