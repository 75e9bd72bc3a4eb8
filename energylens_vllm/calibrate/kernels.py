"""The kernels behind the points, in torch and, where it is installed, as vLLM runs them.

Data are random numbers: with zeros few wires toggle, and a GPU draws less than it does at work. Each kernel goes round
several copies of what it reads, more than a cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from energylens_vllm.calibrate.measure import Unsupported
from energylens_vllm.calibrate.points import EXPERTS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, SELECTED, Point

#: Bytes that the copies of one kernel's data hold together: several times the largest L2 cache.
BEYOND_CACHE = 600e6
MOST_COPIES = 64
#: Tokens of a block of vLLM's KV cache.
BLOCK = 16
#: Cycles that the waiting thread waits: 0.1 ms.
SPIN_CYCLES = 200_000


@dataclass(frozen=True, slots=True)
class Launcher:
    """`launch(i)` enqueues the kernel once, on copy i of its data; `copies` of them. `library`: whose kernel it is."""

    launch: Callable[[int], object]
    copies: int = 1
    library: str = "torch"


def make(point: Point, device: torch.device) -> Launcher:
    """The kernel of a point with its data on `device`. Raises Unsupported."""
    try:
        return MAKERS[point.kind](point, device)
    except torch.OutOfMemoryError:
        raise Unsupported("not enough free GPU memory") from None


def _copies(size: float) -> int:
    return max(1, min(MOST_COPIES, math.ceil(BEYOND_CACHE / size)))


def _normal(*shape: int, device: torch.device, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.empty(*shape, device=device, dtype=dtype).normal_(std=std)


def _spin(point: Point, device: torch.device) -> Launcher:
    return Launcher(lambda _: torch.cuda._sleep(SPIN_CYCLES))


def _memory(point: Point, device: torch.device) -> Launcher:
    read, written = (point.shape[name] // 4 for name in ("read", "written"))
    source = _normal(read or written, device=device, dtype=torch.float32)
    if not written:
        return Launcher(lambda _: torch.sum(source))
    copies = 1 if read else MOST_COPIES  # of what is written; what is read then stays in the cache
    into = [torch.empty(written, device=device) for _ in range(copies)]
    return Launcher(lambda i: torch.neg(source, out=into[i]), copies)


def _tiny(point: Point, device: torch.device) -> Launcher:
    a, b = (_normal(1024, device=device, dtype=torch.float32) for _ in range(2))
    into = torch.empty_like(a)
    return Launcher(lambda _: torch.add(a, b, out=into))


def _linear(point: Point, device: torch.device) -> Launcher:
    rows, n, k = (point.shape[name] for name in ("rows", "n", "k"))
    copies = _copies(2.0 * n * k)
    x = _normal(rows, k, device=device)
    weights = [_normal(n, k, device=device, std=0.02) for _ in range(copies)]
    into = torch.empty(rows, n, device=device, dtype=torch.bfloat16)
    return Launcher(lambda i: torch.mm(x, weights[i].t(), out=into), copies)


def _linear_fp8(point: Point, device: torch.device) -> Launcher:
    rows, n, k = (point.shape[name] for name in ("rows", "n", "k"))
    copies = _copies(1.0 * n * k)
    one = torch.ones((), device=device, dtype=torch.float32)

    def fp8(*shape: int) -> Any:
        return _normal(*shape, device=device).to(torch.float8_e4m3fn)

    def launch(i: int) -> Any:
        return torch._scaled_mm(x, weights[i].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    x, weights = fp8(rows, k), [fp8(n, k) for _ in range(copies)]
    try:
        launch(0)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise Unsupported(f"torch._scaled_mm does not run here: {_first_line(error)}") from None
    return Launcher(launch, copies)


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(point: Point, device: torch.device) -> Launcher:
    sequences = point.shape["sequences"]
    context = point.shape.get("context", point.shape.get("tokens", 0))
    new = 1 if point.kind == "decode" else context
    if device.type == "cuda":
        try:
            return _paged_attention(sequences, new, context, device)
        except (ImportError, RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return _sdpa(sequences, new, context, device)


def _paged_attention(sequences: int, new: int, context: int, device: torch.device) -> Launcher:
    """vLLM's FlashAttention over a paged KV cache, with blocks in random order."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    version = 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2
    copies = _copies(4.0 * KV_HEADS * HEAD_DIM * sequences * context)
    blocks = math.ceil(context / BLOCK)
    pages = copies * sequences * blocks
    keys, values = (_normal(pages, BLOCK, KV_HEADS, HEAD_DIM, device=device) for _ in range(2))
    tables = torch.randperm(pages, device=device, dtype=torch.int32).view(copies, sequences, blocks)
    query = _normal(sequences * new, HEADS, HEAD_DIM, device=device)
    into = torch.empty_like(query)
    used = torch.full((sequences,), context, device=device, dtype=torch.int32)
    starts = torch.arange(0, (sequences + 1) * new, new, device=device, dtype=torch.int32)
    metadata = None
    if version == 3:  # vLLM computes it once a step, for all layers
        metadata = get_scheduler_metadata(
            batch_size=sequences, max_seqlen_q=new, max_seqlen_k=context, num_heads_q=HEADS, num_heads_kv=KV_HEADS,
            headdim=HEAD_DIM, cache_seqlens=used, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=BLOCK,
            causal=True,
        )  # fmt: skip

    def launch(i: int) -> Any:
        return flash_attn_varlen_func(
            q=query, k=keys, v=values, out=into, cu_seqlens_q=starts, max_seqlen_q=new, seqused_k=used,
            max_seqlen_k=context, softmax_scale=HEAD_DIM**-0.5, causal=True, block_table=tables[i],
            scheduler_metadata=metadata, fa_version=version,
        )  # fmt: skip

    launch(0)
    torch.cuda.synchronize(device)
    return Launcher(launch, copies, "vllm")


def _sdpa(sequences: int, new: int, context: int, device: torch.device) -> Launcher:
    """torch's attention, where vLLM's is not installed."""
    copies = _copies(4.0 * KV_HEADS * HEAD_DIM * sequences * context)
    query = _normal(sequences, HEADS, new, HEAD_DIM, device=device)
    keys, values = (
        [_normal(sequences, KV_HEADS, context, HEAD_DIM, device=device) for _ in range(copies)] for _ in range(2)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    return Launcher(lambda i: attend(query, keys[i], values[i], is_causal=new > 1, enable_gqa=True), copies)


# -- experts ----------------------------------------------------------------------------------------------------------


def _experts(point: Point, device: torch.device) -> Launcher:
    """vLLM's fused experts; each copy has its own random choice of experts, so that no cache holds their weights."""
    try:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    except Exception as error:  # an installation of vLLM that is broken in any way is one without experts
        raise Unsupported(f"vLLM's fused experts cannot be imported: {_first_line(error)}") from None
    tokens = point.shape["tokens"]
    x = _normal(tokens, HIDDEN, device=device)
    w13 = _normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device, std=0.02)
    w2 = _normal(EXPERTS, HIDDEN, INTERMEDIATE, device=device, std=0.02)
    copies = 16
    ids = [torch.rand(tokens, EXPERTS, device=device).topk(SELECTED).indices.to(torch.int32) for _ in range(copies)]
    weights = torch.full((tokens, SELECTED), 1 / SELECTED, device=device, dtype=torch.float32)

    def launch(i: int) -> Any:
        return fused_experts(x, w13, w2, weights, ids[i])

    try:
        launch(0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Unsupported(f"vLLM's fused experts do not run here: {_first_line(error)}") from None
    return Launcher(launch, copies, "vllm")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


MAKERS: dict[str, Callable[[Point, torch.device], Launcher]] = {
    "spin": _spin,
    "memory": _memory,
    "launch": _tiny,
    "host": _tiny,
    "linear": _linear,
    "linear_fp8": _linear_fp8,
    "decode": _attention,
    "prefill": _attention,
    "experts": _experts,
}
