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
    powered = _powered(timed, rows, source)
    power_errors = [errors for errors in (_power_errors(powered, rows), _power_errors(node, rows)) if len(errors)]
    if power_errors:
        errors["power"] = _mean(power_errors[0]), _mean(power_errors[1])
    return FittedCollectives(powered, errors)


def _mean(errors: Array) -> float:
    return float(np.mean(np.abs(np.expm1(errors))))


def _time_errors(node: Interconnect, rows: Sequence[Row]) -> Array:
    """log(predicted / measured) of each row's time."""
    collectives = Collectives(node)
    predicted = [float(collectives.time_s(row.op, float(row.bytes), row.gpus, "nccl").time_s) for row in rows]
    return np.log(np.array(predicted) / [row.time_s for row in rows])


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
    errors = found.residuals[2 * len(known.paths) :]
    return replace(
        at(found.x), sizes=tuple(sorted({*known.sizes, *(row.gpus for row in rows)})),
        max_bytes=max(known.max_bytes, float(max(row.bytes for row in rows))), std=float(np.sqrt(np.mean(errors**2))),
        source=f"{source}; started from {known.source}",
    )  # fmt: skip


def _above_idle(node: Interconnect, rows: Sequence[Row]) -> tuple[Array, Array, Array]:
    """Of each row with a counter: mean watts of a GPU, watts above idle, and bytes a second over a GPU's links."""
    collectives = Collectives(node)
    columns = []
    for row in rows:
        if row.power_w and row.idle_power_w:
            wire = float(collectives.time_s(row.op, float(row.bytes), row.gpus, "nccl").wire_bytes)
            power, idle = float(np.mean(row.power_w)), float(np.mean(row.idle_power_w))
            columns.append((power, power - idle, wire / row.time_s))
    power_w, above_w, sent = np.array(columns, dtype=np.float64).reshape(-1, 3).T
    return power_w, above_w, sent


def _power_errors(node: Interconnect, rows: Sequence[Row]) -> Array:
    """log(predicted / measured) of a GPU's mean power over measured seconds."""
    power_w, above_w, sent = _above_idle(node, rows)
    predicted = power_w - above_w + node["communication_power_w"] + node["energy_per_link_byte_j"] * sent
    return np.log(predicted / power_w)


def _powered(node: Interconnect, rows: Sequence[Row], source: str) -> Interconnect:
    """Power while a collective runs and joules of a byte sent, by least squares of relative errors; neither below 0."""
    power_w, above_w, sent = _above_idle(node, rows)
    if len(power_w) < 3:
        return node
    columns = np.stack([np.ones_like(sent), sent], axis=1) / power_w[:, None]
    target, use = above_w / power_w, [0, 1]
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
