"""Sharding as vLLM does it, and the collectives that follow from it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.einsum import Cascade, EinsumError, Kernel, Mesh, Rank, Terms, Widths, block, build_cascade

AR, AG, RS, A2A = "all_reduce", "all_gather", "reduce_scatter", "all_to_all"


def collectives(kernels: list[Kernel], block: str) -> list[tuple[str, str, int]]:
    """(operation, axis, group size) in the order in which a block issues them."""
    shapes = [kernel.collective for kernel in kernels if kernel.name.startswith(f"{block}.")]
    return [(shape.op, shape.axis, shape.size) for shape in shapes if shape is not None]


def named(kernels: list[Kernel]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}


# What vLLM 0.32 issues, read from its source:
# - embedding: `VocabParallelEmbedding.forward` masks the rows of other ranks, then all-reduces.
# - attention and dense MLP: `RowParallelLinear` (o_proj, down_proj) all-reduces; column-parallel layers say nothing;
#   MLA's q_a/kv_a projections are replicated (`deepseek_v2.py`).
# - head: `LogitsProcessor._gather_logits` all-gathers the vocabulary.
# - experts with dp 1 (`MoERunner._maybe_reduce_final_output`): one all-reduce over tp after the shared experts' output
#   (`reduce_results=False`) is added, whether experts are split by intermediate size or by expert.
# - experts with dp > 1, no expert parallelism or tp 1 (`MoEPrepareAndFinalizeNaiveDPEPModular`, `AgRsAll2AllManager`):
#   hidden states and routing are gathered over dp in one grouped call, the result reduce-scattered over dp, and what is
#   still partial over tp all-reduced.
# - experts with expert parallelism, tp > 1 and dp > 1 (`use_sequence_parallel_moe`): tokens are chunked over tp; gather
#   and reduce-scatter span the ep group; the model all-gathers the chunks over tp at the end (`qwen3_moe.py`).
# - all2all backends: dispatch and combine, the output already reduced (`deepep_ht.py`, `output_is_reduced`).
ATTENTION = (AR, "tp", 2)
TABLE = [
    # cascade, mesh, block, what vLLM issues
    ("llama", Mesh(), "layer", []),
    ("llama", Mesh(tp=2), "embed", [(AR, "tp", 2)]),
    ("llama", Mesh(tp=2), "layer", [ATTENTION, (AR, "tp", 2)]),
    ("llama", Mesh(tp=2), "head", [(AG, "tp", 2)]),
    ("llama", Mesh(tp=2, dp=4), "layer", [ATTENTION, (AR, "tp", 2)]),
    ("llama", Mesh(dp=4), "layer", []),
    ("qwen3_moe", Mesh(tp=2), "layer", [ATTENTION, (AR, "tp", 2)]),
    ("qwen3_moe", Mesh(tp=2, ep=2), "layer", [ATTENTION, (AR, "tp", 2)]),
    ("qwen3_moe", Mesh(dp=4), "layer", [(AG, "dp", 4), (RS, "dp", 4)]),
    ("qwen3_moe", Mesh(dp=4, ep=4), "layer", [(AG, "dp", 4), (RS, "dp", 4)]),
    ("qwen3_moe", Mesh(tp=2, dp=2), "layer", [ATTENTION, (AG, "dp", 2), (RS, "dp", 2), (AR, "tp", 2)]),
    ("qwen3_moe", Mesh(tp=2, dp=2, ep=4), "layer", [ATTENTION, (AG, "ep", 4), (RS, "ep", 4), (AG, "tp", 2)]),
    ("qwen3_moe", Mesh(dp=4, ep=4, all2all=True), "layer", [(A2A, "ep", 4), (A2A, "ep", 4)]),
    (
        "qwen3_moe",
        Mesh(tp=2, dp=2, ep=4, all2all=True),
        "layer",
        [ATTENTION, (A2A, "ep", 4), (A2A, "ep", 4), (AG, "tp", 2)],
    ),
    # Without data parallelism vLLM uses no all2all kernels, and without expert parallelism none either.
    ("qwen3_moe", Mesh(tp=2, ep=2, all2all=True), "layer", [ATTENTION, (AR, "tp", 2)]),
    ("qwen3_moe", Mesh(dp=4, all2all=True), "layer", [(AG, "dp", 4), (RS, "dp", 4)]),
    ("deepseek", Mesh(tp=2), "dense", [ATTENTION, (AR, "tp", 2)]),
    ("deepseek", Mesh(tp=2), "moe", [ATTENTION, (AR, "tp", 2)]),
    ("deepseek", Mesh(tp=2, ep=2), "moe", [ATTENTION, (AR, "tp", 2)]),
    ("deepseek", Mesh(tp=2, dp=2), "moe", [ATTENTION, (AG, "dp", 2), (RS, "dp", 2), (AR, "tp", 2)]),
    ("deepseek", Mesh(dp=2, ep=2), "moe", [(AG, "dp", 2), (RS, "dp", 2)]),
    ("deepseek", Mesh(dp=2, ep=2), "dense", []),
]


@pytest.mark.parametrize(("model", "mesh", "block", "expected"), TABLE)
def test_collectives_are_those_of_vllm(
    model: str, mesh: Mesh, block: str, expected: list[tuple[str, str, int]], request: pytest.FixtureRequest
) -> None:
    cascade: Cascade = request.getfixturevalue(model)
    assert collectives(cascade.kernels(mesh=mesh), block) == expected


def test_messages(qwen3_moe: Cascade) -> None:
    """Bytes of the whole tensor, per token of a data-parallel rank."""
    d, routing = 2 * 2048, 8 * 8

    def message(mesh: Mesh, name: str) -> Terms:
        return named(qwen3_moe.kernels(mesh=mesh))[name].activation_bytes

    assert message(Mesh(tp=4), "layer.o.all_reduce") == Terms(tokens=d)
    assert message(Mesh(tp=4), "layer.sum.all_reduce") == Terms(tokens=d)
    assert message(Mesh(tp=4), "head.lm_head.all_gather") == Terms(sampled=2 * 151936)
    assert message(Mesh(dp=4), "layer.post_norm.all_gather") == Terms(tokens=4 * (d + routing))
    assert message(Mesh(dp=4), "layer.sum.reduce_scatter") == Terms(tokens=4 * d)
    # Every rank gets the whole choice of all tokens, also where it holds a fourth of the experts.
    assert message(Mesh(dp=4, ep=4), "layer.post_norm.all_gather") == Terms(tokens=4 * (d + routing))
    assert message(Mesh(tp=2, dp=2, ep=4), "layer.post_norm.all_gather") == Terms(tokens=2 * (d + routing))
    assert message(Mesh(tp=2, dp=2, ep=4), "layer.sum.reduce_scatter") == Terms(tokens=2 * d)
    assert message(Mesh(tp=2, dp=2, ep=4), "layer.sum.all_gather") == Terms(tokens=d)
    # A token goes to a GPU only if one of its 8 experts is among that GPU's 32 of 128.
    wanted = 4 * (1 - math.comb(96, 8) / math.comb(128, 8))
    sent = message(Mesh(dp=4, ep=4, all2all=True), "layer.sum.all_to_all")
    assert sent == pytest.approx(Terms(tokens=wanted * d))


def test_kv_heads_replicate_when_there_are_fewer_than_gpus(llama: Cascade) -> None:
    """8 KV heads over 16 GPUs: each GPU keeps one, twice as many caches as heads (`QKVParallelLinear`)."""
    kernels = named(llama.kernels(mesh=Mesh(tp=16)))
    attention = kernels["layer.attention"]
    assert attention.attention is not None
    assert (attention.attention.heads, attention.attention.kv_heads) == (2, 1)
    assert attention.kv_read_bytes == Terms(keys=2 * 2 * 128)
    assert kernels["layer.qkv"].weight_bytes == 2 * 4096 * (2 + 2) * 128


def test_latents_replicate(deepseek: Cascade) -> None:
    one, four = (named(deepseek.kernels(mesh=mesh)) for mesh in (Mesh(), Mesh(tp=4)))
    assert four["moe.kv_a"].weight_bytes == one["moe.kv_a"].weight_bytes
    assert four["moe.decode"].kv_read_bytes == one["moe.decode"].kv_read_bytes
    assert four["moe.cache"].kv_write_bytes == one["moe.cache"].kv_write_bytes
    assert four["moe.q"].weight_bytes == one["moe.q"].weight_bytes / 4


def test_shared_experts_are_whole_where_tokens_are_chunked(deepseek: Cascade) -> None:
    """`DeepseekV2MLP(is_sequence_parallel=True)` sets `disable_tp`: whole weights, a tp-th of the tokens."""
    one, chunked = (named(deepseek.kernels(mesh=mesh)) for mesh in (Mesh(), Mesh(tp=2, dp=2, ep=4)))
    for name in ("moe.shared_gate_up", "moe.shared_down", "moe.router"):
        assert chunked[name].weight_bytes == one[name].weight_bytes
        assert chunked[name].flops.tokens == one[name].flops.tokens / 2


@pytest.mark.parametrize("mesh", [Mesh(dp=4, ep=4), Mesh(tp=2, dp=2, ep=4), Mesh(dp=2), Mesh(tp=2, dp=2), Mesh(tp=2)])
def test_what_goes_to_the_experts_also_stays(deepseek: Cascade, mesh: Mesh) -> None:
    """Shared experts read the hidden state that was sent to the routed ones: it does not have to come back for them."""
    blocks = []
    for each in deepseek.blocks:
        shared = [group for group in each.groups if group.name.startswith("shared_")]
        groups = [group for group in each.groups if group not in shared]
        if shared:
            at = next(i for i, group in enumerate(groups) if group.name == "add")
            groups[at:at] = shared
        blocks.append(replace(each, groups=tuple(groups)))
    later = replace(deepseek, blocks=tuple(blocks))
    assert [group.name for group in later.blocks[2].groups] != [group.name for group in deepseek.blocks[2].groups]
    assert named(later.kernels(mesh=mesh)) == named(deepseek.kernels(mesh=mesh))


def test_experts_split_by_expert_or_by_intermediate(qwen3_moe: Cascade) -> None:
    one, by_size, by_expert = (
        named(qwen3_moe.kernels(mesh=m))["layer.w13"] for m in (Mesh(), Mesh(tp=4), Mesh(4, ep=4))
    )
    for kernel in (by_size, by_expert):
        assert kernel.weight_bytes == one.weight_bytes / 4
        assert kernel.flops.tokens == one.flops.tokens / 4
    assert by_size.gemm is not None
    assert by_expert.gemm is not None
    assert (by_size.gemm.n, by_expert.gemm.n) == (2 * 768 // 4, 2 * 768)
    assert by_size.experts is not None
    assert by_expert.experts is not None
    assert (by_size.experts.local, by_expert.experts.local) == (128, 32)


def test_rows_of_other_gpus_experts_are_zeros_that_still_move(qwen3_moe: Cascade) -> None:
    def moved(mesh: Mesh) -> dict[str, float]:
        kernels = qwen3_moe.kernels(Widths(), mesh)
        return {kernel.name: kernel.activation_bytes.tokens for kernel in kernels}

    ranks = qwen3_moe.ranks
    m, d, chosen = ranks["m"].padded, ranks["d"].padded, ranks["x"].select
    assert m
    assert d
    assert chosen
    split, whole = moved(Mesh(tp=2, ep=2)), moved(Mesh())
    for name in ("layer.act", "layer.sum"):  # every row, as on one GPU
        assert split[name] == whole[name]
    assert split["layer.w13"] == 2 * (d + 2 * m * chosen)
    assert split["layer.w2"] == 2 * (m * chosen / 2 + d * chosen)  # but it skips the zeros that it would read
    # All-to-all kernels bring each GPU the rows of its own experts alone. There are as many, from twice the tokens.
    assert moved(Mesh(dp=2, ep=2, all2all=True))["layer.act"] == pytest.approx(whole["layer.act"])
    assert moved(Mesh(dp=2, ep=2))["layer.act"] == pytest.approx(2 * whole["layer.act"])


def test_redundant_experts(qwen3_moe: Cascade) -> None:
    kernel = named(qwen3_moe.kernels(mesh=Mesh(tp=4, ep=4, redundant_experts=8)))["layer.w13"]
    assert kernel.experts is not None
    assert (kernel.experts.total, kernel.experts.local) == (136, 34)
    assert kernel.weight_bytes == 2 * 34 * 2 * 2048 * 768
    assert kernel.flops.tokens == pytest.approx(2 * 8 / 4 * 2 * 2048 * 768)


MESHES = [Mesh(tp=2), Mesh(tp=4), Mesh(tp=4, ep=4), Mesh(dp=2), Mesh(dp=2, ep=2), Mesh(tp=2, dp=2), Mesh(2, 1, 2, 4)]


def repeated(cascade: Cascade, mesh: Mesh, kernel: str, field: str) -> int:
    """On how many GPUs vLLM repeats the same work: what has no rank to split, and the sum over experts' partial
    outputs, which every GPU that holds a slice of each expert makes of all tokens."""
    name = kernel.split(".")[1]
    chunked = mesh.tp > 1 and mesh.dp > 1 and mesh.ep > 1
    if name == "router":
        return 1 if chunked else mesh.tp
    if name == "sum":
        return mesh.tp * mesh.dp if mesh.ep == 1 else 1
    if name == "kv_a" or (field.startswith("kv_") and cascade.name.startswith("DeepSeek")):
        return mesh.tp
    return 1


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_work_sums_to_the_whole(any_cascade: Cascade, mesh: Mesh) -> None:
    """With a dp-th of all tokens on each data-parallel rank, tp * dp GPUs do what one GPU would do of all."""
    sharded = named(any_cascade.kernels(mesh=mesh))
    for name, kernel in named(any_cascade.kernels()).items():
        for field in ("flops", "kv_read_bytes", "kv_write_bytes"):
            summed = [mesh.tp * value for value in getattr(sharded[name], field)]
            times = repeated(any_cascade, mesh, name, field)
            assert summed == pytest.approx([times * value for value in getattr(kernel, field)]), (name, field)


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    heads_per_kv=st.sampled_from([1, 2, 3, 5, 8]),
    kv_heads=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_heads_split_exactly_when_vllm_allows(tp: int, heads_per_kv: int, kv_heads: int) -> None:
    """vLLM asserts that tp divides the heads, and that one of tp and the KV heads divides the other."""
    heads = heads_per_kv * kv_heads
    cascade = attention(heads, kv_heads)
    allowed = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    if not allowed:
        with pytest.raises(EinsumError, match=r"rank [hg] \(\d+\)"):
            cascade.kernels(mesh=Mesh(tp=tp))
        return
    kernel = named(cascade.kernels(mesh=Mesh(tp=tp)))["layer.attention"]
    assert kernel.attention is not None
    assert kernel.attention.heads == heads // tp
    assert kernel.attention.kv_heads == max(1, kv_heads // tp)
    assert kernel.flops.pairs == 4 * heads // tp * 16


def attention(heads: int, kv_heads: int) -> Cascade:
    return build_cascade(
        "attention",
        ranks={"t": "tokens", "c": "context", "h": Rank(heads, split="tp"), "g": Rank(kv_heads, groups="h"), "e": 16},
        tensors={"input": "Q KN VN", "kv_cache": "K V"},
        blocks=[
            block(
                "layer",
                {
                    "cache": ["K[t,g,e] = KN[t,g,e]", "V[t,g,e] = VN[t,g,e]"],
                    "attention": [
                        "S[t,h,c] = Q[t,h,e] * K[c,g,e]",
                        "P[t,h,c] = softmax(S[t,h,c])",
                        "O[t,h,e] = P[t,h,c] * V[c,g,e]",
                    ],
                },
                count=1,
            )
        ],
    )


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (Mesh(tp=64), ["rank h (32) is not divisible by tp = 64", "Q[t,h,e] = A[t,d] * WQ[d,h,e]", "layer.qkv"]),
        (Mesh(tp=3), ["rank v (151936) is not divisible by tp = 3", "embed.embed"]),
        (Mesh(tp=2, ep=4), ["mesh ep: 4 is neither 1 (off) nor tp * dp = 2"]),
        (Mesh(tp=0), ["mesh tp: 0 is not a positive whole number"]),
        (Mesh(pp=-1), ["mesh pp: -1 is not a positive whole number"]),
        (Mesh(pp=49), ["mesh pp: 49 stages for 48 layers"]),
        (Mesh(dp=5), ["rank m (768) is not divisible by tp * dp = 5", "layer.w13"]),
    ],
)
def test_what_cannot_be_split_is_one_clear_error(qwen3_moe: Cascade, mesh: Mesh, words: list[str]) -> None:
    with pytest.raises(EinsumError) as error:
        qwen3_moe.kernels(mesh=mesh)
    for word in words:
        assert word in str(error.value)


def test_a_kv_head_count_that_fits_neither_way() -> None:
    with pytest.raises(EinsumError, match=r"rank g \(3\) follows rank h in 2 parts, but neither number"):
        attention(6, 3).kernels(mesh=Mesh(tp=2))


# -- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "layers"), [(1, [48]), (2, [24, 24]), (5, [9, 10, 10, 10, 9]), (7, [7, 7, 7, 7, 7, 7, 6])]
)
def test_layers_of_each_stage_are_those_of_vllm(qwen3_moe: Cascade, stages: int, layers: list[int]) -> None:
    kernels = [k for k in qwen3_moe.kernels(mesh=Mesh(pp=stages)) if k.name == "layer.qkv"]
    assert [(k.stage, k.count) for k in kernels] == list(enumerate(layers))


@pytest.mark.vllm
def test_stage_layers_against_vllm() -> None:
    from energylens_vllm.einsum.sharding import stage_layers

    utils = pytest.importorskip("vllm.distributed.utils")
    for layers in (26, 32, 48, 61, 80):
        for stages in range(1, 9):
            spans = [utils.get_pp_indices(layers, rank, stages) for rank in range(stages)]
            assert stage_layers(layers, stages) == [end - start for start, end in spans]


def test_stages_hand_on_what_layers_take(llama: Cascade) -> None:
    """`IntermediateTensors` of vLLM's models: hidden states and residual, sent in tp slices, gathered on arrival."""
    kernels = named(llama.kernels(mesh=Mesh(tp=4, pp=2)))
    assert {name for name in kernels if name.startswith("pipeline.")} == {
        "pipeline.R.send", "pipeline.X.send", "pipeline.R.receive", "pipeline.X.receive",
    }  # fmt: skip
    send, receive = kernels["pipeline.X.send"], kernels["pipeline.X.receive"]
    assert (send.stage, receive.stage) == (0, 1)
    assert send.activation_bytes == Terms(tokens=2 * 4096 / 4)
    assert receive.activation_bytes == Terms(tokens=2 * 4096)
    stages = {name: {k.stage for k in llama.kernels(mesh=Mesh(pp=3)) if k.name == name} for name in kernels}
    assert stages["embed.embed"] == {0}
    assert stages["layer.qkv"] == {0, 1, 2}
    assert stages["head.lm_head"] == {2}


def test_kinds_of_layers_alternate_in_their_order() -> None:
    def tiny(order: list[str], counts: dict[str, int]) -> Cascade:
        blocks = [block(name, {"k": "X[t,d] = f(X[t,d])"}, count=count) for name, count in counts.items()]
        return build_cascade("tiny", ranks={"t": "tokens", "d": 4}, tensors={}, blocks=blocks, order=order)

    def stages(cascade: Cascade, pp: int) -> list[tuple[int, str, int]]:
        kernels = cascade.kernels(mesh=Mesh(pp=pp))
        return [(k.stage, k.name, k.count) for k in kernels if k.collective is None]

    one_after_another = tiny([], {"a": 2, "b": 4})
    assert stages(one_after_another, 2) == [(0, "a.k", 2), (0, "b.k", 1), (1, "b.k", 3)]
    alternating = tiny(["a", "b", "b"], {"a": 2, "b": 4})
    assert stages(alternating, 2) == [(0, "a.k", 1), (0, "b.k", 2), (1, "a.k", 1), (1, "b.k", 2)]
    short = tiny(["b", "b", "b", "a"], {"a": 1, "b": 5})
    assert stages(short, 2) == [(0, "b.k", 3), (1, "a.k", 1), (1, "b.k", 2)]


def test_weights_of_each_gpu(llama: Cascade, qwen3_moe: Cascade) -> None:
    d, v, layer = 4096, 128256, 4096 * (6144 + 4096 + 3 * 14336)
    norms = 2 * d
    assert llama.weight_bytes(mesh=Mesh(tp=4, pp=2)) == [
        2 * (v * d / 4 + 16 * (layer / 4 + norms)),
        2 * (v * d / 4 + 16 * (layer / 4 + norms) + d),
    ]
    split = qwen3_moe.weight_bytes(mesh=Mesh(tp=2, dp=2, ep=4))[0]
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    assert experts / 4 < split < experts / 4 + (qwen3_moe.weight_bytes()[0] - experts)


# -- rules of the derivation, one by one ------------------------------------------------------------------------------


def derive(*lines: str, mesh: Mesh | None = None) -> list[tuple[str, str, int]]:
    """The collectives of kernels of one einsum each, of a block whose result `X` feeds the next layer."""
    ranks = {"t": "tokens", "d": 64, "f": Rank(256, split="tp"), "v": Rank(512, split="tp")}
    weights = sorted({word for line in lines for word in ("W1", "W2", "W3", "BIAS", "E") if f"{word}[" in line})
    cascade = build_cascade(
        "rules",
        ranks=ranks,
        tensors={"plain": weights, "input": [w for w in ("IN", "ID") if any(f"{w}[" in line for line in lines)]},
        blocks=[block("layer", {f"k{i}": line for i, line in enumerate(lines)}, count=1)],
    )
    return collectives(cascade.kernels(mesh=mesh or Mesh(tp=4)), "layer")


UP, DOWN = "A[t,f] = X[t,d] * W1[d,f]", "B[t,d] = A[t,f] * W2[f,d]"
ONE = [(AR, "tp", 4)]


def test_a_split_rank_needs_nothing_until_it_is_summed() -> None:
    assert derive(UP, "X[t,d] = X[t,d] + X[t,d]") == []
    assert derive(UP, DOWN, "X[t,d] = silu(B[t,d])") == ONE


def test_a_bias_and_a_scale_pass_partial_sums_on() -> None:
    assert derive(UP, f"{DOWN} + BIAS[d]", "X[t,d] = scale(B[t,d])") == ONE  # at the end of the block, once


def test_two_partial_sums_are_added_before_one_all_reduce() -> None:
    more = ["G[t,f] = X[t,d] * W3[d,f]", "C[t,d] = G[t,f] * W2[f,d]"]
    assert derive(UP, DOWN, *more, "X[t,d] = B[t,d] + C[t,d]") == ONE


def test_a_residual_needs_the_whole_sum() -> None:
    assert derive(UP, DOWN, "X[t,d] = X[t,d] + B[t,d]", "Y[t,d] = silu(X[t,d])") == ONE


def test_a_product_of_partial_sums_needs_both_whole() -> None:
    more = ["G[t,f] = X[t,d] * W3[d,f]", "C[t,d] = G[t,f] * W2[f,d]"]
    assert derive(UP, DOWN, *more, "X[t,d] = B[t,d] * C[t,d]") == ONE * 2


def test_a_function_that_drops_a_split_rank_gathers_it() -> None:
    lines = ["X[t,d] = silu(X[t,d])", "L[t,v] = X[t,d] * W1[d,v]", "M[t] = argmax(L[t,v])", "N[t] = max(L[t,v])"]
    assert derive(*lines) == [(AG, "tp", 4)]  # once: the second reader finds it whole
    assert derive(*lines[:2], "P[t,v] = softmax(L[t,v])") == []


def test_rows_of_a_split_table_are_partial_sums() -> None:
    assert derive("B[t,d] = gather(E[v,d], ID[t])", "X[t,d] = X[t,d] + B[t,d]") == ONE


def test_a_mesh_of_one_needs_no_collectives(any_cascade: Cascade) -> None:
    assert not [kernel for kernel in any_cascade.kernels() if kernel.family == "collective"]


# -- speed ------------------------------------------------------------------------------------------------------------


def test_a_kernel_list_takes_well_under_50_ms(deepseek: Cascade) -> None:
    deepseek.kernels()
    meshes = [Mesh(tp=tp, dp=dp, ep=tp * dp, pp=pp) for tp in (1, 2, 4, 8) for dp in (1, 2, 4) for pp in (1, 3)]
    start = time.perf_counter()
    for mesh in meshes:
        deepseek.kernels(Widths(), mesh)
    assert (time.perf_counter() - start) / len(meshes) < 0.05
    start = time.perf_counter()
    for mesh in meshes:
        deepseek.kernels(Widths(), mesh)
    assert (time.perf_counter() - start) / len(meshes) < 0.001  # remembered
