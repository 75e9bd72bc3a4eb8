"""Work of built cascades: against those written by hand, against formulas, and masks against enumeration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.architectures import build, known_models, load_config
from energylens_vllm.einsum import Cascade, Kernel, Mask, Mesh, Terms, Widths, load_cascade
from energylens_vllm.energy.batch import steps_from_arrays

BY_HAND = Path(__file__).parents[1] / "einsum" / "cascades"
MESHES = [Mesh(), Mesh(tp=4), Mesh(tp=2, pp=2), Mesh(dp=4), Mesh(tp=2, dp=2, ep=4), Mesh(dp=2, ep=2, all2all=True)]


def model(name: str) -> Cascade:
    return build(load_config(name))


def named(kernels: list[Kernel]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v2-lite"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_kernels_are_those_written_by_hand(name: str, mesh: Mesh) -> None:
    by_hand = load_cascade(BY_HAND / f"{name}.yaml").kernels(mesh=mesh)
    built = model(name).kernels(mesh=mesh)
    renamed = {k.name.replace("expert_act", "act"): replace(k, name=k.name.replace("expert_act", "act")) for k in built}
    assert renamed == named(by_hand)


def test_gemma_2_9b_by_hand() -> None:
    layers, d, h, g, e, f, v = 42, 3584, 16, 8, 256, 14336, 256000
    kernels = model("gemma-2-9b").kernels(Widths(weight=1.0))
    flops = [Terms(*(k.count * each for each in k.flops)) for k in kernels]
    assert sum(each.tokens for each in flops) == layers * 2 * d * ((h + 2 * g) * e + h * e + 3 * f)
    assert sum(each.pairs for each in flops) == layers * 2 * 2 * h * e
    assert sum(each.sampled for each in flops) == 2 * d * v
    linear = sum(k.count * k.weight_bytes for k in kernels if k.quantized)
    assert linear == layers * d * ((h + 2 * g) * e + h * e + 3 * f)
    assert sum(k.count * k.weight_bytes for k in kernels if not k.quantized) == 2 * ((4 * layers + 1) * d + d * v)
    one = named(kernels)
    assert one["full.post_norm"].activation_bytes == Terms(tokens=2 * 4 * d)  # reads output and residual, writes both
    assert one["full.mlp_norm"].activation_bytes == Terms(tokens=2 * 2 * d)
    assert one["head.softcap_tanh"].activation_bytes == Terms(sampled=2 * 2 * v)
    assert (one["sliding.qkv"].count, one["full.qkv"].count) == (21, 21)


def test_gpt_oss_20b_by_hand() -> None:
    layers, d, h, g, e, experts, k, m = 24, 2880, 64, 8, 64, 32, 4, 2880
    kernels = model("gpt-oss-20b").kernels(Widths(expert_weight=0.5 + 1 / 32))
    one = named(kernels)
    tokens = sum(kernel.count * kernel.flops.tokens for kernel in kernels)
    attention = 2 * d * (h + 2 * g) * e + 2 * h * e * d
    assert tokens == layers * (attention + 2 * d * experts + k * 2 * 3 * d * m + 2 * k * d)
    assert one["full.w13"].weight_bytes == experts * 2 * m * (d * (0.5 + 1 / 32) + 2)  # and biases in 16 bits
    assert one["full.w2"].weight_bytes == experts * d * (m * (0.5 + 1 / 32) + 2)
    # The activation is an epilogue of the first GEMM, the sum over experts of the second.
    assert one["full.w13"].activation_bytes == Terms(tokens=2 * (d + k * m))
    assert one["full.w2"].activation_bytes == Terms(tokens=2 * (k * m + d) + 8 * k)
    assert "full.sum" not in one
    assert one["sliding.attention"].weight_bytes == 2 * h  # sinks
    shape = one["sliding.attention"].attention
    assert shape is not None
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.mask) == (h, g, e, Mask(window=128))


def test_without_mxfp4_the_experts_are_those_of_every_family() -> None:
    plain = load_config("gpt-oss-20b")
    del plain["quantization_config"]
    assert {"full.expert_act", "full.sum"} <= named(build(plain).kernels()).keys()


def test_deepseek_v3_by_hand() -> None:
    """Work of a decoded token: absorbed latent attention, shared and routed experts."""
    d, h, q, latent, nope, rope, value = 7168, 128, 1536, 512, 128, 64, 128
    one = named(model("deepseek-v3").kernels())
    assert one["moe.qkv_a"].flops.tokens == 2 * d * (q + latent + rope)
    assert one["moe.qkv_a"].gemms == 1
    assert one["moe.q_b"].flops.tokens == 2 * q * h * (nope + rope)
    assert one["moe.decode"].flops.pairs == 2 * h * (latent + rope + latent)
    assert one["moe.o"].flops.tokens == 2 * h * value * d
    assert one["moe.decode"].kv_read_bytes.keys == 2 * (latent + rope)
    assert one["moe.w13"].flops.tokens == 8 * 2 * 2 * d * 2048
    assert one["moe.shared_gate_up"].flops.tokens == 2 * 2 * d * 2048
    assert one["dense.gate_up"].flops.tokens == 2 * 2 * d * 18432
    assert (one["dense.o"].count, one["moe.o"].count) == (3, 58)
    assert one["moe.topk"].weight_bytes == 2 * 256


def test_layers_of_llama_4() -> None:
    maverick, scout = named(model("llama-4-maverick").kernels()), named(model("llama-4-scout").kernels())
    assert {name: k.count for name, k in maverick.items() if name.endswith(".o")} == {
        "chunked_dense.o": 24,
        "chunked_moe.o": 12,
        "full_moe.o": 12,
    }
    assert {name: k.count for name, k in scout.items() if name.endswith(".o")} == {
        "chunked_moe.o": 36,
        "full_moe.o": 12,
    }
    assert "chunked_moe.qk_norm_rope" in scout
    assert "chunked_moe.rope" in maverick
    assert not {name for name in scout if name.startswith("full_moe.") and "rope" in name}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("llama-3.1-8b", ()),
        ("gemma-2-2b", ("sliding", "full")),
        ("gemma-3-27b", ("sliding",) * 5 + ("full",)),
        ("gpt-oss-120b", ("sliding", "full")),
        ("deepseek-v3", ()),
        ("llama-4-maverick", ("chunked_dense", "chunked_moe", "chunked_dense", "full_moe")),
        ("llama-4-scout", ("chunked_moe",) * 3 + ("full_moe",)),
    ],
)
def test_order_of_layers(name: str, order: tuple[str, ...]) -> None:
    assert model(name).order == order


def test_every_pipeline_stage_has_its_own_kinds_of_layers() -> None:
    kernels = model("gemma-3-27b").kernels(mesh=Mesh(pp=4))
    counts = [[k.count for k in kernels if k.stage == stage and k.name.endswith(".o")] for stage in range(4)]
    # Layers 6, 12, 18, ... see everything; stages have 15, 16, 16 and 15 layers.
    assert counts == [[13, 2], [13, 3], [14, 2], [12, 3]]


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("deepseek-v3", 70.272), ("qwen2.5-72b", 327.680), ("llama-3.1-405b", 516.096)]
)
def test_cache_of_a_token_is_the_published_one(name: str, kilobytes: float) -> None:
    """In 16 bits: "Insights into DeepSeek-V3" (arXiv 2505.09343), table 1."""
    kernels = model(name).kernels()
    assert sum(kernel.count * kernel.kv_write_bytes.tokens for kernel in kernels) == kilobytes * 1000


# -- masks ------------------------------------------------------------------------------------------------------------


def masks(cascade: Cascade) -> list[Mask]:
    return list(dict.fromkeys(kernel.attention.mask for kernel in cascade.kernels() if kernel.attention))


MASKS = {
    "llama-3.1-8b": {Mask()},
    "mistral-7b-v0.1": {Mask(window=4096)},
    "mistral-7b-v0.3": {Mask()},
    "phi-3.5-mini": {Mask(window=262144)},
    "phi-4": {Mask()},
    "qwen2.5-7b": {Mask()},
    "gemma-2-9b": {Mask(window=4096), Mask()},
    "gemma-3-1b": {Mask(window=512), Mask()},
    "gemma-3-27b": {Mask(window=1024), Mask()},
    "gpt-oss-20b": {Mask(window=128), Mask()},
    "deepseek-v3": {Mask()},
    "llama-4-scout": {Mask(chunk=8192), Mask()},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_models(name: str) -> None:
    assert set(masks(model(name))) == MASKS[name]


@pytest.mark.parametrize("name", known_models())
def test_every_layer_attends(name: str) -> None:
    layers = sum(block.count or 0 for block in model(name).blocks)
    attending = [k for k in model(name).kernels() if k.attention and k.phase != "prefill"]
    assert sum(kernel.count for kernel in attending) == layers


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[int, int]]:
    return draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(requests(), st.sampled_from(["mistral-7b-v0.1", "gpt-oss-20b", "llama-4-scout"]), st.integers(1, 50))
def test_attention_work_is_what_enumeration_finds(batch: list[tuple[int, int]], name: str, reach: int) -> None:
    """FLOPs and cache reads of every layer of a model whose window or chunk is `reach`, key by key."""
    config = load_config(name)
    config = dict(config.get("text_config") or config)  # type: ignore[call-overload]  # a mapping
    config |= {"sliding_window": reach, "attention_chunk_size": reach}
    cascade = build(config)
    all_masks = masks(cascade)
    new, computed = np.array([n for n, _ in batch]), np.array([c for _, c in batch])
    steps = steps_from_arrays(new, computed, np.array([0, len(batch)]), all_masks)
    for kernel in cascade.kernels():
        if kernel.attention is None:
            continue
        shape, work = kernel.attention, steps.attention[all_masks.index(kernel.attention.mask)]
        pairs = work.prefill_pairs[0] + work.decode_pairs[0]
        keys = work.prefill_keys[0] + work.decode_keys[0]
        seen = [_seen(query, shape.mask) for n, c in batch for query in range(c, c + n)]
        expected_pairs = sum(len(each) for each in seen)
        expected_keys = sum(len(set().union(*(_seen(q, shape.mask) for q in range(c, c + n)))) for n, c in batch)
        assert (pairs, keys) == (expected_pairs, expected_keys)
        assert kernel.flops.pairs * pairs == 4 * shape.heads * shape.head_dim * expected_pairs
        assert kernel.kv_read_bytes.keys * keys == 2 * 2 * shape.kv_heads * shape.head_dim * expected_keys


def _seen(query: int, mask: Mask) -> set[int]:
    """Positions that the query at a position attends to."""
    seen = set()
    for key in range(query + 1):
        in_window = mask.window is None or query - key < mask.window
        in_chunk = mask.chunk is None or query // mask.chunk == key // mask.chunk
        if in_window and in_chunk:
            seen.add(key)
    return seen
