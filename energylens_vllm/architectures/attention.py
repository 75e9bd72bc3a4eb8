"""Grouped-query attention, with the variations that families have of it."""

from __future__ import annotations

from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.part import Part
from energylens_vllm.einsum import Rank


def attention(
    config: Config,
    *,
    window: int | None = None,
    chunk: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    norm: str | None = None,
    rope: bool = True,
    sinks: bool = False,
) -> Part:
    """From `A` to `X`: one GEMM for queries, keys and values, norm and rope, the cache, attention, the output GEMM.

    A query sees the last `window` keys, or those of its own `chunk` of positions, or all before it. `norm` is what
    queries and keys go through before rope: "rms" with a weight, "l2" without, or nothing. `sinks` is a learnt logit of
    each head beside the scores. Norm and rope are one kernel, which inductor makes of them; biases ride in the epilogue
    of the GEMM.
    """
    c = "cs" if window else "cc" if chunk else "c"
    heads, kv_heads = config.size("num_attention_heads"), _kv_heads(config)
    if heads % kv_heads:
        raise config.error(f"field 'num_key_value_heads': {kv_heads} does not divide num_attention_heads {heads}")
    q, k = {"rms": ("rmsnorm(Q[t,h,e]) * NQ[e]", "rmsnorm(KN[t,g,e]) * NK[e]"),
            "l2": ("l2norm(Q[t,h,e])", "l2norm(KN[t,g,e])"),
            None: ("Q[t,h,e]", "KN[t,g,e]")}[norm]  # fmt: skip
    kernels = {
        "qkv": [
            "Q[t,h,e] = A[t,d] * WQ[d,h,e]" + (" + BQ[h,e]" if qkv_bias else ""),
            "KN[t,g,e] = A[t,d] * WK[d,g,e]" + (" + BK[g,e]" if qkv_bias else ""),
            "VN[t,g,e] = A[t,d] * WV[d,g,e]" + (" + BV[g,e]" if qkv_bias else ""),
        ]
    }
    if rope:
        kernels["qk_norm_rope" if norm else "rope"] = [f"QR[t,h,e] = rope({q})", f"KR[t,g,e] = rope({k})"]
    elif norm:
        kernels["qk_norm"] = [f"QR[t,h,e] = {q}", f"KR[t,g,e] = {k}"]
    query, key = ("QR", "KR") if rope or norm else ("Q", "KN")
    kernels |= {
        "cache": [f"K[t,g,e] = {key}[t,g,e]", "V[t,g,e] = VN[t,g,e]"],
        "attention": [
            f"S[t,h,{c}] = {query}[t,h,e] * K[{c},g,e]",
            f"P[t,h,{c}] = softmax(S[t,h,{c}]{', SINK[h]' if sinks else ''})",
            f"O[t,h,e] = P[t,h,{c}] * V[{c},g,e]",
        ],
        "o": ["X[t,d] = O[t,h,e] * WO[h,e,d]" + (" + BO[d]" if output_bias else "")],
    }
    plain = ("BQ BK BV " if qkv_bias else "") + ("BO " if output_bias else "") + ("SINK " if sinks else "")
    return Part(
        kernels,
        {
            c: Rank(bound="context", window=window, chunk=chunk),
            "h": Rank(heads, split="tp"),
            "g": Rank(kv_heads, groups="h"),
            "e": head_dim(config),
        },
        {"quantized": "WQ WK WV WO", "plain": plain + ("NQ NK" if norm == "rms" else ""), "kv_cache": "K V"},
    )


def head_dim(config: Config) -> int:
    """The field, or else the hidden size shared among the heads."""
    if "head_dim" in config:
        return config.size("head_dim")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise config.error(
            f"field 'head_dim' is missing, and num_attention_heads {heads} does not divide hidden_size {hidden}"
        )
    return hidden // heads


def _kv_heads(config: Config) -> int:
    return config.size("num_key_value_heads", default=config.size("num_attention_heads"))
