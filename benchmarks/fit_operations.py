"""Fit the times of single kernels on measured operations, and print how well the closed forms hold.

    python benchmarks/fit_operations.py DATA [--gpu H200-SXM] [--json FOLDER] [--quick]

DATA is a folder with gemm_*.parquet, moe_*.parquet, ctxattn_*.parquet and genattn_*.parquet: tables of NVIDIA's
AIConfigurator database (Apache-2.0), one row an operation of vLLM, latency_s its mean in a CUDA graph. Needs pandas,
pyarrow and scipy (`pip install pandas pyarrow scipy`). --json writes one file a GPU, {coefficient: {value, std, unit,
source}}; std is relative. --quick leaves out the fits for the held-out error.

Errors are relative, |predicted / measured - 1|: mean (MAPE), median and 90th percentile over all rows, and the mean
over shapes that were left out of the fit (a third of the (n, k), (hidden, intermediate, experts, degrees) or (heads,
window), three times). Rows of block-scaled GEMMs that wait for the host are not counted.

The tables replay one operation over and over, sometimes at the GPU's power limit. Three numbers a fit has for that,
which no profile takes over: the share of the L2 cache that keeps data from one replay to the next, how much faster it
is than HBM, and the share of the peak that the power limit sustains.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from energylens_vllm.energy import timing

try:
    import pandas as pd
    from scipy.optimize import least_squares
except ImportError as missing:
    sys.exit(f"fit_operations.py: {missing}; install with: pip install pandas pyarrow scipy")


@dataclass(frozen=True)
class Gpu:
    """`flops_per_clock`: dense bf16 FLOPs of an SM in a clock. Sources: NVIDIA's data sheets, architecture papers."""

    table: str
    release: str
    sm_count: int
    flops_per_clock: int
    top_clock_hz: float
    bandwidth: float
    l2_bytes: float

    @property
    def peak(self) -> float:
        return self.sm_count * self.flops_per_clock * self.top_clock_hz


GPUS = {
    "A100-SXM-80GB": Gpu("a100_sxm", "0.14.0", 108, 2048, 1.41e9, 2.039e12, 40e6),
    "H100-SXM": Gpu("h100_sxm", "0.24.0", 132, 4096, 1.98e9, 3.35e12, 50e6),
    "H200-SXM": Gpu("h200_sxm", "0.22.0", 132, 4096, 1.98e9, 4.8e12, 50e6),
    "B200-SXM": Gpu("b200_sxm", "0.22.0", 148, 8192, 1.965e9, 8.0e12, 126e6),
    "L40S": Gpu("l40s", "0.24.0", 142, 1024, 2.52e9, 0.864e12, 96e6),
}


@dataclass(frozen=True)
class Format:
    """Bytes per weight and per input element as the tensor cores take them; peak relative to bf16."""

    weight: float
    input: float
    peak: float


FORMATS = {
    "bfloat16": Format(2.0, 2.0, 1),
    "fp8": Format(1.0, 1.0, 2),
    "fp8_block": Format(1.0 + 4 / 16384, 1.0, 2),
    "nvfp4": Format(0.5 + 1 / 16, 0.5 + 1 / 16, 4),
    "int8_wo": Format(1.0 + 2 / 128, 2.0, 1),
    "int4_wo": Format(0.5 + 2.5 / 128, 2.0, 1),
    "mxfp4": Format(0.5 + 1 / 32, 2.0, 1),
}

SECONDS, RATE, SHARE, ONE = "s", "B/s", "share of the nominal rate", "1"


@dataclass(frozen=True)
class Free:
    """A number to fit: where to start and the range that has a meaning."""

    start: float
    low: float
    high: float
    unit: str = SHARE


REPLAY = {"replay.l2_share": Free(0.3, 1e-3, 1.0), "replay.l2_gain": Free(2.0, 0.1, 8.0)}
POWER = {"power.sustained": Free(0.7, 0.2, 1.0)}
#: Kernels that do not split k, as a cost that no split is worth.
NEVER_S = 1.0
#: Launch of a block-scaled GEMM and of the kernel that quantizes its input, where the table shows the host's time only:
#: that of fp8 with one scale a row (5.1-5.5 us in the tables of H100 and L40S).
BLOCK_LAUNCH_S = 5.3e-6
#: Least time of a kernel that is replayed in a CUDA graph: the smallest GEMMs of the tables take 2.0-2.6 us.
ELEMENTWISE_LAUNCH_S = 2.4e-6
ELEMENTWISE = "elementwise.memory_efficiency"
EFFICIENCY = Free(0.8, 0.05, 0.97)
CORNER = Free(2.5, 1.0, 8.0, ONE)


@dataclass(frozen=True)
class Problem:
    """One table of one kernel: `predict(values, rows)` gives the seconds of the rows with these numbers."""

    prefix: str
    file: str
    free: Mapping[str, Free]
    fixed: Mapping[str, float]
    columns: Mapping[str, Any]
    groups: Any
    predict: Callable[[Mapping[str, float], Mapping[str, Any]], Any]
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  #: columns that were not fitted, by a name

    def rows(self, index: Any) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True)
class Fitted:
    values: dict[str, float]
    std: dict[str, float]
    rows: int = 0
    errors: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    held_out: float = math.nan


def misses(bytes_: Any, cache: float) -> Any:
    """Share of the bytes that a replay fetches from HBM again: all once they are more than the cache keeps."""
    return 1 / (1 + (cache / np.maximum(bytes_, 1.0)) ** 4)


def spilled(bytes_: Any, gpu: Gpu) -> Any:
    """Activation bytes that reach HBM: what fits the L2 cache stays there. Soft, as in the step model."""
    return bytes_ * bytes_ / (bytes_ + 0.7 * gpu.l2_bytes)


def solve(problem: Problem, index: Any, start: Mapping[str, float] | None = None) -> tuple[dict[str, float], Any]:
    """Least squares on the logarithm of time, robust, each number in the logarithm within its range."""
    names = list(problem.free)
    low, high = (np.log([getattr(problem.free[n], side) for n in names]) for side in ("low", "high"))
    first = np.log([start[n] if start else problem.free[n].start for n in names])
    rows = problem.rows(index)

    def residual(logs: Any) -> Any:
        values = {**problem.fixed, **dict(zip(names, np.exp(logs), strict=True))}
        return np.log(problem.predict(values, rows) / rows["seconds"])

    span = high - low
    result = least_squares(
        residual, np.clip(first, low + 0.01 * span, high - 0.01 * span), bounds=(low, high), loss="soft_l1",
        f_scale=0.1, max_nfev=20 if start else 60,
    )  # fmt: skip
    return dict(zip(names, np.exp(result.x), strict=True)), result


def fit(problem: Problem, quick: bool, limit: int = 3000) -> Fitted:
    """The fit over all rows (a random `limit` of them), its errors over all of them, and the held-out error."""
    count = len(problem.columns["seconds"])
    random = np.random.default_rng(0)
    sample = random.permutation(count)[:limit]
    values, result = solve(problem, sample)
    measured = problem.columns["seconds"]
    error = np.abs(problem.predict({**problem.fixed, **values}, problem.columns) / measured - 1)
    # Rows that only wait for the host are as good as any constant: they tell nothing of the kernel.
    told = measured > 1.2 * values.get("replay.host_s", 0.0)

    # Rows of one shape share their error, so the fit knows as many independent numbers as there are shapes. A number
    # that the rows say nothing of keeps a standard deviation of a factor e.
    shapes = len(np.unique(problem.groups[sample]))
    scale = np.mean(result.fun**2) * len(sample) / max(shapes - len(values), 1)
    information = result.jac.T @ result.jac / scale + np.eye(len(values))
    std = dict(zip(values, np.sqrt(np.diag(np.linalg.inv(information))).tolist(), strict=True))

    held_out = math.nan
    if not quick:
        fold, left = problem.groups % 3, np.full(count, np.nan)
        for part in range(3):
            inside, outside = np.flatnonzero(fold != part), np.flatnonzero(fold == part)
            own, _ = solve(problem, random.permutation(inside)[: limit // 3], values)
            rows = problem.rows(outside)
            left[outside] = np.abs(problem.predict({**problem.fixed, **own}, rows) / rows["seconds"] - 1)
        held_out = float(np.nanmean(left[told]))
    return Fitted({**problem.fixed, **values}, std, int(told.sum()), summary(error[told]), held_out)


def summary(error: Any) -> tuple[float, float, float]:
    """Mean, median and 90th percentile."""
    return float(error.mean()), float(np.median(error)), float(np.quantile(error, 0.9))


# -- problems ---------------------------------------------------------------------------------------------------------


def read(data: pathlib.Path, family: str, gpu: Gpu) -> tuple[str, pd.DataFrame]:
    file = f"{family}_{gpu.table}_vllm{gpu.release}.parquet"
    table = pd.read_parquet(data / file)
    if "window_size" not in table:
        table["window_size"] = 0
    return file, table


def floats(table: pd.DataFrame, **names: str) -> dict[str, Any]:
    return {short: table[name].to_numpy(float) for short, name in names.items()} | {
        "seconds": table.latency_s.to_numpy(float)
    }


def shape_groups(table: pd.DataFrame, *names: str) -> Any:
    """A number for each combination of the columns, in no order that folds could follow."""
    keys = table[list(names)].astype(str).agg("/".join, axis=1)
    numbers = {key: zlib.crc32(key.encode()) for key in keys.unique()}
    return keys.map(numbers).to_numpy()


def nominal(gpu: Gpu, kernel: str) -> dict[str, float]:
    return {
        "memory.bandwidth_bytes_per_s": gpu.bandwidth,
        f"compute.{kernel}.peak_flops": gpu.peak * FORMATS[kernel].peak,
        "compute.bfloat16.peak_flops": gpu.peak,
    }


def linear_problem(gpu: Gpu, file: str, table: pd.DataFrame, kernel: str) -> Problem:
    form, name = FORMATS[kernel], f"linear.{kernel}."
    cutlass = kernel != "bfloat16"  # 8- and 4-bit kernels are CUTLASS's or DeepGEMM's: no split of k, an input pass
    free = {
        name + "launch_s": Free(4e-6, 1e-6, 1e-3, SECONDS),
        name + "memory_efficiency": EFFICIENCY,
        name + "compute_efficiency": Free(0.8, 0.1, 1.0),
        name + "corner": CORNER,
        name + "sm_load_bytes_per_s": Free(1e11, 1e10, 1e13, RATE),
        **REPLAY,
        **POWER,
    }
    if cutlass:
        free[name + "dispatch_s"] = Free(3e-6, 1e-8, 3e-5, SECONDS)
        free[name + "quantize_passes"] = Free(1.5, 0.05, 20.0, "passes over the input at HBM's nominal rate")
    else:
        free[name + "split_s"] = Free(3e-6, 1e-7, 1e-4, SECONDS)
    fixed = nominal(gpu, kernel) | (
        {name + "split_s": NEVER_S} if cutlass else {name + "dispatch_s": 0.0, name + "quantize_passes": 0.0}
    )
    if kernel == "fp8_block":  # timed without CUDA graphs: no row is shorter than the host needs to launch it
        free["replay.host_s"] = Free(8e-5, 1e-5, 1e-3, SECONDS)
        for short, known in (("launch_s", BLOCK_LAUNCH_S), ("dispatch_s", 0.0)):
            del free[name + short]
            fixed[name + short] = known

    def predict(values: Mapping[str, float], rows: Mapping[str, Any]) -> Any:
        m, n, k = rows["m"], rows["n"], rows["k"]
        weights, activations = n * k * form.weight, m * k * form.input + m * n * 2
        missed = misses(weights + activations, values["replay.l2_share"] * gpu.l2_bytes)
        fetched = missed + (1 - missed) / (1 + values["replay.l2_gain"])
        sustained = values["power.sustained"] * values[f"compute.{kernel}.peak_flops"]
        seconds = timing.linear(
            values, kernel, gpu.sm_count, m, n, k, weights * fetched, activations * fetched, input_bytes=form.input,
            bytes_per_weight=form.weight, compute_floor_s=2 * m * n * k / sustained,
        ).time_s  # fmt: skip
        return timing.roofline(values["replay.host_s"], seconds, 8.0).time_s if "replay.host_s" in values else seconds

    return Problem(
        f"linear.{kernel}", file, free, fixed, floats(table, m="m", n="n", k="k"), shape_groups(table, "n", "k"),
        predict,
    )  # fmt: skip


def decode_columns(table: pd.DataFrame) -> dict[str, Any]:
    columns = floats(table, sequences="batch_size", heads="num_heads", kv_heads="num_key_value_heads", dim="head_dim")
    context, window = table.step.to_numpy(float) + 1, table.window_size.to_numpy(float)
    columns["context"] = np.where(window > 0, np.minimum(context, window), context)
    return columns


def decode_problem(gpu: Gpu, file: str, table: pd.DataFrame, prefix: str, kv_bytes: float) -> Problem:
    """Fitted for head size 128 and up to 512 sequences; beyond, FlashAttention 3 schedules otherwise."""
    fitted = (table.head_dim == 128) & (table.batch_size <= 512)
    others = {f"head size {size}": (table.head_dim == size) & (table.batch_size <= 512) for size in (64, 256)}
    others["1024, 2048 sequences"] = (table.head_dim == 128) & (table.batch_size > 512)
    free = {
        prefix + ".launch_s": Free(1e-5, 1e-6, 1e-4, SECONDS),
        prefix + ".memory_efficiency": EFFICIENCY,
        prefix + ".compute_efficiency": Free(0.5, 0.1, 1.0),
        prefix + ".corner": CORNER,
        prefix + ".sequence_s": Free(1e-8, 1e-11, 1e-6, SECONDS),
        prefix + ".sequence_head_s": Free(2e-8, 1e-11, 1e-6, SECONDS),
        prefix + ".split_s": Free(2e-6, 1e-8, 2e-5, SECONDS),
        **REPLAY,
    }

    def predict(values: Mapping[str, float], rows: Mapping[str, Any]) -> Any:
        keys = rows["sequences"] * rows["context"]
        per_key = rows["kv_heads"] * 2 * rows["dim"] * kv_bytes
        missed = misses(keys * per_key, values["replay.l2_share"] * gpu.l2_bytes)
        return timing.attention_decode(
            values, prefix, gpu.sm_count, rows["sequences"], keys, heads=rows["heads"], kv_heads=rows["kv_heads"],
            bytes_per_key=per_key, flops_per_pair=4 * rows["dim"] * rows["heads"],
            from_hbm=missed + (1 - missed) / (1 + values["replay.l2_gain"]),
        ).time_s  # fmt: skip

    groups = shape_groups(table[fitted], "num_heads", "num_key_value_heads", "window_size")
    return Problem(
        prefix, file, free, nominal(gpu, "bfloat16"), decode_columns(table[fitted]), groups, predict,
        {name: decode_columns(table[rows]) for name, rows in others.items() if rows.any()},
    )  # fmt: skip


def prefill_problem(gpu: Gpu, file: str, table: pd.DataFrame) -> Problem:
    prefix = "attention.prefill."
    free = {
        prefix + "launch_s": Free(1e-5, 1e-6, 1e-4, SECONDS),
        prefix + "memory_efficiency": Free(0.5, 0.05, 2.0),
        prefix + "compute_efficiency": Free(0.6, 0.1, 1.0),
        prefix + "tile_keys": Free(32.0, 1.0, 128.0, "keys"),
        prefix + "tile_s": Free(5e-7, 1e-8, 1e-5, SECONDS),
    }

    def columns(part: pd.DataFrame) -> dict[str, Any]:
        return floats(
            part, sequences="batch_size", new="isl", heads="num_heads", kv_heads="num_key_value_heads",
            dim="head_dim", window="window_size",
        )  # fmt: skip

    def predict(values: Mapping[str, float], rows: Mapping[str, Any]) -> Any:
        new, window = rows["new"], rows["window"]
        ramp = np.where(window > 0, np.minimum(new, window), new)
        tokens = rows["sequences"] * new
        pairs = rows["sequences"] * (ramp * (ramp + 1) / 2 + (new - ramp) * ramp)
        return timing.attention_prefill(
            values, gpu.sm_count, rows["sequences"], tokens, pairs, heads=rows["heads"],
            moved_bytes=tokens * (rows["heads"] + rows["kv_heads"]) * rows["dim"] * 4,
            flops_per_pair=4 * rows["dim"] * rows["heads"],
        ).time_s  # fmt: skip

    fitted = table[table.head_dim == 128]
    others = {f"head size {size}": columns(table[table.head_dim == size]) for size in (64, 256)}
    return Problem(
        "attention.prefill", file, free, nominal(gpu, "bfloat16"), columns(fitted),
        shape_groups(fitted, "num_heads", "num_key_value_heads", "window_size"), predict,
        {name: part for name, part in others.items() if len(part["seconds"])},
    )  # fmt: skip


@functools.cache
def routed(total: int, selected: int, ranks: int, tokens: int, distribution: str) -> tuple[float, ...]:
    """(active experts, rows, rows padded to 16, 32, 64, 128) of the rank that the tables time, by their distribution.

    balanced: token t's i-th choice is expert (t + i ceil(total / selected)) mod total, and rank 0 is timed.
    power_law_a: loads drawn from x^-a on [1, 0.8 tokens] ([0.01, 2] if there are fewer choices than experts), scaled to
    the choices, and the rank with the most is timed (AIConfigurator's collector for vLLM); here the mean of 16 draws.
    """
    local, choices = total // ranks, tokens * selected
    if distribution == "balanced":
        stride = -(-total // selected)
        token, choice = np.arange(tokens)[:, None], np.arange(selected)[None, :]
        first = token if tokens >= stride else np.floor(token * stride / tokens)
        loads = np.bincount(((first + choice * stride) % total).astype(int).ravel(), minlength=total)[None, :local]
    else:
        low, high = (1.0, 0.8 * tokens) if choices > total else (0.01, 2.0)
        power = 1 - float(distribution.rsplit("_", 1)[1])
        random = np.random.default_rng(1)
        share = (random.random((16, total)) * (high**power - low**power) + low**power) ** (1 / power)
        counts = np.round(share / share.sum(axis=1, keepdims=True) * choices)
        for row in counts:  # what rounding leaves over goes to, or comes from, the most popular in turn
            order = np.argsort(-(row + 0.5 * random.random(total)))
            rest = int(choices - row.sum())
            while rest > 0:
                row[order[:rest]] += 1
                rest -= min(rest, total)
            while rest < 0:
                some = order[row[order] > 0][: int(row.sum() - choices)]
                row[some] -= 1
                rest += len(some)
        by_rank = np.minimum(counts, tokens).reshape(16, ranks, local)
        loads = by_rank[np.arange(16), by_rank.sum(axis=2).argmax(axis=1)]
    padded = [float((np.ceil(loads / tile) * tile).sum(axis=1).mean()) for tile in timing.EXPERT_TILES]
    return (float((loads > 0).sum(axis=1).mean()), float(loads.sum(axis=1).mean()), *padded)


def experts_problem(gpu: Gpu, file: str, table: pd.DataFrame, kernel: str) -> Problem:
    """A layer is its two grouped GEMMs, the activation between them and the sum of each token's choices after them.

    Rows whose intermediate size on one GPU is no multiple of 16 are left out: Triton then loads element by element,
    three times slower, and vLLM does not shard so."""
    table = table[(table.inter_size // table.moe_tp_size) % 16 == 0]
    form, name = FORMATS[kernel], f"experts.{kernel}."
    free = {
        name + "launch_s": Free(1.5e-5, 1e-6, 1e-4, SECONDS),
        name + "memory_efficiency": EFFICIENCY,
        name + "compute_efficiency": Free(0.5, 0.05, 1.0),
        name + "corner": CORNER,
        name + "sm_load_bytes_per_s": Free(1e11, 1e10, 1e13, RATE),
        ELEMENTWISE: Free(0.6, 0.1, 1.0),
        name + "row_s": Free(2e-9, 1e-12, 1e-7, SECONDS),
        name + "tile_s": Free(1e-6, 1e-9, 1e-4, SECONDS),
        name + "empty_tile_s": Free(2e-7, 1e-10, 1e-5, SECONDS),
    }
    fixed = nominal(gpu, kernel) | {"elementwise.launch_s": ELEMENTWISE_LAUNCH_S, name + "quantize_passes": 0.0}
    if form.input < 2:
        del fixed[name + "quantize_passes"]
        free[name + "quantize_passes"] = Free(1.5, 0.05, 20.0, "passes over the input at HBM's nominal rate")
    if gpu.l2_bytes > 60e6:  # a layer's weights fit the cache of these, so that replays find some of them there
        free |= REPLAY
    columns = floats(
        table, tokens="num_tokens", hidden="hidden_size", inner="inter_size", degree="moe_tp_size", selected="topk",
        total="num_experts",
    )  # fmt: skip
    loads = np.array(
        [
            routed(int(e), int(k), int(r), int(t), str(d))
            for e, k, r, t, d in zip(
                table.num_experts, table.topk, table.moe_ep_size, table.num_tokens, table.distribution, strict=True
            )
        ]
    )
    for position, column in enumerate(("active", "rows", *(f"padded{tile}" for tile in timing.EXPERT_TILES))):
        columns[column] = loads[:, position]

    def predict(values: Mapping[str, float], rows: Mapping[str, Any]) -> Any:
        inner, hidden, active = rows["inner"] / rows["degree"], rows["hidden"], rows["active"]
        choices, from_hbm = rows["tokens"] * rows["selected"], 1.0
        if "replay.l2_share" in values:
            missed = misses(active * 3 * inner * hidden * form.weight, values["replay.l2_share"] * gpu.l2_bytes)
            from_hbm = missed + (1 - missed) / (1 + values["replay.l2_gain"])
        seconds: Any = 0.0
        first, second = (2 * inner, hidden, rows["tokens"]), (hidden, inner, choices)
        for n, k, inputs in (first, second):
            seconds = seconds + timing.expert_gemm(
                values, kernel, gpu.sm_count, choices, active * n * k * form.weight * from_hbm,
                spilled(np.minimum(inputs, rows["rows"]) * k * form.input + choices * n * 2, gpu),
                [(float(tile), rows[f"padded{tile}"]) for tile in timing.EXPERT_TILES], n=n, k=k, total=rows["total"],
                bytes_per_weight=form.weight, input_bytes=form.input, quantized_rows=inputs,
            ).time_s  # fmt: skip
        activation_s = timing.elementwise(values, spilled(choices * 3 * inner * 2, gpu)).time_s
        sum_s = timing.elementwise(values, spilled((choices + rows["tokens"]) * hidden * 2, gpu)).time_s
        return seconds + activation_s + sum_s

    groups = shape_groups(table, "hidden_size", "inter_size", "num_experts", "moe_tp_size", "moe_ep_size")
    return Problem(f"experts.{kernel}", file, free, fixed, columns, groups, predict)


def pinned(problem: Problem, name: str, value: float) -> Problem:
    """With a number that another table has given already."""
    free = {other: range_ for other, range_ in problem.free.items() if other != name}
    return replace(problem, free=free, fixed={**problem.fixed, name: value})


def problems(data: pathlib.Path, gpu: Gpu) -> list[Problem]:
    found = []
    file, table = read(data, "gemm", gpu)
    for kernel, rows in table.groupby("gemm_dtype"):
        if gpu.table == "h100_sxm" and kernel == "fp8_block":  # of three kernels the one that takes most shapes
            rows = rows[rows.kernel_source == "DeepGemmFp8BlockScaledMMKernel"]
        found.append(linear_problem(gpu, file, rows, str(kernel)))
    file, table = read(data, "moe", gpu)
    for (dtype, source), rows in table.groupby(["moe_dtype", "kernel_source"]):
        kernel = {"w4a16_mxfp4": "mxfp4"}.get(str(dtype), str(dtype))
        # Of two implementations of a format, the one that vLLM takes by default for its best-known models.
        other = ("situ_as_silu", "fp8moe_flashinfer") if kernel in ("mxfp4", "fp8_block") else ()
        if len(rows) > 100 and not any(part in str(source) for part in other):
            found.append(experts_problem(gpu, file, rows, kernel))
    file, table = read(data, "genattn", gpu)
    if gpu.table == "l40s":  # FlashAttention 2 reads the whole context under a window
        table = table[table.window_size == 0]
    for kv, kv_bytes in (("bfloat16", 2.0), ("fp8", 1.0)):
        rows = table[table.kv_cache_dtype == kv]
        if len(rows):
            prefix = "attention.decode" if kv == "bfloat16" else "attention.decode_fp8"
            found.append(decode_problem(gpu, file, rows, prefix, kv_bytes))
    file, table = read(data, "ctxattn", gpu)
    rows = table[(table.kv_cache_dtype == "bfloat16") & (table.isl >= 16)]
    found.append(prefill_problem(gpu, file, rows))
    return found


# -- profiles ---------------------------------------------------------------------------------------------------------

#: Tables that do not show what a server would run: an untuned CUTLASS kernel of FlashInfer, which takes about twice
#: as long as the bf16 kernel of the same layer.
UNUSED = {("H100-SXM", "experts.fp8")}

#: GPU -> coefficients without a table of their own -> whose they are, and why that is the nearest.
WEIGHT_ONLY = "weight-only kernels unpack to bf16 and multiply as its GEMM does"
BORROWED: dict[str, dict[str, tuple[str, str, str]]] = {
    "A100-SXM-80GB": {
        "linear.fp8": ("A100-SXM-80GB", "linear.bfloat16", "no fp8 tensor cores: " + WEIGHT_ONLY),
        "linear.fp8_block": ("A100-SXM-80GB", "linear.bfloat16", "no fp8 tensor cores: " + WEIGHT_ONLY),
        "experts.fp8": ("A100-SXM-80GB", "experts.bfloat16", "no fp8 tensor cores: " + WEIGHT_ONLY),
        "experts.fp8_block": ("A100-SXM-80GB", "experts.bfloat16", "no fp8 tensor cores: " + WEIGHT_ONLY),
        "experts.int4_wo": ("L40S", "experts.int4_wo", "the same Marlin kernel"),
        "experts.mxfp4": ("L40S", "experts.mxfp4", "the same Marlin kernel"),
        "attention.decode_fp8": ("L40S", "attention.decode_fp8", "the same FlashInfer kernel"),
    },
    "H100-SXM": {"experts.fp8": ("H200-SXM", "experts.fp8", "the same SMs and Triton kernel")},
    "H200-SXM": {
        "linear.fp8": ("H100-SXM", "linear.fp8", "the same SMs and CUTLASS kernel"),
        "experts.int4_wo": ("H100-SXM", "experts.int4_wo", "the same SMs and Marlin kernel"),
        "experts.mxfp4": ("H100-SXM", "experts.mxfp4", "the same SMs and Triton kernel"),
    },
    "B200-SXM": {
        "linear.fp8": ("H100-SXM", "linear.fp8", "CUTLASS as well"),
        "experts.int4_wo": ("H100-SXM", "experts.int4_wo", "the same Marlin kernel"),
        "experts.mxfp4": ("H100-SXM", "experts.mxfp4", "Triton as well"),
        "experts.nvfp4": ("B200-SXM", "experts.fp8", "grouped GEMMs of a tensor-core format as well"),
    },
    "L40S": {},
}
for _gpu, _borrowed in BORROWED.items():
    for _kernel in ("int8_wo", "int4_wo", "mxfp4"):
        _borrowed.setdefault(f"linear.{_kernel}", (_gpu, "linear.bfloat16", WEIGHT_ONLY))
    _borrowed.setdefault("experts.int8_wo", (_gpu, "experts.bfloat16", WEIGHT_ONLY))
#: Relative standard deviation that borrowing adds: efficiencies of one kernel on two of the GPUs differ by that much.
BORROWED_STD = 0.3
#: Least relative standard deviation of anything fitted here: another release of the kernels changes more than the fit.
LEAST_STD = 0.03

Entry = dict[str, Any]


def entries(problem: Problem, fitted: Fitted) -> dict[str, Entry]:
    """The coefficients of a profile that one fit gives; what only the tables have (replay.*, power.*) is left out."""
    mean = fitted.errors[0]
    table = f"NVIDIA AIConfigurator operation tables (Apache-2.0), {problem.file}, {fitted.rows} rows, MAPE {mean:.1%}"
    if not math.isnan(fitted.held_out):
        table += f", {fitted.held_out:.1%} on shapes left out"
    found = {}
    for name, value in fitted.values.items():
        if not name.startswith((problem.prefix + ".", "elementwise.")):
            continue
        if name.startswith("elementwise.") and problem.prefix != "experts.bfloat16":
            continue
        free = problem.free.get(name)
        found[name] = {
            "value": float(f"{value:.4g}"),
            "std": round(max(fitted.std[name], LEAST_STD), 3) if free else 0.0,
            "unit": free.unit if free else SECONDS if name.endswith("_s") else ONE,
            "source": table if free else BY_NATURE[name.rsplit(".", 1)[1]],
        }
    return found


BY_NATURE = {
    "split_s": "this kernel does not split k; a cost that no split is worth",
    "dispatch_s": "this kernel has no step there",
    "quantize_passes": "the input is not quantized",
    "launch_s": "5.1-5.5 us in the fp8 tables of H100 and L40S; the table of block-scaled GEMMs shows the host's time",
}


def borrow(found: Mapping[str, dict[str, Entry]], gpu: str, prefix: str) -> dict[str, Entry]:
    owner, origin, why = BORROWED[gpu][prefix]
    result = {}
    for name, entry in found[owner].items():
        if name.startswith(origin + "."):
            value = entry["value"]
            if name.endswith("sm_load_bytes_per_s"):
                value = float(f"{value * GPUS[gpu].top_clock_hz / GPUS[owner].top_clock_hz:.4g}")
            source = f"{origin} of {owner} ({why}): {entry['source']}"
            std = round(math.hypot(entry["std"], BORROWED_STD), 3) if entry["std"] else 0.0
            result[prefix + name.removeprefix(origin)] = {**entry, "value": value, "std": std, "source": source}
    return result


def nominal_entries(name: str, found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The rates that the shares refer to, and elementwise kernels, which have no table of their own."""
    gpu = GPUS[name]
    sheet = "NVIDIA data sheet and architecture paper: SMs x FLOPs a clock x top SM clock, dense"
    result: dict[str, Entry] = {
        "memory.bandwidth_bytes_per_s": {
            "value": gpu.bandwidth, "std": 0.0, "unit": RATE, "source": "NVIDIA data sheet",
        },
        "memory.l2_bytes": {"value": gpu.l2_bytes, "std": 0.0, "unit": "B", "source": "NVIDIA architecture paper"},
    }  # fmt: skip
    for kernel, form in FORMATS.items():
        native = name != "A100-SXM-80GB" and (kernel != "nvfp4" or name == "B200-SXM")
        peak = gpu.peak * (form.peak if native else 1)
        result[f"compute.{kernel}.peak_flops"] = {"value": peak, "std": 0.0, "unit": "FLOP/s", "source": sheet}
    for short, std, why in (
        ("launch_s", 0.3, "the smallest GEMMs of the operation tables (NVIDIA AIConfigurator) take 2.0-2.6 us"),
        ("memory_efficiency", 0.2, "activation and sum of the experts: " + found[ELEMENTWISE]["source"]),
    ):
        entry = found[f"elementwise.{short}"]
        result[f"elementwise.{short}"] = {**entry, "std": max(std, entry["std"]), "source": why}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=pathlib.Path, help="folder with the .parquet tables")
    parser.add_argument("--gpu", choices=sorted(GPUS), action="append", help="fit this one only (may be repeated)")
    parser.add_argument("--json", type=pathlib.Path, help="folder for the coefficients; needs all GPUs")
    parser.add_argument("--quick", action="store_true", help="without the held-out error")
    parser.add_argument("--only", default="", help="fit only coefficients that start with this")
    options = parser.parse_args()
    if options.json and (options.gpu or options.only):
        parser.error("--json: GPUs borrow coefficients from one another, so it goes with neither --gpu nor --only")
    print(f"{'gpu':14} {'kernel':20} {'rows':>6} {'MAPE':>6} {'median':>7} {'p90':>6} {'held out':>9}  coefficients")
    found: dict[str, dict[str, Entry]] = {}
    for name in options.gpu or GPUS:
        found[name] = {}
        for problem in problems(options.data, GPUS[name]):
            if not problem.prefix.startswith(options.only):
                continue
            if problem.prefix.startswith("experts.") and ELEMENTWISE in found[name]:
                problem = pinned(problem, ELEMENTWISE, found[name][ELEMENTWISE]["value"])
            fitted = fit(problem, options.quick)
            if (name, problem.prefix) not in UNUSED:
                found[name] |= entries(problem, fitted)
            mean, median, ninety = fitted.errors
            shown = " ".join(f"{key.rsplit('.', 1)[1]}={fitted.values[key]:.3g}" for key in problem.free)
            print(
                f"{name:14} {problem.prefix:20} {fitted.rows:6d} {mean:6.1%} {median:7.1%} {ninety:6.1%}"
                f" {fitted.held_out:9.1%}  {shown}", flush=True,
            )  # fmt: skip
            for part, columns in problem.others.items():
                error = np.abs(problem.predict(fitted.values, columns) / columns["seconds"] - 1)
                mean, median, ninety = summary(error)
                print(f"{'':14} - {part:20} {len(error):4d} {mean:6.1%} {median:7.1%} {ninety:6.1%}  not fitted")
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        for name, own in found.items():
            complete = own | nominal_entries(name, own)
            for prefix in BORROWED[name]:
                complete |= borrow(found, name, prefix)
            text = json.dumps(dict(sorted(complete.items())), indent=1)
            (options.json / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
