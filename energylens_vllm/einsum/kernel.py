"""What a cascade hands to the step model: launched kernels with exact work, linear in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Phase = Literal["all", "prefill", "decode"]
Family = Literal["linear", "experts", "attention", "elementwise", "gather", "collective"]
CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


class Terms(NamedTuple):
    """A quantity of one kernel launch on one GPU, linear in what the step's batch holds.

    value = constant + tokens * T + sampled * S + pairs * P + keys * K, where T is the tokens the GPU sees in this
    step, S the rows that reach the language-model head, P the (query, attended key) pairs under the kernel's mask,
    and K the KV-cache tokens read under that mask.
    """

    constant: float = 0.0
    tokens: float = 0.0
    sampled: float = 0.0
    pairs: float = 0.0
    keys: float = 0.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per element of each kind of tensor (scales of block formats included)."""

    weight: float = 2.0  #: weights that quantization touches (linear layers, experts)
    expert_weight: float = 2.0  #: experts (differs from `weight` where only they are quantized, as in gpt-oss)
    plain_weight: float = 2.0  #: weights that quantization leaves alone (embedding, head, norms, router)
    kv_cache: float = 2.0
    activation: float = 2.0


@dataclass(frozen=True, slots=True)
class Mesh:
    """Parallel degrees. `ep` ranks hold different experts; vLLM makes it tp * pcp * dp when expert parallelism is on,
    and 1 otherwise. With dp > 1 tokens reach the experts of other data-parallel ranks by all-gather and come back by
    reduce-scatter; with `all2all` (vLLM's DeepEP and other all2all backends) expert parallelism exchanges only the
    tokens that are wanted. `redundant_experts` are copies for load balancing (vLLM's EPLB).

    `pcp` ranks split the tokens of each step and keep a whole cache each (prefill context parallelism). `dcp` of the tp
    ranks share out each request's KV cache (decode context parallelism). Their partial outputs are put together by an
    all-gather of log-sum-exps and a reduce-scatter, or with `dcp_a2a` by one all-to-all; with `dcp_q_replicate` each
    computes the queries of all of them instead of gathering them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    all2all: bool = False
    redundant_experts: int = 0
    pcp: int = 1
    dcp: int = 1
    dcp_a2a: bool = False
    dcp_q_replicate: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query attends to. `window`: at most the last `window` keys, itself included (sliding window).
    `chunk`: only keys of its own chunk of that many positions (Llama 4). Neither: full causal attention."""

    window: int | None = None
    chunk: int | None = None
    causal: bool = True


@dataclass(frozen=True, slots=True)
class GemmShape:
    """rows x k times k x n on one GPU; for experts, of one expert."""

    rows: Literal["tokens", "sampled", "keys"]
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one GPU. MLA: `kv_heads` 1 and `head_dim` that of the latent plus rope part. The GPU has every
    `context_parts`-th key of a request."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mask: Mask = Mask()
    context_parts: int = 1


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """`total` experts in the layer, `local` of them on this GPU, `selected` per token."""

    total: int
    local: int
    selected: int


def reached(selected: int, total: int, local: int) -> float:
    """Chance that at least one of a token's `selected` distinct experts is among `local` of `total`, all alike."""
    missed = 1.0
    for i in range(selected):
        missed *= max(0.0, (total - local - i) / (total - i))
    return 1.0 - missed


@dataclass(frozen=True, slots=True)
class CollectiveShape:
    """`op` over the `axis` group of `size` GPUs.

    The kernel's `activation_bytes` are the message: for all_reduce the tensor, for all_gather the gathered tensor, for
    reduce_scatter the tensor before it is scattered, for all_to_all what one GPU sends, for send_recv what is sent.
    """

    op: CollectiveOp
    axis: Literal["tp", "ep", "dp", "pp", "pcp", "dcp"]
    size: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, launched `count` times in a step of this GPU.

    `flops` counts a multiply-add as 2. `weight_bytes` of an `experts` kernel is for all local experts: the step model
    scales it by the active share; `flops` there already counts only the selected experts' share of the local tokens
    under uniform routing. Bytes are those that must cross HBM: intermediates inside a fused group are absent.
    """

    name: str  #: the block's and the fused group's name, e.g. "layer.qkv"
    family: Family
    count: int
    flops: Terms = Terms()
    weight_bytes: float = 0.0
    quantized: bool = False  #: whether its weights are in the quantized format
    kv_read_bytes: Terms = Terms()
    kv_write_bytes: Terms = Terms()
    activation_bytes: Terms = Terms()
    gemm: GemmShape | None = None
    gemms: int = 1  #: GEMMs in this kernel (2 for a fused gate-up + down expert kernel)
    attention: AttentionShape | None = None
    experts: ExpertShape | None = None
    collective: CollectiveShape | None = None
    stage: int = 0  #: pipeline stage
    phase: Phase = "all"  #: the requests whose tokens, pairs and keys the terms count (MLA runs other kernels in each)
    #: part of attention over a context that is split over dcp, not of what surrounds it: launched only where a request
    #: has a context, and by Python unless a CUDA graph holds the whole step
    split_context: bool = False
