"""Time of each kernel family in closed form.

Every form is `t = launch + (t_memory^p + t_compute^p)^(1/p)`: a kernel is bound by HBM or by the tensor cores, and the
p-norm is the soft corner between the two (p is fitted; infinity would be a sharp roofline). What the tables of measured
kernels show besides has a term each, with its cause beside it: whole tiles on whole SMs, one SM's load rate, blocks
that find no work, a second kernel. Compute terms are for the top SM clock; the power module stretches them when the GPU
runs slower. All functions take arrays that broadcast and return (seconds, seconds of it that scale with 1 / clock).

`p` is any mapping of coefficient names (a `GpuProfile` or a dict); the names are in docs/profiles.md, and
benchmarks/fit_operations.py fits them through these very functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Coefficients(Protocol):
    """What the functions need of a profile."""

    def __getitem__(self, name: str, /) -> float: ...


class Timed(NamedTuple):
    """Seconds of a kernel at the top clock, and how many of them follow the SM clock (d t / d ln(1/clock))."""

    time_s: Any
    clocked_s: Any


def roofline(memory_s: Any, compute_s: Any, corner: float) -> Timed:
    """The p-norm of memory and compute time, and its derivative towards a slower clock."""
    longest = np.maximum(np.maximum(memory_s, compute_s), 1e-12)
    memory, compute = (memory_s / longest) ** corner, (compute_s / longest) ** corner
    total = memory + compute
    time_s = longest * total ** (1 / corner)
    return Timed(time_s, time_s * compute / np.maximum(total, 1e-30))


# -- linear layers ----------------------------------------------------------------------------------------------------

#: Rows that one tensor-core tile of a GEMM covers at least (wgmma's M is 64); fewer rows cost as much compute.
TILE_ROWS = 64
#: Output tiles (rows, columns) that GEMM libraries choose from, and into how many parts they split k to fill the GPU.
GEMM_TILES = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
GEMM_SPLITS = (1, 2, 4, 8, 16)
#: Above as many rows CUTLASS's 8-bit kernels change configuration (vLLM, csrc/quantization/w8a8/cutlass/c3x).
DISPATCH_ROWS = 128


def gemm_tiles_s(
    rows: Any, n: Any, k: Any, sm_count: int, flops_per_s: float, load_bytes_per_s: float, split_s: float,
    input_bytes: float, weight_bytes: float,
) -> Any:  # fmt: skip
    """Seconds of the fastest tiling: waves of whole tiles over the SMs, each tile bound by its SM's tensor cores
    (`flops_per_s` is the whole GPU's) or by what the SM can load (`load_bytes_per_s` of one SM; `input_bytes` and
    `weight_bytes` per element). Splitting k makes more and shorter tiles, and costs `split_s` for adding up the parts.
    """
    after = (1,) * np.ndim(rows)  # axes of `rows`, behind one axis of tilings and one of splits
    tile_rows, tile_columns = (np.reshape(sizes, (-1, 1, *after)) for sizes in zip(*GEMM_TILES, strict=True))
    splits = np.reshape(GEMM_SPLITS, (1, -1, *after))
    tiles = np.ceil(rows / tile_rows) * np.ceil(n / tile_columns)
    loaded = np.minimum(tile_rows, rows) * input_bytes + np.minimum(tile_columns, n) * weight_bytes
    per_k = np.maximum(2.0 * tile_rows * tile_columns * sm_count / flops_per_s, loaded / load_bytes_per_s)
    waves = np.ceil(tiles * splits / sm_count)
    seconds = waves * per_k * np.maximum(k / splits, 64.0) + np.where(splits > 1, split_s, 0.0)
    return seconds.min(axis=(0, 1))


def linear(
    p: Coefficients, kernel: str, sm_count: int, rows: Any, n: Any, k: Any, weight_bytes: Any, activation_bytes: Any,
    *, input_bytes: float = 2.0, bytes_per_weight: float = 2.0, compute_floor_s: Any = 0.0,
) -> Timed:  # fmt: skip
    """A GEMM of `rows` x k by k x n. `weight_bytes` and `activation_bytes` are what crosses HBM; `input_bytes` and
    `bytes_per_weight` are per element as the tensor cores take them. Kernels that quantize their input first pay one
    more pass over it. `compute_floor_s` bounds the compute time from below (measurements at the power limit)."""
    name = f"linear.{kernel}."
    bandwidth = p["memory.bandwidth_bytes_per_s"]
    tiles_s = gemm_tiles_s(
        rows, n, k, sm_count, p[f"compute.{kernel}.peak_flops"] * p[name + "compute_efficiency"],
        p[name + "sm_load_bytes_per_s"], p[name + "split_s"], input_bytes, bytes_per_weight,
    )  # fmt: skip
    memory_s = (weight_bytes + activation_bytes) / (bandwidth * p[name + "memory_efficiency"])
    timed = roofline(memory_s, np.maximum(tiles_s, compute_floor_s), p[name + "corner"])
    launch_s = p[name + "launch_s"] + np.where(rows > DISPATCH_ROWS, p[name + "dispatch_s"], 0.0)
    quantize_s = p[name + "quantize_passes"] * rows * k * (2.0 + input_bytes) / bandwidth
    return Timed(launch_s + quantize_s + timed.time_s, timed.clocked_s)


# -- experts ----------------------------------------------------------------------------------------------------------

#: Rows of a block that tuned configurations of the fused-MoE kernel choose from.
EXPERT_TILES = (16, 32, 64, 128)


def expert_tile_rows(tokens: Any) -> Any:
    """Rows of a fused-MoE block for a step of `tokens`: each expert's rows are padded to a multiple of it.

    Source: vLLM, fused_moe.py `get_default_config` (16 up to 32 tokens, 32 up to 96, 64 up to 512, else 128).
    """
    return np.where(tokens <= 32, 16.0, np.where(tokens <= 96, 32.0, np.where(tokens <= 512, 64.0, 128.0)))


def expert_padded_rows(rows: Any, active: Any, tile: Any) -> Any:
    """Expected rows after padding each active expert's share to whole tiles.

    With `rows` spread over `active` experts, an expert that has r rows takes ceil(r / tile) tiles; over random loads
    the mean waste is half a tile once r exceeds a tile, and tile - r below.
    """
    per_expert = rows / np.maximum(active, 1e-9)
    return np.maximum(active, 1e-9) * np.where(per_expert < tile, tile, per_expert + tile / 2)


def expert_gemm(
    p: Coefficients, kernel: str, sm_count: int, choices: Any, weight_bytes: Any, activation_bytes: Any,
    tiles: Sequence[tuple[Any, Any]], *, n: Any, k: Any, total: Any, bytes_per_weight: float = 2.0,
    input_bytes: float = 2.0, quantized_rows: Any = None, square_tiles: bool = False,
) -> Timed:  # fmt: skip
    """One grouped GEMM of vLLM's fused experts, with its share of sorting `choices` (token, expert) pairs by expert.

    `weight_bytes` are those of the experts that have rows, `activation_bytes` those that cross HBM; `total` experts are
    in the layer, on all GPUs. `tiles` are the configurations that the kernel may run with, as (rows of a block, rows
    after padding each expert's to whole blocks): one pair for vLLM's default, several where a tuned one is the fastest.
    Where the input is quantized by a kernel of its own, `quantized_rows` are its rows. `square_tiles`: blocks of 64
    rows have 64 columns and no more (the default configuration of vLLM 0.11, fused_moe.py).

    The grid has a block for every choice and up to one more for every expert of the layer, local or not; those without
    work, or that only zero the rows of remote experts, cost `empty_tile_s` of an SM each, the others `tile_s` besides
    their share of the tensor cores or of what an SM can load.
    """
    name = f"experts.{kernel}."
    bandwidth = p["memory.bandwidth_bytes_per_s"]
    memory_s = (weight_bytes + activation_bytes) / (bandwidth * p[name + "memory_efficiency"])
    flops_per_s = p[f"compute.{kernel}.peak_flops"] * p[name + "compute_efficiency"]
    fastest: Any = np.inf
    for tile_rows, padded_rows in tiles:
        grid = np.where(choices < total, choices, (choices + total * (tile_rows - 1)) / tile_rows)
        blocks = padded_rows / tile_rows
        empty = np.maximum(grid - blocks, 0.0) * p[name + "empty_tile_s"]
        for wide in (1, 2):
            columns = np.where(tile_rows < 128, 64.0, 128.0) * wide
            if square_tiles:
                columns = np.where(tile_rows == 64, 64.0, columns)
            across = np.ceil(n / columns)
            compute_s = 2.0 * np.maximum(tile_rows, TILE_ROWS) * columns * k * sm_count / flops_per_s
            load_s = (tile_rows * input_bytes + columns * bytes_per_weight) * k / p[name + "sm_load_bytes_per_s"]
            block_s = np.maximum(compute_s, load_s) + p[name + "tile_s"]
            waves = np.maximum(blocks * across / sm_count, np.minimum(blocks, 1.0))
            fastest = np.minimum(fastest, waves * block_s + empty * across / sm_count)
    timed = roofline(memory_s, fastest, p[name + "corner"])
    fixed_s = p[name + "launch_s"] + choices * p[name + "row_s"]
    if quantized_rows is not None:
        fixed_s = fixed_s + p[name + "quantize_passes"] * quantized_rows * k * (2.0 + input_bytes) / bandwidth
    return Timed(fixed_s + timed.time_s, timed.clocked_s)


# -- attention --------------------------------------------------------------------------------------------------------

#: Query rows of a decode tile: all query heads that share a KV head, and as many empty rows as fill it.
DECODE_TILE_ROWS = 64
#: Shortest context that a decode splits among SMs, where there are SMs to spare; a second kernel adds up the parts.
SPLIT_KEYS = 256


def attention_decode(
    p: Coefficients, name: str, sm_count: int, sequences: Any, keys: Any, *, heads: Any, kv_heads: Any,
    bytes_per_key: Any, flops_per_pair: Any, from_hbm: Any = 1.0,
) -> Timed:  # fmt: skip
    """Decode attention of a layer: `sequences` read `keys` KV tokens together, `bytes_per_key` each (all KV heads).

    `name` is "attention.decode" or, with an 8-bit KV cache, "attention.decode_fp8". `flops_per_pair` is for one (query
    token, key) pair over all heads. One (sequence, KV head) is one block; those beyond one block an SM wait.
    """
    prefix = name + "."
    present = np.minimum(sequences, 1.0)
    packing = np.ceil(heads / kv_heads / DECODE_TILE_ROWS) * DECODE_TILE_ROWS * kv_heads / heads
    memory_s = keys * bytes_per_key * from_hbm / (p["memory.bandwidth_bytes_per_s"] * p[prefix + "memory_efficiency"])
    compute_s = keys * flops_per_pair * packing / (p["compute.bfloat16.peak_flops"] * p[prefix + "compute_efficiency"])
    timed = roofline(memory_s, compute_s, p[prefix + "corner"])
    blocks = sequences * kv_heads
    splits = (keys >= SPLIT_KEYS * sequences) & (blocks < 0.8 * sm_count) & (sequences > 0)
    fixed_s = (
        present * p[prefix + "launch_s"] + np.where(splits, p[prefix + "split_s"], 0.0)
        + sequences * p[prefix + "sequence_s"] + np.maximum(blocks - sm_count, 0.0) * p[prefix + "sequence_head_s"]
    )  # fmt: skip
    return Timed(fixed_s + present * timed.time_s, present * timed.clocked_s)


#: Query rows of a prefill tile.
PREFILL_TILE_ROWS = 128


def attention_prefill(
    p: Coefficients, sm_count: int, sequences: Any, tokens: Any, pairs: Any, *, heads: Any, moved_bytes: Any,
    flops_per_pair: Any,
) -> Timed:  # fmt: skip
    """Prefill attention of a layer: `tokens` new tokens of `sequences` requests, `pairs` (query, key) pairs under the
    mask; `moved_bytes` are queries, outputs and the keys and values read. `flops_per_pair` is over all heads.

    On a causal diagonal tiles are computed whole: `tile_keys` more keys a query. When there are few tiles the longest
    one is the critical path (its keys are twice the mean's). Each tile costs `tile_s` of an SM besides.
    """
    prefix = "attention.prefill."
    present = np.minimum(sequences, 1.0)
    flops_per_s = p["compute.bfloat16.peak_flops"] * p[prefix + "compute_efficiency"]
    even_s = (pairs + p[prefix + "tile_keys"] * tokens) * flops_per_pair / flops_per_s
    longest = np.maximum(2.0 * pairs / np.maximum(tokens, 1.0), PREFILL_TILE_ROWS) * PREFILL_TILE_ROWS
    # One tile alone on its SM runs faster than one of many that share power and the memory system; 0.7 is its time.
    critical_s = 0.7 * present * longest * (flops_per_pair / heads) * sm_count / flops_per_s
    compute_s = np.maximum(even_s, critical_s)
    blocks = heads * (tokens / PREFILL_TILE_ROWS + sequences / 2)
    memory_s = moved_bytes / (p["memory.bandwidth_bytes_per_s"] * p[prefix + "memory_efficiency"])
    fixed_s = present * p[prefix + "launch_s"] + blocks * p[prefix + "tile_s"] / sm_count
    return Timed(fixed_s + memory_s + compute_s, compute_s)


# -- the rest ---------------------------------------------------------------------------------------------------------


def elementwise(p: Coefficients, moved_bytes: Any) -> Timed:
    """Norms, activations, rotary embedding: one pass over what reaches HBM."""
    seconds = p["elementwise.launch_s"] + moved_bytes / (
        p["memory.bandwidth_bytes_per_s"] * p["elementwise.memory_efficiency"]
    )
    return Timed(seconds, np.zeros_like(seconds))
