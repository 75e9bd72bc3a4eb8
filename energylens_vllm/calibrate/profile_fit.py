"""From measured points to a profile: fitted where points tell, elsewhere the values of the profile it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from energylens_vllm.calibrate.fit import PRIOR_WEIGHT, ROBUST_SCALE
from energylens_vllm.calibrate.measured import Measured, Skipped
from energylens_vllm.calibrate.points import Kind, Point, expected
from energylens_vllm.calibrate.reference import slower_in_steps
from energylens_vllm.calibrate.solve import least_squares
from energylens_vllm.energy.batch import Array
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware.profile import Coefficient, GpuProfile


class Prior(NamedTuple):
    """How far a coefficient may be from its start (relative std): on the GPU that the start is of, and on another."""

    same: float
    other: float


_COMMON = {
    "power.static_w": Prior(0.1, 0.5), "power.voltage_floor": Prior(0.05, 0.4), "power.limit_share": Prior(0.01, 0.02),
    "energy.memory_j_per_byte": Prior(0.15, 0.5), "energy.memory_core_share": Prior(0.1, 0.5),
}  # fmt: skip
#: What points of each kind can tell of.
FREE: Mapping[Kind, Mapping[str, Prior]] = {
    "idle": {"power.static_w": _COMMON["power.static_w"], "power.floor_w": Prior(0.2, 0.5)},
    "spin": {"power.static_w": _COMMON["power.static_w"]},
    "memory": {
        "power.static_w": _COMMON["power.static_w"], "energy.memory_j_per_byte": _COMMON["energy.memory_j_per_byte"],
    },
    "launch": {"elementwise.launch_s": Prior(0.5, 0.7)},
    "host": {},
    "linear": {
        **_COMMON,
        "energy.bfloat16.j_per_flop": Prior(0.2, 0.7), "linear.bfloat16.memory_efficiency": Prior(0.05, 0.2),
        "linear.bfloat16.compute_efficiency": Prior(0.05, 0.4), "linear.bfloat16.launch_s": Prior(0.2, 0.5),
        "linear.bfloat16.corner": Prior(0.2, 0.4), "linear.bfloat16.sm_load_bytes_per_s": Prior(0.1, 0.5),
    },
    "linear_fp8": {
        **_COMMON,
        "energy.fp8.j_per_flop": Prior(0.1, 0.7), "linear.fp8.memory_efficiency": Prior(0.1, 0.3),
        "linear.fp8.compute_efficiency": Prior(0.1, 0.4),
    },
    "decode": {
        **_COMMON,
        "attention.decode.memory_efficiency": Prior(0.05, 0.3), "attention.decode.launch_s": Prior(0.3, 0.5),
        "attention.decode.sequence_head_s": Prior(0.3, 0.7), "attention.decode.tile_rows": Prior(0.1, 0.5),
    },
    "prefill": {
        **_COMMON,
        "attention.prefill.compute_efficiency": Prior(0.1, 0.5), "attention.prefill.launch_s": Prior(0.2, 0.5),
        "energy.attention.j_per_flop": Prior(0.3, 0.7),
    },
    "experts": {
        **_COMMON,
        "experts.bfloat16.memory_efficiency": Prior(0.1, 0.3), "experts.bfloat16.compute_efficiency": Prior(0.2, 0.5),
        "experts.bfloat16.launch_s": Prior(0.3, 0.7), "experts.bfloat16.tile_s": Prior(0.5, 0.7),
        "experts.padding_energy_share": Prior(0.2, 0.7),
    },
}  # fmt: skip
#: A coefficient of which the points leave more than this of the prior's spread is not identified, and keeps its value.
IDENTIFIED = 0.7
#: Relative std of what was not measured on the GPU at least, where the start is of another GPU.
OTHER_GPU_STD = 0.3
#: Below this share of the top clock a GPU that says so is at its power limit all the time, not now and then.
LIMITED_CLOCK = 0.95
#: Points that say that joules of kernels in a format were measured: (kinds, how many of them, format).
FORMATS: Sequence[tuple[Kind, int, str]] = (
    ("linear", 4, "linear.bfloat16"), ("linear_fp8", 3, "linear.fp8"), ("experts", 3, "experts.bfloat16"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Start:
    """Where a fit starts. `same_gpu`: whether `profile` is of the GPU that was measured."""

    profile: GpuProfile
    same_gpu: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """What the driver says of the GPU, None where it does not."""

    name: str
    sm_count: int
    memory_bytes: float
    bandwidth_bytes_per_s: float
    top_clock_hz: float
    limit_w: float
    l2_bytes: float | None = None


def start_profile(base: GpuProfile, machine: Machine, same_gpu: bool) -> Start:
    """The base as far as it holds for this machine: with its limit and, if it is another GPU, its size and its rates.

    FLOPs follow SMs and clock; what else the base says of kernels and joules is all that is known, and made wider.
    """
    driver = "the driver of this GPU"
    coefficients = dict(base.coefficients)
    coefficients["power.limit_w"] = Coefficient(machine.limit_w, 0.0, "W", driver)
    if same_gpu:
        return Start(replace(base, coefficients=coefficients), True)
    for name, known in coefficients.items():
        if known.std > 0 and name != "power.limit_w":
            source = f"of the {base.name}, not measured on this GPU; {known.source}"
            coefficients[name] = replace(known, std=max(known.std, OTHER_GPU_STD), source=source)
    speed = machine.sm_count * machine.top_clock_hz
    base_flops = base["compute.bfloat16.peak_flops"]
    per_sm_clock = FLOPS_PER_SM_CLOCK.get(base.name, base_flops / (base.sm_count * machine.top_clock_hz))
    scale = speed * per_sm_clock / base_flops
    for name in [name for name in coefficients if name.endswith(".peak_flops")]:
        source = f"that of the {base.name} times SMs and top clock of this GPU"
        coefficients[name] = Coefficient(base[name] * scale, 0.0, "FLOP/s", source)
    coefficients["memory.bandwidth_bytes_per_s"] = Coefficient(machine.bandwidth_bytes_per_s, 0.0, "B/s", driver)
    if machine.l2_bytes is not None:
        usable = 0.7 * machine.l2_bytes  # as in the shipped profiles
        coefficients["memory.l2_bytes"] = Coefficient(usable, 0.3, "B", f"0.7 of its size, by {driver}")
    profile = replace(
        base, name=machine.name, sm_count=machine.sm_count, memory_bytes=machine.memory_bytes, calibrated=False,
        calibrated_formats=(), coefficients=coefficients,
    )  # fmt: skip
    return Start(profile, False)


#: bf16 FLOPs of one SM in a cycle, dense. Source: NVIDIA's architecture papers (as benchmarks/fit_profiles.py).
FLOPS_PER_SM_CLOCK = {
    "A100-SXM-80GB": 2048.0, "H100-SXM": 4096.0, "H200-SXM": 4096.0, "B200-SXM": 8192.0, "L40S": 1024.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compared:
    """A point, measured and as the fitted profile has it. None where a number has no counterpart."""

    point: str
    kind: Kind
    time_s: float
    predicted_s: float | None
    power_w: float
    predicted_w: float | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A profile and how it came about."""

    profile: GpuProfile
    fitted: tuple[str, ...]  #: coefficients that the points identify
    compared: tuple[Compared, ...]
    before: Mapping[str, float]  #: mean absolute relative errors of time and power before the fit
    after: Mapping[str, float]


def fit_points(
    start: Start, points: Sequence[Point], measured: Mapping[str, Measured], top_clock_hz: float, source: str
) -> Fitted:
    """Fit the coefficients that `measured` identifies. Raises EnergyLensError where nothing was measured."""
    found = [(point, measured[point.name]) for point in points if point.name in measured]
    if not found:
        raise EnergyLensError("calibrate: not one point was measured, so there is no profile to write")
    free: dict[str, float] = {}
    for point, seen in found:
        for name, prior in FREE[point.kind].items():
            if name in start.profile and not (_foreign(point, seen) and name.endswith(TIMES)):
                free[name] = prior.same if start.same_gpu else prior.other
    residuals = _Residuals(found, top_clock_hz, list(free))
    profile, left = _solve(start.profile, free, residuals, source)
    identified = {name: std for name, std in free.items() if left[name] <= IDENTIFIED * std}
    if identified != free:
        profile, left = _solve(start.profile, identified, residuals, source)
    coefficients = dict(profile.coefficients)
    for name in identified:
        coefficients[name] = replace(coefficients[name], std=round(left[name], 4))
    counts = {kind: sum(point.kind == kind for point, _ in found) for kind in FREE}
    formats = tuple(form for kind, least, form in FORMATS if counts[kind] >= least)
    if start.same_gpu:
        formats = tuple(dict.fromkeys((*start.profile.calibrated_formats, *formats)))
    profile = replace(
        profile, coefficients=coefficients, calibrated=bool(formats),
        calibrated_formats=formats, by_release={},
    )  # fmt: skip
    before, after = (_mean_errors(found, which, top_clock_hz) for which in (start.profile, profile))
    return Fitted(profile, tuple(sorted(identified)), _compared(found, profile, top_clock_hz), before, after)


#: Endings of coefficients of time, which a kernel other than vLLM's says nothing of.
TIMES = ("_s", "_efficiency", "corner", "tile_keys")


def _foreign(point: Point, seen: Measured) -> bool:
    """Whether attention was measured with torch's kernel: its joules count, at its own time."""
    return point.kind in ("decode", "prefill") and seen.library != "vllm"


def _predict(point: Point, seen: Measured, profile: GpuProfile, top_clock_hz: float) -> tuple[float | None, float]:
    """Seconds of the kernel alone (None where the model has none to compare) and watts.

    At the clock that was measured, and watts at the time that was: so neither depends on what limits the other.
    """
    clock = min(seen.clock_hz / top_clock_hz, 1.0) if math.isfinite(seen.clock_hz) else 1.0
    there = expected(point, profile, clock, seen.time_s if seen.time_s > 0 else None)
    timed = point.kind not in ("idle", "spin", "memory", "host") and not _foreign(point, seen)
    return (there.time_s / slower_in_steps(point) if timed else None), there.power_w


class _Residuals:
    """Errors of the points that have a prediction, for any profile. `free`: the coefficients in which profiles differ.

    A fit asks for hundreds of profiles of which each differs from the last in one coefficient, so what was computed for
    a point is kept for as long as none of those that concern it has changed.
    """

    def __init__(self, found: Sequence[tuple[Point, Measured]], top_clock_hz: float, free: Sequence[str]) -> None:
        self._found = [(point, seen) for point, seen in found if point.kind != "host"]
        self._top_clock_hz = top_clock_hz
        everywhere = set(_COMMON) | {"power.floor_w"}
        also = {"experts": {"elementwise.launch_s"}}  # of the kernels between the experts' two
        self._concerns = {
            kind: [name for name in free if name in everywhere | set(own) | also.get(kind, set())]
            for kind, own in FREE.items()
        }
        self._known: dict[tuple[str | float, ...], list[float]] = {}

    def __call__(self, profile: GpuProfile) -> Array:
        """log(predicted / measured) of every number that was measured."""
        if len(self._known) > 100 * len(self._found):
            self._known.clear()
        errors: list[float] = []
        for point, seen in self._found:
            values = [profile[name] for name in self._concerns[point.kind]]
            key: tuple[str | float, ...] = (point.name, *values)
            if key not in self._known:
                self._known[key] = self._errors(point, seen, profile)
            errors += self._known[key]
        return np.array(errors)

    def _errors(self, point: Point, seen: Measured, profile: GpuProfile) -> list[float]:
        errors = []
        time_s, power_w = _predict(point, seen, profile, self._top_clock_hz)
        if time_s is not None:
            errors.append(math.log(time_s / seen.time_s))
        if point.kind != "launch":  # nothing but a clock runs there, and how empty kernels toggle is not modelled
            errors.append(math.log(power_w / seen.power_w))
        if "power_cap" in seen.throttled and seen.clock_hz < LIMITED_CLOCK * self._top_clock_hz:
            errors.append(math.log(profile["power.limit_w"] * profile["power.limit_share"] / seen.power_w))
        return errors


def _solve(
    profile: GpuProfile, free: Mapping[str, float], residuals: _Residuals, source: str
) -> tuple[GpuProfile, dict[str, float]]:
    """The profile with the coefficients `free` fitted, each held near its value by a prior of that relative std; and
    the relative stds that are left."""
    names, spread = list(free), np.array([free[name] for name in free])
    start = np.log([profile[name] for name in names])
    near = max(len(names), 1)

    def at(x: Array) -> GpuProfile:
        return profile.with_values(dict(zip(names, np.exp(start + spread * x), strict=True)), source)

    def errors(x: Array) -> Array:
        return np.concatenate([PRIOR_WEIGHT * x, residuals(at(x))])

    if not names:
        return profile, {}
    found = least_squares(errors, np.zeros(near), ROBUST_SCALE)
    scatter = float(np.sum((found.weights * found.residuals) ** 2)) / max(len(found.residuals) - near, 1)
    # What points of one kind miss they miss together, so many of them do not make it certain: never below the prior's.
    square = found.jacobian.T @ (found.weights[:, None] * found.jacobian)
    covariance = max(scatter, PRIOR_WEIGHT**2) * np.linalg.pinv(square)
    left = np.minimum(np.sqrt(np.diag(covariance)), 1.0) * spread
    return at(found.x), dict(zip(names, left.tolist(), strict=True))


def compare(
    points: Sequence[Point], measured: Mapping[str, Measured], profile: GpuProfile, top_clock_hz: float
) -> tuple[Compared, ...]:
    """The points that were measured beside what a profile says of them."""
    return _compared(
        [(point, measured[point.name]) for point in points if point.name in measured], profile, top_clock_hz
    )


def _compared(
    found: Sequence[tuple[Point, Measured]], profile: GpuProfile, top_clock_hz: float
) -> tuple[Compared, ...]:
    rows = []
    for point, seen in found:
        if point.kind == "host":
            rows.append(Compared(point.name, point.kind, seen.time_s, None, seen.power_w, None))
            continue
        time_s, power_w = _predict(point, seen, profile, top_clock_hz)
        rows.append(Compared(point.name, point.kind, seen.time_s, time_s, seen.power_w, power_w))
    return tuple(rows)


def _mean_errors(found: Sequence[tuple[Point, Measured]], profile: GpuProfile, top_clock_hz: float) -> dict[str, float]:
    """Mean absolute relative errors, of all points that have a prediction, and how many those are."""
    rows = _compared(found, profile, top_clock_hz)
    times = [abs(row.predicted_s / row.time_s - 1) for row in rows if row.predicted_s is not None]
    powers = [
        abs(row.predicted_w / row.power_w - 1) for row in rows if row.predicted_w is not None and row.kind != "launch"
    ]
    return {
        "time": float(np.mean(times)) if times else math.nan,
        "power": float(np.mean(powers)) if powers else math.nan,
        "points": float(len(rows)),
    }


def report(
    fitted: Fitted, measured: Mapping[str, Measured], skipped: Sequence[Skipped], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What the profile's file says of its calibration."""
    seen = [one for one in measured.values() if math.isfinite(one.temperature_celsius)]
    degrees = [one.temperature_celsius for one in seen]
    clocks = [one.clock_hz for one in measured.values() if math.isfinite(one.clock_hz)]
    fields = {
        **about,
        "temperature_celsius": [min(degrees), max(degrees)] if degrees else None,
        "sm_clock_hz": [min(clocks), max(clocks)] if clocks else None,
        "fit_error": {name: round(value, 4) for name, value in fitted.after.items() if math.isfinite(value)},
        "error_before": {name: round(value, 4) for name, value in fitted.before.items() if math.isfinite(value)},
        "fitted": list(fitted.fitted),
        "not_measured": [{"point": one.point, "reason": one.reason} for one in skipped],
        "points": [
            {
                "point": row.point, "time_s": row.time_s, "predicted_s": row.predicted_s, "power_w": row.power_w,
                "predicted_w": row.predicted_w, "clock_hz": measured[row.point].clock_hz,
                "throttled": list(measured[row.point].throttled), "library": measured[row.point].library,
                "windows": measured[row.point].windows,
            }
            for row in fitted.compared
        ],
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}
