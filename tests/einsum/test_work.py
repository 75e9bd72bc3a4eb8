"""FLOPs and bytes against closed formulas written out by hand, and against vLLM's own estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from energylens_vllm.einsum import Cascade, Kernel, Mask, Mesh, Terms, Widths, block, build_cascade
from energylens_vllm.einsum.rank import Rank

Quantity = Callable[[Kernel], Terms]


def total(kernels: list[Kernel], quantity: Quantity) -> Terms:
    """Summed over a step: `count` launches of each kernel."""
    return Terms(*(sum(k.count * field for k, field in column) for column in zip(
        *([(k, field) for field in quantity(k)] for k in kernels), strict=True)))  # fmt: skip


def named(kernels: list[Kernel]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}


def test_llama_8b_by_hand(llama: Cascade) -> None:
    layers, d, h, g, e, f, v = 32, 4096, 32, 8, 128, 14336, 128256
    kernels = llama.kernels(Widths(weight=1.0, kv_cache=1.0))
    flops = total(kernels, lambda k: k.flops)
    assert flops.tokens == layers * 2 * d * ((h + 2 * g) * e + h * e + 3 * f)
    assert flops.pairs == layers * 2 * 2 * h * e
    assert flops.sampled == 2 * d * v
    assert flops.constant == flops.keys == 0
    assert total(kernels, lambda k: k.kv_read_bytes) == Terms(keys=layers * 2 * g * e)
    assert total(kernels, lambda k: k.kv_write_bytes) == Terms(tokens=layers * 2 * g * e)
    linear = sum(k.count * k.weight_bytes for k in kernels if k.quantized)
    assert linear == layers * d * ((h + 2 * g) * e + h * e + 3 * f)
    plain = sum(k.count * k.weight_bytes for k in kernels if not k.quantized)
    assert plain == 2 * ((2 * layers + 1) * d + d * v)  # the embedding is read by the row, not whole


def test_llama_8b_activations_by_hand(llama: Cascade) -> None:
    d, q, kv, f, v = 4096, 32 * 128, 8 * 128, 14336, 128256
    activations = {name: k.activation_bytes for name, k in named(llama.kernels()).items()}
    assert activations == {
        "embed.embed": Terms(tokens=4 + 2 * d + 2 * d),  # the id, the row, the row again as activation
        "layer.input_norm": Terms(tokens=2 * 4 * d),  # reads and writes residual and hidden
        "layer.qkv": Terms(tokens=2 * (d + q + 2 * kv)),
        "layer.rope": Terms(tokens=2 * 2 * (q + kv)),
        "layer.cache": Terms(tokens=2 * 2 * kv),  # reads; what it writes is the cache
        "layer.attention": Terms(tokens=2 * 2 * q),  # scores never leave the kernel
        "layer.o": Terms(tokens=2 * (q + d)),
        "layer.post_norm": Terms(tokens=2 * 4 * d),
        "layer.gate_up": Terms(tokens=2 * (d + 2 * f)),
        "layer.act": Terms(tokens=2 * 3 * f),
        "layer.down": Terms(tokens=2 * (f + d)),
        "head.norm": Terms(tokens=2 * 4 * d),
        "head.last": Terms(sampled=4 + 2 * 2 * d),
        "head.lm_head": Terms(sampled=2 * (d + v)),
        "head.sample": Terms(sampled=2 * (v + 1)),
    }


def test_qwen3_30b_a3b_by_hand(qwen3_moe: Cascade) -> None:
    layers, d, h, g, e, experts, k, m, v = 48, 2048, 32, 4, 128, 128, 8, 768, 151936
    kernels = qwen3_moe.kernels(Widths(expert_weight=1.0))
    flops = total(kernels, lambda kernel: kernel.flops)
    attention = 2 * d * (h + 2 * g) * e + 2 * h * e * d
    router, sum_of_experts = 2 * d * experts, 2 * k * d
    assert flops.tokens == layers * (attention + router + k * 2 * 3 * d * m + sum_of_experts)
    assert flops.pairs == layers * 4 * h * e
    assert flops.sampled == 2 * d * v
    weights = {name: kernel.weight_bytes for name, kernel in named(kernels).items()}
    assert weights["layer.w13"] == experts * 2 * d * m
    assert weights["layer.w2"] == experts * d * m
    assert weights["layer.qkv"] == 2 * d * (h + 2 * g) * e
    assert weights["layer.qk_norm_rope"] == 2 * 2 * e
    assert weights["layer.router"] == 2 * d * experts
    activations = {name: kernel.activation_bytes.tokens for name, kernel in named(kernels).items()}
    assert activations["layer.topk"] == 2 * experts + 8 * k  # logits; weights in float32 and ids in int32
    assert activations["layer.w13"] == 2 * (d + k * 2 * m)
    assert activations["layer.act"] == 2 * 3 * k * m
    assert activations["layer.w2"] == 2 * k * (m + d)
    assert activations["layer.sum"] == 2 * (k * d + d) + 8 * k


def test_latent_attention_by_hand(deepseek: Cascade) -> None:
    """Prefill expands the latents to keys and values of each head; decode attends to the latents."""
    h, latent, nope, rope, value = 16, 512, 128, 64, 128
    kernels = named(deepseek.kernels())
    assert kernels["moe.kv_b"].flops == Terms(keys=2 * latent * h * (nope + value))
    assert kernels["moe.kv_b"].kv_read_bytes == Terms(keys=2 * latent)
    assert kernels["moe.prefill"].flops == Terms(pairs=2 * h * (nope + rope + value))
    assert kernels["moe.decode"].flops == Terms(pairs=2 * h * (latent + rope + latent))
    assert kernels["moe.decode"].kv_read_bytes == Terms(keys=2 * (latent + rope))
    assert kernels["moe.absorb"].flops == Terms(tokens=2 * h * nope * latent)
    assert kernels["moe.v_up"].flops == Terms(tokens=2 * h * latent * value)
    assert kernels["moe.cache"].kv_write_bytes == Terms(tokens=2 * (latent + rope))
    phases = {name: kernel.phase for name, kernel in kernels.items() if kernel.phase != "all"}
    assert {name for name, phase in phases.items() if phase == "prefill"} == {
        f"{block}.{kernel}" for block in ("dense", "moe") for kernel in ("kv_b", "prefill")
    }
    assert {name for name, phase in phases.items() if phase == "decode"} == {
        f"{block}.{kernel}" for block in ("dense", "moe") for kernel in ("absorb", "decode", "v_up")
    }


def test_shapes(llama: Cascade, qwen3_moe: Cascade, deepseek: Cascade) -> None:
    dense, experts, latent = (named(cascade.kernels()) for cascade in (llama, qwen3_moe, deepseek))

    def gemm(kernel: Kernel) -> tuple[Any, ...]:
        assert kernel.gemm is not None
        return kernel.gemm.rows, kernel.gemm.n, kernel.gemm.k, kernel.gemms

    assert gemm(dense["layer.qkv"]) == ("tokens", 6144, 4096, 1)  # q, k and v merged
    assert gemm(dense["layer.gate_up"]) == ("tokens", 28672, 4096, 1)
    assert gemm(dense["head.lm_head"]) == ("sampled", 128256, 4096, 1)
    assert gemm(experts["layer.w13"]) == ("tokens", 1536, 2048, 1)  # of one expert
    assert gemm(experts["layer.w2"]) == ("tokens", 2048, 768, 1)
    assert gemm(latent["moe.absorb"]) == ("tokens", 512, 128, 16)  # one for each head
    assert gemm(latent["moe.kv_b"]) == ("keys", 16 * 256, 512, 1)

    def heads(kernel: Kernel) -> tuple[int, int, int, int]:
        assert kernel.attention is not None
        shape = kernel.attention
        return shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim

    assert heads(dense["layer.attention"]) == (32, 8, 128, 128)
    assert heads(latent["moe.prefill"]) == (16, 16, 192, 128)
    assert heads(latent["moe.decode"]) == (16, 1, 576, 512)


def test_families(qwen3_moe: Cascade) -> None:
    families = {name.removeprefix("layer."): kernel.family for name, kernel in named(qwen3_moe.kernels()).items()}
    assert families == {
        "embed.embed": "gather",
        "input_norm": "elementwise",
        "qkv": "linear",
        "qk_norm_rope": "elementwise",
        "cache": "elementwise",
        "attention": "attention",
        "o": "linear",
        "post_norm": "elementwise",
        "router": "linear",
        "topk": "elementwise",
        "w13": "experts",
        "act": "elementwise",
        "w2": "experts",
        "sum": "elementwise",
        "head.norm": "elementwise",
        "head.last": "gather",
        "head.lm_head": "linear",
        "head.sample": "elementwise",
    }


@pytest.mark.parametrize(
    ("rank", "mask"),
    [
        (Rank(bound="context"), Mask()),
        (Rank(bound="context", window=128), Mask(window=128)),
        (Rank(bound="context", chunk=8192), Mask(chunk=8192)),
        (Rank(bound="context", causal=False), Mask(causal=False)),
    ],
)
def test_masks_and_biases(rank: Rank, mask: Mask) -> None:
    """A layer as in gpt-oss: biases, and a sink beside the scores."""
    cascade = build_cascade(
        "sink",
        ranks={"t": "tokens", "c": rank, "d": 64, "h": 4, "g": Rank(2, groups="h"), "e": 16},
        tensors={"quantized": "WQ WK WV", "plain": "BQ BK BV SINK", "kv_cache": "K V", "input": "IN"},
        blocks=[
            block(
                "layer",
                {
                    "qkv": [
                        "Q[t,h,e] = IN[t,d] * WQ[d,h,e] + BQ[h,e]",
                        "K[t,g,e] = IN[t,d] * WK[d,g,e] + BK[g,e]",
                        "V[t,g,e] = IN[t,d] * WV[d,g,e] + BV[g,e]",
                    ],
                    "attention": [
                        "S[t,h,c] = Q[t,h,e] * K[c,g,e]",
                        "P[t,h,c] = softmax(S[t,h,c], SINK[h])",
                        "O[t,h,e] = P[t,h,c] * V[c,g,e]",
                    ],
                },
                count=1,
            )
        ],
    )
    kernels = named(cascade.kernels())
    qkv, attention = kernels["layer.qkv"], kernels["layer.attention"]
    assert attention.attention is not None
    assert attention.attention.mask == mask
    assert attention.weight_bytes == 2 * 4
    assert cascade.parameters() == (64 + 1) * (4 + 2 + 2) * 16 + 4
    assert qkv.flops.tokens == 2 * 64 * (4 + 2 + 2) * 16  # a bias is free: it rides in the epilogue
    assert qkv.kv_write_bytes.tokens == 2 * 2 * 2 * 16
    assert qkv.quantized


def test_weight_bytes(any_cascade: Cascade) -> None:
    """Without sharding a GPU holds every parameter once, the vocabulary padded to a multiple of 64."""
    ranks = any_cascade.ranks
    assert ranks["v"].size == ranks["v"].padded
    assert any_cascade.weight_bytes() == [2 * any_cascade.parameters()]
    assert any_cascade.weight_bytes(Widths(weight=1.0, expert_weight=1.0))[0] < any_cascade.parameters() * 2


@pytest.mark.vllm
def test_dense_work_is_vllms_estimate(llama: Cascade) -> None:
    """`vllm/v1/metrics/perf.py` on decodes, where its full-context pairs are the causal ones. Its known deviations are
    stated where they are taken back."""
    perf = pytest.importorskip("vllm.v1.metrics.perf")
    layers, d, h, g, e, f, v = 32, 4096, 32, 8, 128, 14336, 128256
    for tp in (1, 4):
        common = dict(num_hidden_layers=layers, hidden_size=d, activation_byte_size=2, pp_size=1, weight_byte_size=1)
        attention = perf.AttentionMetrics(
            **common, num_attention_heads=h, tp_size=tp, num_key_value_heads=g, head_dim=e, cache_byte_size=2
        )
        ffn = perf.FfnMetrics(**common, ffn_tp_size=tp, ffn_ep_size=1, intermediate_size=f, num_moe_layers=0)
        head = perf.UnembedMetrics(hidden_size=d, vocab_size=v, weight_byte_size=2, activation_byte_size=2, tp_size=tp)
        step = perf.ExecutionContext()
        for context in (100, 1000, 5000):
            step.add(1, context, is_prefill=False)
        tokens, pairs = 3, 6100

        kernels = [k for k in llama.kernels(Widths(weight=1.0), Mesh(tp=tp)) if k.family != "collective"]
        flops = total(kernels, lambda k: k.flops)
        theirs = sum(metric.get_num_flops(step) for metric in (attention, ffn, head))
        assert flops.tokens * tokens + flops.sampled * tokens + flops.pairs * pairs == theirs

        compared = ("layer.qkv", "layer.attention", "layer.o", "layer.gate_up", "layer.down", "head.lm_head")
        read = sum(k.count * (k.weight_bytes + k.kv_read_bytes.keys * pairs) for k in kernels if k.name in compared)
        inputs = d + 2 * h * e // tp + d + f // tp  # of qkv, attention, o, gate_up and down
        read += 2 * tokens * (layers * inputs + d)
        silu = layers * 2 * tokens * 2 * f // tp  # they count the activation function's input, not its output
        assert read + silu == sum(metric.get_read_bytes(step) for metric in (attention, ffn, head))


@pytest.mark.vllm
def test_expert_work_is_vllms_estimate(qwen3_moe: Cascade) -> None:
    perf = pytest.importorskip("vllm.v1.metrics.perf")
    ffn = perf.FfnMetrics(
        num_hidden_layers=48,
        hidden_size=2048,
        activation_byte_size=2,
        pp_size=1,
        ffn_tp_size=1,
        ffn_ep_size=4,
        intermediate_size=6144,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        num_moe_layers=48,
        weight_byte_size=1,
    )
    step = perf.ExecutionContext()
    step.add(512, 512, is_prefill=True)
    kernels = [k for k in qwen3_moe.kernels(Widths(expert_weight=1.0), Mesh(tp=4, ep=4)) if k.family == "experts"]
    assert total(kernels, lambda k: k.flops).tokens * 512 == ffn.get_num_flops(step)
    reads = ffn.get_read_bytes_breakdown(step)
    weights = reads["routed_up_gate_weights"] + reads["routed_down_weights"]
    assert sum(k.count * k.weight_bytes for k in kernels) == weights
