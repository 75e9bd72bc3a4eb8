"""From a kernel of a cascade to the form that times it: which of `timing`'s functions, and with what of the kernel."""

from __future__ import annotations

import numpy as np

from energylens_vllm.einsum.kernel import AttentionShape, Kernel
from energylens_vllm.energy import timing
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.precision import FORMATS
from energylens_vllm.energy.timing import Timed
from energylens_vllm.hardware.profile import GpuProfile


def expert_tile_rows(small_tiles: bool, form: str, tokens: Array, local: int) -> Array:
    """Rows of a block of the fused-experts kernel for a step of `tokens`, where no tuned configuration is found.

    Source: vLLM, fused_moe.py `get_default_config`: 0.11 took 16 rows up to as many tokens as experts, then 64, and
    always 64 with block scales; later releases go by the number of tokens.
    """
    if not small_tiles:
        return np.where((tokens <= local) & (not form.startswith("fp8")), 16.0, 64.0)
    if form == "fp8_block":
        return np.where(tokens <= 64, 16.0, 64.0)
    return np.asarray(timing.expert_tile_rows(tokens))


#: Rows to which DeepGEMM's grouped GEMM aligns those of each expert (its contiguous layout).
CONTIGUOUS_ROWS = 128


def contiguous_rows(choices: Array, local: int) -> Array:
    """Rows of DeepGEMM's contiguous layout for `choices` (token, expert) pairs of all ranks and `local` experts.

    The host does not know how many tokens chose which expert, so vLLM reserves as many rows as there could be, and the
    kernel goes over all of them: a single token costs as many blocks as experts. Source: vLLM 0.11.1,
    fused_moe/deep_gemm_utils.py `compute_aligned_M`.
    """
    rows = choices + local * (CONTIGUOUS_ROWS - 1.0)
    return np.where(choices > 0, np.ceil(rows / CONTIGUOUS_ROWS) * CONTIGUOUS_ROWS, 0.0)


def contiguous_bytes(kernel: Kernel, rows: Array) -> Array:
    """Bytes in and out of a grouped GEMM over `rows` of the contiguous layout: 8-bit inputs, 16-bit outputs."""
    assert kernel.gemm is not None
    return rows * (kernel.gemm.k * 1.0 + kernel.gemm.n * 2.0)


def linear(p: GpuProfile, form: str, kernel: Kernel, rows: Array, flops: Array, moved: Array) -> Timed:
    """One dense GEMM of `rows` rows: `moved` activation bytes and the weights cross HBM."""
    assert kernel.gemm is not None
    of, n, k = FORMATS[form], kernel.gemm.n, kernel.gemm.k
    if kernel.gemms > 1:  # fused GEMMs may differ in shape: as many columns of the first's depth as hold all the work
        n = round((kernel.flops.tokens + kernel.flops.sampled + kernel.flops.keys) / (2 * k))
    return timing.linear(
        p, form, p.sm_count, rows, n, k, kernel.weight_bytes, moved, input_bytes=of.input_bytes,
        bytes_per_weight=of.weight_bytes,
    )  # fmt: skip


def experts(
    p: GpuProfile,
    form: str,
    kernel: Kernel,
    choices: Array,
    active: Array,
    padded_rows: Array,
    moved: Array,
    contiguous: bool = False,
) -> Timed:
    """One grouped GEMM of the fused experts: of `choices` (token, expert) pairs, this GPU's are padded to `padded_rows`
    in whole tiles and wake `active` of its experts. `contiguous`: DeepGEMM's, over `contiguous_rows`, whose input the
    kernels before it have quantized."""
    shape, gemm = kernel.experts, kernel.gemm
    assert shape is not None
    assert gemm is not None
    of = FORMATS[form]
    tile_rows = expert_tile_rows(p.small_expert_tiles, form, choices / shape.selected, shape.local)
    if contiguous:
        tile_rows = np.full_like(choices, CONTIGUOUS_ROWS)
    return timing.expert_gemm(
        p, form, p.sm_count, choices, kernel.weight_bytes * active / shape.local, moved, [(tile_rows, padded_rows)],
        n=gemm.n, k=gemm.k, total=shape.total, bytes_per_weight=of.weight_bytes, input_bytes=of.input_bytes,
        quantized_rows=choices * shape.local / shape.total if of.input_bytes < 2 and not contiguous else None,
        square_tiles=not p.small_expert_tiles and not contiguous,
    )  # fmt: skip


def elementwise(p: GpuProfile, moved: Array) -> Timed:
    return timing.elementwise(p, moved)


def attention_decode(
    p: GpuProfile, name: str, shape: AttentionShape, sequences: Array, keys: Array, bytes_per_key: float
) -> Timed:
    """Decode attention of `sequences` requests with `keys` cached tokens together, of which the GPU has its part:
    `bytes_per_key` of each on average. `name` as in `timing`."""
    parts = shape.context_parts
    return timing.attention_decode(
        p, name, p.sm_count, sequences, keys / parts, heads=shape.heads, kv_heads=shape.kv_heads,
        bytes_per_key=bytes_per_key * parts,
        flops_per_pair=2.0 * shape.heads * (shape.head_dim + shape.value_dim),
    )  # fmt: skip


def attention_prefill(
    p: GpuProfile,
    shape: AttentionShape,
    sequences: Array,
    tokens: Array,
    pairs: Array,
    pair_flops: float,
    earlier: Array,
) -> Timed:
    moved = (
        tokens
        * 2.0
        * (shape.heads * (shape.head_dim + shape.value_dim) + shape.kv_heads * (shape.head_dim + shape.value_dim))
        + earlier
    )
    return timing.attention_prefill(
        p, p.sm_count, sequences, tokens, pairs, heads=shape.heads, moved_bytes=moved, flops_per_pair=pair_flops
    )
