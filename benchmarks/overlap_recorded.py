"""What the model of overlap says of points that were measured (overlap_gpu.py), and how far off it is.

A layer is predicted as a step of it alone is: the GEMM and the all-reduce of Llama-3-70B under TP 2, with the profile
of the GPU that the result names. What overlap saves is against the same layer without it: in one stage, on all SMs, as
measured and as predicted. So errors of the GEMM alone or of the all-reduce alone do not count there, and what is left
is the model of overlap itself. Points whose launching took the host as long as the GPU worked are shown, and left out
of the errors.

What energylens_vllm/energy/overlap.py takes from here is printed too: the rate of an SM and the corner to all that NCCL
takes of itself, from all-reduces alone of the most rows; those of fewer rows are not used for it, nor is any overlapped
point. All-reduces of less than 8 MB took 47 us and more, whatever their size: launched one by one they wait for each
other.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from energylens_vllm.architectures import build, load_config
from energylens_vllm.calibrate.collectives import HOST_BOUND
from energylens_vllm.cli.table import percent, table
from energylens_vllm.einsum import Kernel, Mesh
from energylens_vllm.energy import Overlap
from energylens_vllm.energy.batch import steps_from_requests
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.energy.expert_exchange import ExpertExchanges
from energylens_vllm.energy.overlap import StagedStep, driven_by, on_fewer_sms
from energylens_vllm.energy.step import Exchanged, GpuStep
from energylens_vllm.energy.timing import roofline
from energylens_vllm.hardware import load_profile
from energylens_vllm.serving.start import gpu_of

#: The GEMM by its k.
GEMMS = {4096: "layer.o", 14336: "layer.down"}


#: Rows of the all-reduces that SMs' rates are fitted on, and of those held out.
FITTED_ROWS, HELD_OUT_ROWS = 8192, (4096, 2048, 1024)
CORNERS = tuple(np.arange(1.0, 10.5, 0.5))


@dataclass(frozen=True)
class Layer:
    """Seconds of a layer and joules of all GPUs, NaN where the point was too short for the counter."""

    time_s: float
    energy_j: float


class Model:
    """Predictions of points."""

    def __init__(self, gpu: str, gpus: int, unlimited_sms: int) -> None:
        self._profile, self._gpus, self._unlimited_sms = load_profile(gpu), gpus, unlimited_sms
        self._collectives = Collectives.of(self._profile)
        self._kernels = {
            kernel.name: kernel for kernel in build(load_config("llama-3-70b")).kernels(mesh=Mesh(tp=gpus))
        }

    def layer(self, point: Mapping[str, Any]) -> Layer:
        """Of a `Point` of overlap_gpu.py that is not idle."""
        gemm = self._kernels[GEMMS.get(point["k"], "layer.o")]
        reduce = self._kernels[f"{gemm.name}.all_reduce"]
        sms = point["ctas"] or self._unlimited_sms
        profile = on_fewer_sms(self._profile, point["spared"]) if point["spared"] else self._profile

        def collective(kernel: Kernel, message_bytes: Any) -> Exchanged:
            if point["ctas"]:
                return driven_by(self._collectives, self._profile.name, sms, kernel, message_bytes)
            return Exchanged(*self._collectives.kernel(kernel, message_bytes, "nccl"))

        kernels = {"gemm": (gemm,), "all_reduce": (reduce,), "pair": (gemm, reduce)}[point["what"]]
        if point["what"] == "pair" and point["stages"] > 1:
            exchanges = ExpertExchanges(self._collectives, (), "allgather_reducescatter", 1, fp8=False)
            step: GpuStep = StagedStep(
                Overlap(point["stages"], sms), self._collectives, exchanges, [kernels], (), self._profile, None, ()
            )
        else:
            step = GpuStep([kernels], (), profile, None, (), collective=collective)
        of_all = step.evaluate(steps_from_requests([(point["rows"], 0)], ()))
        gpu_j = sum(of_all.components.values()) + of_all.static_w * of_all.gpu_s
        return Layer(float(of_all.gpu_s.item()) / gemm.count, self._gpus * float(gpu_j.item()) / gemm.count)


def measured(point: Mapping[str, Any]) -> Layer:
    """The slowest rank's seconds, and the power of all GPUs over them."""
    time_s = max(point["rank_s"])
    power_w = [window["power_w"] if window else math.nan for window in point["gpus"]]
    return Layer(time_s, sum(power_w) * time_s)


def host_bound(point: Mapping[str, Any]) -> bool:
    """Whether launching took the host as long as the GPU worked."""
    return bool(point["host_s"] >= HOST_BOUND * point["time_s"])


@dataclass(frozen=True)
class Compared:
    """A point, and the layer without overlap beside it (None for what is not a pair)."""

    point: Mapping[str, Any]
    measured: Layer
    predicted: Layer
    plain: tuple[Layer, Layer] | None = None  #: measured, predicted

    @property
    def host_bound(self) -> bool:
        return host_bound(self.point)

    @property
    def overlapped(self) -> bool:
        return bool(self.point["what"] == "pair" and self.point["stages"] > 1)

    @property
    def spared(self) -> bool:
        """Whether the GEMM left free what the all-reduce takes, as the model has it."""
        return bool(self.point["spared"])

    def ratio(self, quantity: str) -> float:
        """Predicted over measured; `quantity` is a field of `Layer`."""
        return float(getattr(self.predicted, quantity) / getattr(self.measured, quantity))

    def changes(self, quantity: str) -> tuple[float, float]:
        """What overlap changes, measured and predicted, as a part of the layer without it."""
        if self.plain is None:
            return math.nan, math.nan
        return (
            getattr(self.measured, quantity) / getattr(self.plain[0], quantity) - 1,
            getattr(self.predicted, quantity) / getattr(self.plain[1], quantity) - 1,
        )


def compare(result: Mapping[str, Any]) -> list[Compared]:
    """All points that are not idle, in the order in which they were measured. Raises EnergyLensError for a GPU that has
    no profile."""
    name = result["device"][0]["name"]
    model = Model(gpu_of(name) or name, result["gpus"], unlimited_sms(result))
    points = [point for point in result["points"] if point["what"] != "idle"]
    plain = {
        (point["k"], point["rows"]): (measured(point), model.layer(point))
        for point in points
        if point["what"] == "pair" and point["stages"] == 1 and not point["graph"]
    }
    return [
        Compared(
            point, measured(point), model.layer(point),
            plain.get((point["k"], point["rows"])) if point["what"] == "pair" else None,
        )
        for point in points
    ]  # fmt: skip


def unlimited_sms(result: Mapping[str, Any]) -> int:
    """CTAs of NCCL's kernels where it was not limited, by the trace."""
    return max(
        kernel["grid"][0]
        for trace in result["traces"]
        if not trace["ctas"]
        for kernel in trace["kernels"]
        if "nccl" in kernel["name"].lower()
    )


def spread(ratios: Iterable[float]) -> tuple[float, float]:
    """Of predicted over measured: mean absolute error, and the root mean square of the logarithm, which is what an
    interval takes for a standard deviation. Points without a counter are left out."""
    values = np.array([ratio for ratio in ratios if not math.isnan(ratio)])
    return float(np.mean(np.abs(values - 1))), float(np.sqrt(np.mean(np.log(values) ** 2)))


def overlap_ratio(row: Compared, quantity: str) -> float:
    """Predicted over measured, each relative to the layer without overlap."""
    found, said = row.changes(quantity)
    return (1 + said) / (1 + found)


def channel_fit(result: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes a second of one SM, by 1 and 4 CTAs, and the corner that 16 of them ask for."""
    node = Collectives.load(gpu_of(result["device"][0]["name"]) or "")
    measured_s = {
        point["ctas"]: measured(point).time_s
        for point in result["points"]
        if point["what"] == "all_reduce" and point["rows"] == FITTED_ROWS
    }
    timed = node.time_s("all_reduce", np.array([FITTED_ROWS * result["columns"] * 2.0]), result["gpus"], "nccl")
    (whole_s,), (sent,) = timed.time_s, timed.wire_bytes
    rate = float(np.mean([sent / (ctas * measured_s[ctas]) for ctas in (1, 4)]))

    def error(corner: float) -> float:
        return abs(math.log(float(roofline(whole_s, sent / (16 * rate), corner).time_s) / measured_s[16]))

    return rate, float(min(CORNERS, key=error))


def power_fit(result: Mapping[str, Any]) -> tuple[float, float, float]:
    """Watts above idle of a GPU in an all-reduce alone: as long as it runs, for each byte a second that it sends, and
    the largest error of a line through all numbers of CTAs and rows."""
    points = [point for point in result["points"] if all(point["gpus"])]
    power_w = [float(np.mean([window["power_w"] for window in point["gpus"]])) for point in points]
    idle_w = power_w[next(i for i, point in enumerate(points) if point["what"] == "idle")]
    rows = [i for i, point in enumerate(points) if point["what"] == "all_reduce" and not host_bound(point)]
    sent = 2 * (1 - 1 / result["gpus"]) * result["columns"] * 2.0  # bytes for each row of a ring's
    terms = np.array([[1.0, sent * points[i]["rows"] / measured(points[i]).time_s] for i in rows])
    above_w = np.array([power_w[i] - idle_w for i in rows])
    (running_w, byte_j), *_ = np.linalg.lstsq(terms, above_w, rcond=None)
    return float(running_w), float(byte_j), float(np.max(np.abs(terms @ (running_w, byte_j) - above_w)))


def best_sms(rows: Iterable[Compared], quantity: str) -> Iterator[tuple[str, int, int]]:
    """For each layer, rows and stages that were measured with several numbers of CTAs (0: as many as NCCL takes), the
    best of them, measured and predicted."""
    groups: dict[tuple[int, int, int], list[Compared]] = {}
    for row in rows:
        groups.setdefault((row.point["k"], row.point["rows"], row.point["stages"]), []).append(row)
    for (k, tokens, stages), group in groups.items():
        if len({row.point["ctas"] for row in group}) > 1:
            first, second = (
                min(group, key=lambda row: getattr(getattr(row, side), quantity)) for side in ("measured", "predicted")
            )
            yield f"{GEMMS[k]}, {tokens} rows, {stages} stages", first.point["ctas"], second.point["ctas"]


def report(path: pathlib.Path) -> str:
    """Tables of everything."""
    result = json.loads(path.read_text())
    rows = compare(result)
    alone = [row for row in rows if row.point["what"] != "pair"]
    overlapped = [row for row in rows if row.overlapped]
    counted = [row for row in overlapped if row.spared and not row.host_bound]
    lines = ["GEMM and all-reduce alone; sms: NCCL's, or those that the GEMM leaves free", "", _table(alone), ""]
    lines += ["both; change: against one stage on all SMs, measured and predicted", ""]
    lines += [_table(row for row in rows if row.point["what"] == "pair"), "", "predicted over measured", ""]
    groups = {
        "GEMM alone": [row for row in alone if row.point["what"] == "gemm" and not row.host_bound],
        "all-reduce alone": [row for row in alone if row.point["what"] == "all_reduce" and not row.host_bound],
        "- few SMs, held out": [row for row in alone if row.point["ctas"] and row.point["rows"] in HELD_OUT_ROWS],
        "one after the other": [row for row in rows if row.plain and not row.overlapped and not row.host_bound],
        "overlapped": counted,
    }
    summary = [
        [name, str(len(group)), *_spreads(group, Compared.ratio)] for name, group in groups.items() if group
    ]  # fmt: skip
    summary.append(["overlapped, against not", str(len(counted)), *_spreads(counted, overlap_ratio)])
    lines += [table(["", "points", "time MAPE", "std", "energy MAPE", "std"], summary), ""]
    rate, corner = channel_fit(result)
    running_w, byte_j, error_w = power_fit(result)
    lines += [
        f"an SM sends {rate / 1e9:.1f} GB/s, corner {corner:.1f}",
        f"a GPU in an all-reduce alone draws {running_w:.0f} W above idle and {byte_j * 1e9:.2f} nJ a byte sent, "
        f"within {error_w:.0f} W",
        "",
    ]
    best = [
        [name, quantity, *(str(ctas or "NCCL's") for ctas in pair)]
        for quantity in ("time_s", "energy_j")
        for name, *pair in best_sms(counted, quantity)
    ]
    return "\n".join([*lines, table(["best number of SMs", "of", "measured", "predicted"], best, left=2)])


def _spreads(rows: Iterable[Compared], ratio: Any) -> list[str]:
    rows = list(rows)
    return [percent(value) for quantity in ("time_s", "energy_j") for value in spread(ratio(r, quantity) for r in rows)]


def _table(rows: Iterable[Compared]) -> str:
    lines = []
    for row in rows:
        point, pair = row.point, row.point["what"] == "pair"
        name = {"gemm": "gemm", "all_reduce": "all-reduce", "pair": "both"}[point["what"]]
        notes = [note for note, holds in (("graph", point["graph"]), ("host", row.host_bound)) if holds]
        if row.overlapped and not row.spared:
            notes.append("all SMs")
        sms = point["spared"] if point["what"] == "gemm" else point["ctas"] or "-"
        line = [f"{name} {point['k'] or ''}".strip(), *(str(v) for v in (point["rows"], point["stages"], sms))]
        for quantity, unit in (("time_s", 1e-6), ("energy_j", 1e-3)):
            values = [getattr(layer, quantity) / unit for layer in (row.measured, row.predicted)]
            line += ["-" if math.isnan(value) else f"{value:.0f}" for value in values]
            line.append(percent(row.ratio(quantity) - 1, signed=True))
            if pair:
                line += [percent(change, signed=True) if row.overlapped else "" for change in row.changes(quantity)]
        lines.append([*line, " ".join(notes)])
    changes = ["change", "said"] if lines and len(lines[0]) > 11 else []
    headers = ["", "rows", "stages", "sms", "us", "said", "error", *changes, "mJ", "said", "error", *changes, ""]
    return table(headers, lines)
