"""Time of each kernel family in closed form.

Every form is `t = launch + (t_memory^p + t_compute^p)^(1/p)`: a kernel is bound by HBM or by the tensor cores, and the
p-norm is the soft corner between the two (p is fitted; infinity would be a sharp roofline). Compute terms are for the
top SM clock; the power module stretches them when the GPU runs slower. All functions take arrays that broadcast and
return (seconds, seconds of it that scale with 1 / clock).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


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
