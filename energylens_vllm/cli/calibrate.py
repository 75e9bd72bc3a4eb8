"""Measure a GPU of this machine and write a profile of it, which `--gpu PROFILE.json` takes everywhere.

    energylens calibrate --out h100.json

Runs single kernels (GEMMs, attention, experts, memory, launches) and idle states for a second or two each and reads
the GPU's energy counter, under five minutes in all. What that tells is fitted, starting from the shipped profile of
the same GPU; the profile says of each coefficient where it is from. Needs torch, and the GPU to itself. With vLLM
installed its attention and experts are measured; else torch's attention, for its joules. See docs/calibrate.md.

With --collectives it measures all-reduce, all-gather, reduce-scatter and all-to-all among several GPUs instead, about
a minute and a half, and puts the interconnect into the profile (its own earlier one, or a shipped one).

Each point is kept beside the profile as it is measured (PROFILE.points.jsonl): a run that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from energylens_vllm import __version__
from energylens_vllm.calibrate.collectives import OPERATIONS, SIZES, Row, measure_collectives
from energylens_vllm.calibrate.collectives_fit import FittedCollectives, fit_collectives
from energylens_vllm.calibrate.cuda import Cuda
from energylens_vllm.calibrate.device import CalibrationError, Device, open_device
from energylens_vllm.calibrate.measure import Outcome, Progress, measure
from energylens_vllm.calibrate.measured import Log, write_atomically
from energylens_vllm.calibrate.points import points
from energylens_vllm.calibrate.profile_fit import Fitted, Machine, fit_points, report, start_profile
from energylens_vllm.cli.table import percent, quantity, seconds, table
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.hardware import GpuProfile, known_gpus, load_profile
from energylens_vllm.serving.start import gpu_of

#: What idle states, memory and a launch take: less would leave nothing to fit.
SHORTEST_BUDGET_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu-index", type=int, nargs="+", default=[0], metavar="N",
        help="which of the visible GPUs, as CUDA counts (default 0); of several each gets a profile, PROFILE.N.json",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="PROFILE.json", help="the profile to write (default: GPU's name)")
    parser.add_argument(
        "--budget", type=seconds, default=300.0, metavar="TIME",
        help="time for measuring, such as 5m (default) or 90s; points that do not fit are left out, and said to be",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="GPU",
        help="profile to start from, a known GPU or a .json (default: that of this GPU; needed for a GPU not known)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on with the points of an earlier run on this GPU with the same versions (default), or measure anew",
    )  # fmt: skip
    parser.add_argument("--collectives", action="store_true", help="measure collectives among several GPUs instead")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="how many, with --collectives (default 2)")


def run(args: argparse.Namespace) -> int:
    if args.collectives:
        return run_collectives(args)
    if len(args.gpu_index) > 1:
        return run_several(args)
    return run_points(args, args.gpu_index[0])


def run_several(args: argparse.Namespace) -> int:
    """One GPU after the other, each in a process of its own: an idle GPU is one without a CUDA context."""
    out = _out(args.out, open_device(args.gpu_index[0]).facts.name)
    status = 0
    for index in args.gpu_index:
        command = [sys.executable, "-m", "energylens_vllm.cli", "calibrate", "--gpu-index", str(index)]
        command += ["--out", str(out.with_suffix(f".{index}.json")), "--budget", f"{args.budget:g}s"]
        command += ["--base", args.base] if args.base else []
        command += [] if args.resume else ["--no-resume"]
        _say(f"GPU {index}")
        status = max(status, subprocess.run(command, check=False).returncode)
    return status


def run_points(args: argparse.Namespace, index: int) -> int:
    if args.budget < SHORTEST_BUDGET_S:
        raise CalibrationError(f"--budget: {args.budget:g} s; accepted: {SHORTEST_BUDGET_S:.0f} s or more, such as 5m")
    device = open_device(index)
    facts = device.facts
    base, same_gpu = base_profile(facts.name, args.base)
    out = _out(args.out, facts.name)
    if facts.processes:
        raise CalibrationError(
            f"calibrate: {facts.processes} other processes compute on GPU {index}, whose joules would be "
            "taken for ours; stop them first (nvidia-smi lists them)"
        )
    header = {
        "gpu": facts.name, "uuid": facts.uuid, "driver": facts.driver, "limit_w": facts.limit_w,
        "energylens": __version__, "torch": _version("torch"), "vllm": _version("vllm"), "points": _digest(),
    }  # fmt: skip
    machine = Cuda(device, index)
    log = Log(out.with_suffix(".points.jsonl"), header, args.resume)
    if log.measured:
        _say(f"goes on with {len(log.measured)} points of an earlier run in {log.path}; --no-resume measures all anew")
    try:
        outcome = measure(machine, points(), log, args.budget, _Bar())
    except KeyboardInterrupt:
        _say(f"\ninterrupted; {len(log.measured)} points are in {log.path}, and the same command goes on from there")
        return 130
    fitted = _fit(base, same_gpu, device, machine, log, header)
    _write(out, fitted, log, outcome, header | {"base": base.name}, facts.top_clock_hz)
    print(summary(fitted, outcome))
    print(f"\nwrote {out}; use it with --gpu {out}, or the plugin's setting gpu")
    return 0


def base_profile(gpu_name: str, base: str | None) -> tuple[GpuProfile, bool]:
    """The profile to start from, at the installed vLLM's release, and whether it is of this GPU.

    Raises EnergyLensError for a GPU that is not known where no base is given.
    """
    known = gpu_of(gpu_name)
    if known is None and base is None:
        raise CalibrationError(
            f"calibrate: no profile of {gpu_name!r} to start from; choose the nearest with --base "
            f"({', '.join(known_gpus())}): what is not measured then is taken from it, and flagged"
        )
    profile = load_profile(base or str(known))
    release = re.match(r"\d+\.\d+\.\d+", _version("vllm") or "")
    if release:
        profile = profile.at_release(release.group())
    return profile, profile.name in (known, gpu_name)


def _fit(base: GpuProfile, same_gpu: bool, device: Device, machine: Cuda, log: Log, header: dict[str, Any]) -> Fitted:
    facts = device.facts
    seen = Machine(
        name=facts.name, sm_count=machine.sm_count, memory_bytes=facts.memory_bytes,
        bandwidth_bytes_per_s=facts.bandwidth_bytes_per_s, top_clock_hz=facts.top_clock_hz, limit_w=facts.limit_w,
        l2_bytes=machine.l2_bytes,
    )  # fmt: skip
    source = _source(f"one {facts.name}", facts.driver)
    return fit_points(start_profile(base, seen, same_gpu), points(), log.measured, facts.top_clock_hz, source)


def _write(out: Path, fitted: Fitted, log: Log, outcome: Outcome, about: dict[str, Any], top_clock_hz: float) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {**about, "date": now, "seconds": round(outcome.elapsed_s, 1), "top_clock_hz": top_clock_hz}
    profile = replace(fitted.profile, calibration=report(fitted, log.measured, outcome.skipped, about))
    if out.is_file():  # what --collectives measured before stays
        profile = replace(profile, interconnect=load_profile(out).interconnect)
    write_atomically(out, json.dumps(profile.to_json(), indent=1) + "\n")


def summary(fitted: Fitted, outcome: Outcome) -> str:
    """What was measured beside what the profile says now, and what was not."""

    def error(predicted: float | None, seen: float) -> str:
        return "-" if predicted is None else percent(predicted / seen - 1, signed=True)

    rows = [
        [
            row.point, quantity(row.time_s, "s") if row.time_s else "-", error(row.predicted_s, row.time_s),
            quantity(row.power_w, "W"), error(row.predicted_w, row.power_w),
        ]
        for row in fitted.compared
    ]  # fmt: skip
    lines = [table(["point", "time", "error", "power", "error"], rows)]
    lines.append("\n".join(
        f"{which}: time {percent(errors['time'])}, power {percent(errors['power'])} off on average"
        for which, errors in (("base profile", fitted.before), ("this profile", fitted.after))
    ))  # fmt: skip
    lines.append(f"{len(fitted.fitted)} coefficients fitted; the others are the base profile's")
    if outcome.skipped:
        lines.append("\n".join(f"not measured: {one.point}: {one.reason}" for one in outcome.skipped))
    return "\n\n".join(lines)


def run_collectives(args: argparse.Namespace) -> int:
    device = open_device(args.gpu_index[0])
    facts = device.facts
    out = _out(args.out, facts.name)
    profile = load_profile(out) if out.is_file() else base_profile(facts.name, args.base)[0]
    _say(f"measures {len(OPERATIONS)} operations at {len(SIZES)} sizes among {args.gpus} GPUs, in a minute or two")
    rows = measure_collectives(args.gpus)
    beside = out.with_suffix(".collectives.json")
    write_atomically(beside, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    source = _source(f"{args.gpus} {facts.name}", facts.driver)
    node = Collectives.of(profile).interconnect
    fitted = fit_collectives(node, rows, source)
    write_atomically(
        out, json.dumps(replace(profile, interconnect=fitted.interconnect.to_json()).to_json(), indent=1) + "\n"
    )
    print(collectives_summary(rows, fitted))
    print(f"\nwrote {out} and, with every row, {beside}")
    return 0


def collectives_summary(rows: Sequence[Row], fitted: FittedCollectives) -> str:
    """What was measured, and how far the interconnect is off before and after."""

    def watts(values: Sequence[float] | None) -> str:
        return "-" if not values else " ".join(f"{value:.0f}" for value in values)

    lines = [table(
        ["operation", "bytes", "time", "of the host", "energy", "power of each, W", "idle, W"],
        [
            [
                row.op, str(row.bytes), quantity(row.time_s, "s"), quantity(row.host_s, "s"),
                "-" if row.energy_j is None else quantity(row.energy_j, "J"), watts(row.power_w),
                watts(row.idle_power_w),
            ]
            for row in rows
        ],
    )]  # fmt: skip
    lines.append("\n".join(
        f"{what}: {percent(before)} off on average before, {percent(after)} now"
        for what, (after, before) in fitted.errors.items()
    ))  # fmt: skip
    lines.append("\n".join(
        f"{name}: {c.value:.3g} {c.unit} ± {percent(c.std)}"
        for name, c in fitted.interconnect.coefficients.items()
        if name in ("communication_power_w", "energy_per_link_byte_j")
    ))  # fmt: skip
    return "\n\n".join(lines)


def _out(given: Path | None, gpu_name: str) -> Path:
    out = given or Path(f"{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower())}.json")
    if out.suffix != ".json":
        raise CalibrationError(f"--out: {str(out)!r} does not end in .json; that tells a profile's path from a name")
    return out


def _digest() -> str:
    """Of what is measured, so that points of another version's kernels are not taken for these."""
    return hashlib.sha256(repr(points()).encode()).hexdigest()[:16]


def _source(what: str, driver: str) -> str:
    today = datetime.date.today().isoformat()
    return f"measured by energylens calibrate {__version__} on {what}, driver {driver}, {today}"


class _Bar:
    """One line on stderr that is overwritten, or a line a point where stderr is not a terminal."""

    def __call__(self, at: Progress) -> None:
        width = 24
        filled = round(width * at.done / max(at.total, 1))
        bar = "#" * filled + "." * (width - filled)
        line = f"[{bar}] {at.done}/{at.total}  {at.elapsed_s:.0f} of {at.budget_s:.0f} s  {at.point}"
        if sys.stderr.isatty():
            end = "\n" if at.done == at.total else ""
            print(f"\r\x1b[K{line[:110]}", end=end, file=sys.stderr, flush=True)
        else:
            _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
