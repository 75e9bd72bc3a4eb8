"""Time of each kernel family in closed form.

Every form is `t = launch + (t_memory^p + t_compute^p)^(1/p)`: a kernel is bound by HBM or by the tensor cores, and the
p-norm is the soft corner between the two (p is fitted; infinity would be a sharp roofline). Compute terms are for the
top SM clock; the power module stretches them when the GPU runs slower. All functions take arrays that broadcast and
return (seconds, seconds of it that scale with 1 / clock).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from energylens_vllm.einsum.kernel import AttentionShape, Kernel


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
    return Timed(time_s, time_s * compute / total)


#: Rows that one tensor-core tile of a GEMM covers at least (wgmma's M is 64); fewer rows cost as much compute.
TILE_ROWS = 64


# The functions that step.py calls. `p` is a profile: p["name"] is a coefficient. All arrays have one shape.


def linear(p: Any, form: str, kernel: Kernel, rows: Any, flops: Any, moved: Any) -> Timed:
    """One dense GEMM of `rows` rows: `moved` activation bytes and the weights cross HBM."""
    name = f"linear.{form}"
    bandwidth = p["memory.bandwidth_bytes_per_s"] * p[f"{name}.memory_efficiency"]
    peak = p[f"compute.{form}.peak_flops"] * p[f"{name}.compute_efficiency"]
    tiles = np.maximum(rows, TILE_ROWS) / np.maximum(rows, 1)
    timed = roofline((kernel.weight_bytes + moved) / bandwidth, flops * tiles / peak, p[f"{name}.corner"])
    return Timed(timed.time_s + p[f"{name}.launch_s"], timed.clocked_s)


def experts(
    p: Any, form: str, kernel: Kernel, tokens: Any, active: Any, rows: Any, padded_rows: Any, moved: Any
) -> Timed:
    """One grouped GEMM of the fused experts: `active` of this GPU's experts see `rows` (token, expert) pairs, padded
    to `padded_rows` in whole tiles."""
    name, shape = f"experts.{form}", kernel.experts
    assert shape is not None
    assert kernel.gemm is not None
    weights = kernel.weight_bytes * active / shape.local
    per_row = 2.0 * kernel.gemm.n * kernel.gemm.k
    bandwidth = p["memory.bandwidth_bytes_per_s"] * p[f"{name}.memory_efficiency"]
    peak = p[f"compute.{form}.peak_flops"] * p[f"{name}.compute_efficiency"]
    timed = roofline((weights + moved) / bandwidth, per_row * padded_rows / peak, p[f"{name}.corner"])
    return Timed(timed.time_s + p[f"{name}.launch_s"] + p[f"{name}.token_s"] * tokens, timed.clocked_s)


def elementwise(p: Any, moved: Any) -> Timed:
    """A kernel that only moves bytes."""
    bandwidth = p["memory.bandwidth_bytes_per_s"] * p["elementwise.memory_efficiency"]
    return Timed(p["elementwise.launch_s"] + moved / bandwidth, np.zeros_like(moved))


def attention_decode(p: Any, shape: AttentionShape, sequences: Any, tokens: Any, keys: Any, read: Any) -> Timed:
    """Decode attention of `sequences` requests with `tokens` new tokens that read `keys` cached ones (`read` bytes)."""
    bandwidth = p["memory.bandwidth_bytes_per_s"] * p["attention.decode.memory_efficiency"]
    each = p["attention.decode.sequence_s"] + shape.kv_heads * p["attention.decode.sequence_head_s"]
    time_s = read / bandwidth + sequences * each + np.where(sequences > 0, p["attention.decode.launch_s"], 0.0)
    return Timed(time_s, np.zeros_like(time_s))


def attention_prefill(p: Any, shape: AttentionShape, tokens: Any, pairs: Any, pair_flops: float, earlier: Any) -> Timed:
    """Prefill attention of `tokens` tokens over `pairs` (query, key) pairs of `pair_flops` each; `earlier` bytes of
    cached keys come from HBM. Whole tiles are computed: on the diagonal half of each 128 x 128 tile is wasted."""
    peak = p["compute.bfloat16.peak_flops"] * p["attention.prefill.compute_efficiency"]
    compute_s = (pairs + 64.0 * tokens) * pair_flops / peak
    time_s = compute_s + np.where(tokens > 0, p["attention.prefill.launch_s"], 0.0)
    return Timed(time_s, compute_s)
