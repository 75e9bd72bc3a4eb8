"""What `energylens calibrate` measures: single kernels and idle states, and what a profile says of each.

A point's prediction comes from the step model itself (`GpuStep`), given the point's kernels alone; so a coefficient
that fits points is the coefficient that predicts steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from energylens_vllm.einsum.kernel import AttentionShape, ExpertShape, GemmShape, Kernel, Mask, Terms
from energylens_vllm.energy.batch import Array, Steps, steps_from_arrays
from energylens_vllm.energy.kernel_time import expert_tile_rows
from energylens_vllm.energy.precision import Format, format_of
from energylens_vllm.energy.routing_load import Placement, RankLoads, Routing, rank_loads
from energylens_vllm.energy.step import GpuStep
from energylens_vllm.hardware.profile import GpuProfile

Kind = Literal["idle", "spin", "memory", "launch", "host", "linear", "linear_fp8", "decode", "prefill", "experts"]

#: Heads of the attention points: those of Llama-3.1-8B, and of much else.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
#: Experts of the experts' points: a layer of Qwen3-30B-A3B.
EXPERTS, SELECTED, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
#: Bytes that a memory point reads or copies in a launch, well beyond any L2 cache; and bytes that are written over and
#: over from what a cache holds.
MEMORY_BYTES, CACHED_BYTES = 1 << 30, 1 << 24


@dataclass(frozen=True, slots=True)
class Point:
    """One kernel at one size. `shape`: what its kind needs, see `kernels_of`."""

    kind: Kind
    name: str
    shape: Mapping[str, int]


class Expected(NamedTuple):
    """What a profile says of a point: seconds of a launch (0 for idle states) and mean watts while it repeats."""

    time_s: float
    power_w: float


def points() -> list[Point]:
    """All points, the most telling first: a budget that runs out cuts the end."""
    found = [
        Point("idle", "idle without a CUDA context", {"context": 0}),
        Point("idle", "idle with a CUDA context", {"context": 1}),
        Point("spin", "one thread that waits", {}),
        Point("memory", "memory read", {"read": MEMORY_BYTES, "written": 0}),
        Point("memory", "memory written", {"read": 0, "written": CACHED_BYTES}),
        Point("memory", "memory copied", {"read": MEMORY_BYTES // 2, "written": MEMORY_BYTES // 2}),
        Point("launch", "kernel launched by a CUDA graph", {}),
        Point("host", "kernel launched by the host", {}),
    ]
    found += [_linear(n, k, rows) for n, k, rows in ((28672, 4096, 1), (4096, 14336, 64), (28672, 4096, 8192))]
    found += [_decode(1, 32768), _decode(64, 1024), _prefill(1, 8192), _prefill(4, 2048)]
    found += [_linear(28672, 4096, rows) for rows in (64, 256, 1024)]
    found += [_linear(4096, 14336, rows) for rows in (1, 256, 2048, 8192)]
    found += [_experts(tokens) for tokens in (1, 16, 64, 256, 1024, 8192)]
    found += [_decode(8, 8192), _decode(256, 512), _decode(256, 2048), _prefill(1, 2048), _prefill(16, 512)]
    found += [_linear(28672, 4096, rows, "_fp8") for rows in (16, 256, 2048, 8192)]
    found += [_linear(4096, 14336, rows, "_fp8") for rows in (16, 512, 8192)]
    found += [_linear(6144, 4096, rows) for rows in (1, 32, 128, 512, 4096)]
    found += [_linear(4096, 4096, rows) for rows in (16, 256, 2048)]
    found += [_decode(32, 2048), _decode(16, 256), _prefill(1, 512)]
    return found


def _linear(n: int, k: int, rows: int, form: Literal["", "_fp8"] = "") -> Point:
    kind: Kind = "linear_fp8" if form else "linear"
    return Point(kind, f"GEMM {'fp8' if form else 'bf16'} {rows} x {k} x {n}", {"rows": rows, "n": n, "k": k})


def _decode(sequences: int, context: int) -> Point:
    shape = {"sequences": sequences, "context": context}
    return Point("decode", f"attention of {sequences} decodes at {context}", shape)


def _prefill(sequences: int, tokens: int) -> Point:
    return Point("prefill", f"attention of {sequences} prompts of {tokens}", {"sequences": sequences, "tokens": tokens})


def _experts(tokens: int) -> Point:
    return Point("experts", f"experts bf16 of {tokens} tokens", {"tokens": tokens})


# -- what the model makes of them -------------------------------------------------------------------------------------


def expected(point: Point, profile: GpuProfile, clock: float = 1.0, time_s: float | None = None) -> Expected:
    """What `profile` predicts at a clock (over the top clock). `time_s`: seconds of a launch where those were measured,
    for the watts; by default the predicted ones. Memory points have none of their own: torch's kernels are not vLLM's.
    """
    p = profile
    voltage_squared = (p["power.voltage_floor"] + (1 - p["power.voltage_floor"]) * clock) ** 2
    static_w = p["power.floor_w"] + (p["power.static_w"] - p["power.floor_w"]) * clock * voltage_squared
    if point.kind in ("idle", "spin"):
        return Expected(0.0, static_w)
    on_chip = p["energy.memory_core_share"]
    if point.kind == "memory":
        moved = point.shape["read"] + point.shape["written"]
        launch_s = moved / p["memory.bandwidth_bytes_per_s"]
        memory_j, core_j = p["energy.memory_j_per_byte"] * moved, 0.0
    else:
        step, steps = _alone(point, p)
        work, _ = step._work(steps)
        launch_s = float(work.time_s[0, 0] + work.clocked_s[0, 0] * (1 / clock - 1))
        memory_j, core_j = (sum(float(j[0, 0]) for j in part.values()) for part in (work.memory_j, work.core_j))
    joules = memory_j * (1 - on_chip + on_chip * voltage_squared) + core_j * voltage_squared
    return Expected(launch_s, static_w + joules / (launch_s if time_s is None else time_s))


def operating_clock(point: Point, profile: GpuProfile) -> float:
    """The clock at which `profile` runs a point under its power limit, over the top clock."""
    if point.kind in ("idle", "spin", "memory"):
        return 1.0
    step, steps = _alone(point, profile)
    return float(step.evaluate(steps).clock[0, 0])


def _alone(point: Point, profile: GpuProfile) -> tuple[GpuStep, Steps]:
    """A step that is this point's kernels alone."""
    if point.kind == "linear_fp8":  # the input is in fp8 already, and torch's kernel is not vLLM's
        nothing = {"linear.fp8.quantize_passes": 0.0, "linear.fp8.dispatch_s": 0.0}
        profile = profile.with_values(nothing, "not measured")
    kernels, form, masks = _kernels(point)
    step = GpuStep([kernels], masks, profile, form, (), loads=_loads(profile.small_expert_tiles))
    return step, _steps(point, masks)


@cache
def _cached_kernels(kind: Kind, shape: tuple[tuple[str, int], ...]) -> tuple[list[Kernel], Format | None]:
    return KERNELS[kind](dict(shape))


def _kernels(point: Point) -> tuple[list[Kernel], Format | None, tuple[Mask, ...]]:
    kernels, form = _cached_kernels(point.kind, tuple(point.shape.items()))
    return kernels, form, tuple(dict.fromkeys(k.attention.mask for k in kernels if k.attention))


def _linear_kernels(shape: Mapping[str, int], form: Format | None = None) -> tuple[list[Kernel], Format | None]:
    n, k = shape["n"], shape["k"]
    element = 2.0 if form is None else form.weight_bytes
    kernel = Kernel(
        "linear", "linear", 1, flops=Terms(tokens=2.0 * n * k), weight_bytes=n * k * element,
        quantized=form is not None, activation_bytes=Terms(tokens=k * element + 2.0 * n),
        gemm=GemmShape("tokens", n, k),
    )  # fmt: skip
    return [kernel], form


def _attention_kernels(_: Mapping[str, int]) -> tuple[list[Kernel], Format | None]:
    kernel = Kernel(
        "attention", "attention", 1, flops=Terms(pairs=4.0 * HEADS * HEAD_DIM),
        kv_read_bytes=Terms(keys=4.0 * KV_HEADS * HEAD_DIM), activation_bytes=Terms(tokens=4.0 * HEADS * HEAD_DIM),
        attention=AttentionShape(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM),
    )  # fmt: skip
    return [kernel], None


def _experts_kernels(_: Mapping[str, int]) -> tuple[list[Kernel], Format | None]:
    """Two grouped GEMMs, the activation between them, and the sum over the chosen experts."""
    of, two = ExpertShape(EXPERTS, EXPERTS, SELECTED), 2 * INTERMEDIATE

    def grouped(name: str, n: int, k: int, activation_bytes: float) -> Kernel:
        return Kernel(
            name, "experts", 1, flops=Terms(tokens=2.0 * SELECTED * n * k), weight_bytes=2.0 * EXPERTS * n * k,
            quantized=True, activation_bytes=Terms(tokens=activation_bytes), gemm=GemmShape("tokens", n, k), experts=of,
        )  # fmt: skip

    def passed(name: str, elements: float) -> Kernel:
        return Kernel(name, "elementwise", 1, activation_bytes=Terms(tokens=2.0 * elements))

    return [
        grouped("w13", two, HIDDEN, 2.0 * (HIDDEN + SELECTED * two)),
        passed("act", SELECTED * (two + INTERMEDIATE)),
        grouped("w2", HIDDEN, INTERMEDIATE, 2.0 * SELECTED * (INTERMEDIATE + HIDDEN)),
        passed("sum", (SELECTED + 1) * HIDDEN),
    ], None


def _launch_kernels(_: Mapping[str, int]) -> tuple[list[Kernel], Format | None]:
    return [Kernel("launch", "elementwise", 1, activation_bytes=Terms(constant=4096.0))], None


KERNELS: dict[Kind, Callable[[Mapping[str, int]], tuple[list[Kernel], Format | None]]] = {
    "launch": _launch_kernels,
    "host": _launch_kernels,
    "linear": _linear_kernels,
    "linear_fp8": lambda shape: _linear_kernels(shape, format_of("fp8")),
    "decode": _attention_kernels,
    "prefill": _attention_kernels,
    "experts": _experts_kernels,
}


def _steps(point: Point, masks: tuple[Mask, ...]) -> Steps:
    shape = point.shape
    if point.kind == "decode":
        count = shape["sequences"]
        new, computed = np.ones(count), np.full(count, shape["context"] - 1.0)
        return steps_from_arrays(new, computed, [0, count], masks)
    if point.kind == "prefill":
        count = shape["sequences"]
        return steps_from_arrays(np.full(count, shape["tokens"] * 1.0), np.zeros(count), [0, count], masks)
    rows = np.array([float(shape.get("rows", shape.get("tokens", 1)))])
    return Steps(rows, rows, rows, rows, ())


def _loads(small_tiles: bool) -> Callable[[Kernel, Array], RankLoads]:
    """Loads of one rank that has all experts, under uniform routing."""

    def loads(kernel: Kernel, tokens: Array) -> RankLoads:
        tile_rows = expert_tile_rows(small_tiles, "bfloat16", tokens, EXPERTS)
        return _uniform_loads(float(tokens[0]), float(tile_rows[0]))

    return loads


@cache
def _uniform_loads(tokens: float, tile_rows: float) -> RankLoads:
    return rank_loads(Routing.uniform(EXPERTS, SELECTED), Placement.linear(EXPERTS, 1), tokens, tile_rows)
