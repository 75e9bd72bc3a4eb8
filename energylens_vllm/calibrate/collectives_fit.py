"""From measured collectives to an interconnect: NCCL's times scaled to them, and what driving links costs in joules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from energylens_vllm.calibrate.collectives import Row
from energylens_vllm.calibrate.fit import PRIOR_WEIGHT, ROBUST_SCALE
from energylens_vllm.calibrate.solve import least_squares
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.hardware.interconnect import Fit, Interconnect
from energylens_vllm.hardware.profile import Coefficient

#: Prior of the factor on a path's latency and on its seconds per byte (standard deviation of its logarithm).
SPREAD = 0.3
#: No coefficient of joules is known better than this from one machine.
LEAST_STD = 0.05


@dataclass(frozen=True, slots=True)
class FittedCollectives:
    """`errors`: mean absolute relative error of time, by operation, and of "power", after and before the fit."""

    interconnect: Interconnect
    errors: Mapping[str, tuple[float, float]]


def fit_collectives(node: Interconnect, rows: Sequence[Row], source: str) -> FittedCollectives:
    """Scale each operation's paths to the measured times, then solve for the power of communication."""
    fits, errors = dict(node.fits), {}
    for op in dict.fromkeys(row.op for row in rows):
        name, own = f"nccl.{op}", [row for row in rows if row.op == op]
        before = _time_errors(node, own)
        fits[name] = _scaled(node, name, own, source)
        after = _time_errors(replace(node, fits={**node.fits, name: fits[name]}), own)
        errors[op] = _mean(after), _mean(before)
    timed = replace(node, fits=fits, measured=True)
    driven = powered(timed, rows, source)
    if len(after := power_errors(driven, rows)):
        errors["power"] = _mean(after), _mean(power_errors(node, rows))
    return FittedCollectives(driven, errors)


def _mean(errors: Array) -> float:
    return float(np.mean(np.abs(np.expm1(errors))))


def _time_errors(node: Interconnect, rows: Sequence[Row]) -> Array:
    """log(predicted / measured) of each row's time; of one that the host bounds, only what exceeds it."""
    collectives = Collectives(node)
    predicted = [float(collectives.time_s(row.op, float(row.bytes), row.gpus, "nccl").time_s) for row in rows]
    errors = np.log(np.array(predicted) / [row.time_s for row in rows])
    return np.where([row.bound_by_host for row in rows], np.maximum(errors, 0.0), errors)


def _scaled(node: Interconnect, name: str, rows: Sequence[Row], source: str) -> Fit:
    """The paths of an operation with factors on their latency and on their seconds per byte."""
    known = node.fits[name]

    def at(x: Array) -> Fit:
        paths = []
        for path, (fixed, slope) in zip(known.paths, np.exp(SPREAD * x).reshape(-1, 2).tolist(), strict=True):
            paths.append(replace(
                path, latency_s=path.latency_s * fixed, hop_s=path.hop_s * fixed, byte_s=path.byte_s * slope,
                wire_byte_s=path.wire_byte_s * slope,
            ))  # fmt: skip
        return replace(known, paths=tuple(paths))

    def residuals(x: Array) -> Array:
        return np.concatenate([PRIOR_WEIGHT * x, _time_errors(replace(node, fits={**node.fits, name: at(x)}), rows)])

    found = least_squares(residuals, np.zeros(2 * len(known.paths)), ROBUST_SCALE)
    errors = found.residuals[2 * len(known.paths) :][[not row.bound_by_host for row in rows]]
    if not len(errors):
        return known
    return replace(
        at(found.x), sizes=tuple(sorted({*known.sizes, *(row.gpus for row in rows)})),
        max_bytes=max(known.max_bytes, float(max(row.bytes for row in rows))), std=float(np.sqrt(np.mean(errors**2))),
        source=f"{source}; started from {known.source}",
    )  # fmt: skip


def _above_idle(node: Interconnect, rows: Sequence[Row]) -> tuple[Array, Array, Array]:
    """Of each row with a counter that the host does not bound (there links and SMs rest, who knows how long): mean
    watts of a GPU, watts above idle, and a row of (share of the time in which the operation runs, bytes a second over a
    GPU's links), shape (N, 2)."""
    collectives = Collectives(node)
    power_w, above_w, columns = [], [], []
    for row in rows:
        if row.power_w and row.idle_power_w and not row.bound_by_host:
            timed = collectives.time_s(row.op, float(row.bytes), row.gpus, "nccl")
            power_w.append(float(np.mean(row.power_w)))
            above_w.append(power_w[-1] - float(np.mean(row.idle_power_w)))
            columns.append((min(float(timed.time_s) / row.time_s, 1.0), float(timed.wire_bytes) / row.time_s))
    return np.array(power_w), np.array(above_w), np.array(columns, dtype=np.float64).reshape(-1, 2)


def power_errors(node: Interconnect, rows: Sequence[Row]) -> Array:
    """log(predicted / measured) of a GPU's mean power."""
    power_w, above_w, columns = _above_idle(node, rows)
    driving = np.array([node["communication_power_w"], node["energy_per_link_byte_j"]])
    return np.asarray(np.log((power_w - above_w + columns @ driving) / power_w))


def powered(node: Interconnect, rows: Sequence[Row], source: str) -> Interconnect:
    """Power while a collective runs and joules of a byte sent, by least squares of relative errors; neither below 0."""
    power_w, above_w, columns = _above_idle(node, rows)
    if len(power_w) < 3:
        return node
    columns, target, use = columns / power_w[:, None], above_w / power_w, [0, 1]
    solution = np.zeros(2)
    for _ in range(2):
        solution = np.zeros(2)
        solution[use] = np.linalg.lstsq(columns[:, use], target, rcond=None)[0]
        if (solution >= 0).all():
            break
        use = [i for i in use if solution[i] > 0] or [0]
    scatter = float(np.sum((columns @ solution - target) ** 2)) / max(len(target) - len(use), 1)
    spread = np.sqrt(np.diag(scatter * np.linalg.pinv(columns.T @ columns)))
    coefficients = dict(node.coefficients)
    for i, name in enumerate(("communication_power_w", "energy_per_link_byte_j")):
        if solution[i] > 0:
            std = min(max(float(spread[i] / solution[i]), LEAST_STD), node.coefficients[name].std)
            coefficients[name] = Coefficient(float(solution[i]), round(std, 4), node.coefficients[name].unit, source)
    return replace(node, coefficients=coefficients)
