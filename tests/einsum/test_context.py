"""Contexts and tokens split over GPUs: the exchanges that follow, and work that adds up to the whole."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.einsum import Cascade, EinsumError, Kernel, Mesh, Rank, Terms, Widths, block, build_cascade

AR, AG, RS, A2A = "all_reduce", "all_gather", "reduce_scatter", "all_to_all"


def grouped(heads: int, kv_heads: int, **context: int) -> Cascade:
    """A layer of grouped-query attention, of head dimension 16, from queries to the output's sum over heads."""
    return build_cascade(
        "grouped",
        ranks={
            "t": "tokens", "c": Rank(bound="context", **context), "d": 64, "h": Rank(heads, split="tp"),
            "g": Rank(kv_heads, groups="h"), "e": 16,
        },
        tensors={"quantized": "WQ WK WV WO", "kv_cache": "K V"},
        blocks=[
            block(
                "layer",
                {
                    "qkv": ["Q[t,h,e] = X[t,d] * WQ[d,h,e]", "KN[t,g,e] = X[t,d] * WK[d,g,e]",
                            "VN[t,g,e] = X[t,d] * WV[d,g,e]"],
                    "cache": ["K[t,g,e] = KN[t,g,e]", "V[t,g,e] = VN[t,g,e]"],
                    "attention": ["S[t,h,c] = Q[t,h,e] * K[c,g,e]", "P[t,h,c] = softmax(S[t,h,c])",
                                  "O[t,h,e] = P[t,h,c] * V[c,g,e]"],
                    "o": ["X[t,d] = O[t,h,e] * WO[h,e,d]"],
                },
                count=1,
            )
        ],
    )  # fmt: skip


GROUPED = grouped(heads=32, kv_heads=2)

#: Keys and values have the query heads themselves, which tensor parallelism splits.
(GROUPED_LAYER,) = GROUPED.blocks
EVERY_HEAD = replace(GROUPED, blocks=(
    block("layer", {kernel.name: [str(einsum).replace("g,", "h,") for einsum in kernel.einsums]
                    for kernel in GROUPED_LAYER.groups}, count=1),
))  # fmt: skip

TWO_CONTEXTS = replace(
    GROUPED,
    ranks={**GROUPED.ranks, "c2": Rank(bound="context")},
    kinds={**GROUPED.kinds, "K2": "kv_cache", "V2": "kv_cache"},
    blocks=(
        block(
            "layer",
            {
                "qkv": ["Q[t,h,e] = X[t,d] * WQ[d,h,e]"],
                "attention": ["S[t,h,c] = Q[t,h,e] * K[c,g,e]", "S2[t,h,c2] = Q[t,h,e] * K2[c2,g,e]",
                              "O[t,h,e] = softmax(S[t,h,c]) * V[c,g,e] + softmax(S2[t,h,c2]) * V2[c2,g,e]"],
                "o": ["X[t,d] = O[t,h,e] * WO[h,e,d]"],
            },
            count=1,
        ),
    ),
)  # fmt: skip


def kernels(cascade: Cascade, mesh: Mesh, widths: Widths | None = None) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in cascade.kernels(widths, mesh)}


def exchanges(cascade: Cascade, mesh: Mesh, block: str, phase: str = "all") -> list[tuple[str, str, int]]:
    """(operation, axis, group size) in the order in which a layer issues them for requests of a phase."""
    return [
        (kernel.collective.op, kernel.collective.axis, kernel.collective.size)
        for kernel in cascade.kernels(mesh=mesh)
        if kernel.collective is not None and kernel.name.startswith(f"{block}.") and kernel.phase in ("all", phase)
    ]


# What vLLM 0.32 issues, read from its source:
# - `FlashAttentionImpl._forward_with_dcp`, for all requests at once: queries gathered, then `cp_lse_ag_out_rs`
#   (log-sum-exps gathered, outputs reduce-scattered) or `dcp_a2a_lse_reduce` (one all-to-all of both).
# - latent attention, `MLAAttention.forward_impl` with `MLADCPManager`: decodes as above, but no queries are gathered
#   with `dcp_q_replicate` (`DCPGroupColumnParallelLinear`); prefills with a context gather the cache
#   (`_context_parallel_compute_prefill_context`).
# - o_proj and the layer's feed-forward part are those of tensor parallelism.
AFTER = [(AR, "tp", 8), (AR, "tp", 8)]
COMBINED = [(AG, "dcp", 4), (RS, "dcp", 4)]


@pytest.mark.parametrize(
    ("given", "phase", "expected"),
    [
        ({}, "decode", [(AG, "dcp", 4), *COMBINED, *AFTER]),
        ({}, "prefill", [(AG, "dcp", 4), *AFTER]),
        ({"dcp_a2a": True}, "decode", [(AG, "dcp", 4), (A2A, "dcp", 4), *AFTER]),
        ({"dcp_q_replicate": True}, "decode", [*COMBINED, *AFTER]),
        ({"dcp_q_replicate": True, "dcp_a2a": True}, "decode", [(A2A, "dcp", 4), *AFTER]),
    ],
)
def test_exchanges_of_latent_attention_are_those_of_vllm(
    given: dict[str, bool], phase: str, expected: list[tuple[str, str, int]], deepseek: Cascade
) -> None:
    mesh = Mesh(tp=8, dcp=4, **given)
    for layer in ("dense", "moe"):
        assert exchanges(deepseek, mesh, layer, phase) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [(AG, "dcp", 4), *COMBINED]),
        ({"dcp_a2a": True}, [(AG, "dcp", 4), (A2A, "dcp", 4)]),
        ({"dcp_q_replicate": True}, [(AG, "dcp", 4), *COMBINED]),  # an option of latent attention's
    ],
)
def test_exchanges_of_grouped_attention_are_those_of_vllm(
    given: dict[str, bool], expected: list[tuple[str, str, int]]
) -> None:
    assert exchanges(GROUPED, Mesh(tp=8, dcp=4, **given), "layer") == [*expected, (AR, "tp", 8)]


def test_messages_have_the_shapes_of_vllms_tensors(deepseek: Cascade) -> None:
    """A token's bytes in 16 bits: of queries [heads, head_dim] and outputs alike, of float32 log-sum-exps [heads]."""
    heads, dim = 32 // 8 * 4, 16  # of a rank and of the three that share its context
    found = kernels(GROUPED, Mesh(tp=8, dcp=4))
    assert found["layer.attention.queries.all_gather"].activation_bytes == Terms(tokens=2 * heads * dim)
    assert found["layer.attention.all_gather"].activation_bytes == Terms(tokens=4 * heads * 4)
    assert found["layer.attention.reduce_scatter"].activation_bytes == Terms(tokens=2 * heads * dim)
    packed = kernels(GROUPED, Mesh(tp=8, dcp=4, dcp_a2a=True))["layer.attention.all_to_all"]
    assert packed.activation_bytes == Terms(tokens=2 * heads * (dim + 2))  # `_dcp_a2a_lse_pack_dim`: two of 16 bits
    latent, rope, own = 512, 64, 16 // 8 * 4
    found = kernels(deepseek, Mesh(tp=8, dcp=4), Widths(kv_cache=1.0))
    assert found["moe.decode.queries.all_gather"].activation_bytes == Terms(tokens=2 * own * (latent + rope))
    assert found["moe.decode.reduce_scatter"].activation_bytes == Terms(tokens=2 * own * latent)
    # The cache of contexts, which new tokens are not part of yet, in the model's type (`chunked_prefill_workspace`).
    bytes_a_key = 2 * (latent + rope)
    assert found["moe.kv_b.cache.all_gather"].activation_bytes == Terms(keys=bytes_a_key, tokens=-bytes_a_key)


@pytest.mark.parametrize("dcp", [2, 4, 8])
def test_split_contexts_leave_arithmetic_and_split_the_cache(deepseek: Cascade, dcp: int) -> None:
    """Each of dcp GPUs attends with dcp times the heads to a dcp-th of the keys."""
    whole, split = (kernels(deepseek, Mesh(tp=8, dcp=parts)) for parts in (1, dcp))
    for name, kernel in whole.items():
        assert split[name].flops == pytest.approx(kernel.flops), name
        assert split[name].weight_bytes == kernel.weight_bytes
        assert split[name].kv_read_bytes.keys == kernel.kv_read_bytes.keys / dcp
        assert split[name].kv_write_bytes.tokens == kernel.kv_write_bytes.tokens / dcp
    shape = split["moe.decode"].attention
    assert shape is not None
    assert (shape.heads, shape.kv_heads, shape.context_parts) == (16 // 8 * dcp, 1, dcp)


def test_replicated_queries_cost_weights_and_arithmetic(deepseek: Cascade) -> None:
    gathered, repeated = (kernels(deepseek, Mesh(tp=8, dcp=4, dcp_q_replicate=on)) for on in (False, True))
    for name in ("moe.q", "moe.absorb"):
        assert repeated[name].weight_bytes == 4 * gathered[name].weight_bytes
        assert repeated[name].flops.tokens == 4 * gathered[name].flops.tokens
    for name in ("moe.prefill", "moe.decode", "moe.v_up", "moe.o", "moe.kv_a"):
        assert repeated[name] == gathered[name]
    memory = [deepseek.weight_bytes(mesh=Mesh(tp=8, dcp=4, dcp_q_replicate=on))[0] for on in (False, True)]
    assert memory[1] - memory[0] == 27 * 3 * gathered["moe.q"].weight_bytes


def test_grouped_attention_attends_to_new_tokens_apart(deepseek: Cascade) -> None:
    assert {"layer.attention.new_tokens", "layer.attention.merge"} <= set(kernels(GROUPED, Mesh(tp=8, dcp=4)))
    assert not any(re.search("new_tokens|merge", name) for name in kernels(deepseek, Mesh(tp=8, dcp=4)))


def test_only_what_goes_with_split_contexts_is_marked_so(deepseek: Cascade) -> None:
    for cascade in (GROUPED, deepseek):
        assert not any(kernel.split_context for kernel in cascade.kernels(mesh=Mesh(tp=8)))
        before, after = (set(kernels(cascade, Mesh(tp=8, dcp=parts))) for parts in (1, 4))
        marked = {name for name, kernel in kernels(cascade, Mesh(tp=8, dcp=4)).items() if kernel.split_context}
        assert before < after
        assert marked == after - before


# -- what cannot be split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cascade", "mesh", "words"),
    [
        (GROUPED, Mesh(tp=4, dcp=3), "mesh dcp: 3 does not divide tp = 4"),
        (GROUPED, Mesh(dcp=0), "mesh dcp: 0 is not a positive whole number"),
        (GROUPED, Mesh(tp=4, dcp=4), "rank g (2) differs between GPUs that were to share a context over dcp = 4; "
                                     "accepted with tp = 4: up to 2, as many as hold the same KV heads"),
        (grouped(8, 1, window=64), Mesh(tp=4, dcp=2), "rank c (context) has a window or chunks"),
        (grouped(8, 1, chunk=64), Mesh(tp=4, dcp=2), "rank c (context) has a window or chunks"),
        (GROUPED, Mesh(pcp=2), "vLLM splits tokens over pcp = 2 only of latent attention"),
        (EVERY_HEAD, Mesh(tp=4, dcp=2), "rank h (32) differs between GPUs that were to share a context over dcp = 2"),
        (TWO_CONTEXTS, Mesh(tp=4, dcp=2), "sums over 2 contexts (c, c2); accepted with dcp = 2: one"),
        (GROUPED, Mesh(tp=2, pcp=2, dcp=2), "mesh dcp: 2 together with pcp = 2; accepted: one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_one_clear_error(cascade: Cascade, mesh: Mesh, words: str) -> None:
    with pytest.raises(EinsumError, match=re.escape(words)):
        cascade.kernels(mesh=mesh)


def test_ranks_that_no_einsum_has_do_not_matter() -> None:
    """A context that nothing reads is neither split nor refused."""
    unused = {"c2": Rank(bound="context", window=64), "g2": Rank(3, groups="h")}
    for mesh in (Mesh(tp=4, dcp=2), Mesh(tp=4)):
        assert replace(GROUPED, ranks={**GROUPED.ranks, **unused}).kernels(mesh=mesh) == GROUPED.kernels(mesh=mesh)
    dense = build_cascade(
        "dense", ranks={"t": "tokens", "d": 64, "c": "context"}, tensors={"quantized": "W"},
        blocks=[block("layer", {"linear": "X[t,d] = X[t,d] * W[d]"}, count=1)],
    )  # fmt: skip
    assert dense.kernels(mesh=Mesh(pcp=2)) == dense.kernels(mesh=Mesh())


def test_tokens_and_data_parallel_ranks_need_expert_parallelism(deepseek: Cascade) -> None:
    with pytest.raises(EinsumError, match="mesh pcp: 2 with dp = 2 is only understood with expert parallelism"):
        deepseek.kernels(mesh=Mesh(pcp=2, dp=2))
    with pytest.raises(EinsumError, match=r"mesh ep: 4 is neither 1 \(off\) nor tp \* pcp \* dp = 8"):
        deepseek.kernels(mesh=Mesh(tp=2, pcp=2, dp=2, ep=4))


@pytest.mark.vllm
@settings(max_examples=200, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 6, 8, 12, 16]),
    dcp=st.sampled_from([2, 3, 4, 6, 8]),
    heads_per_kv=st.sampled_from([1, 2, 4, 6, 8, 16]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
)
def test_contexts_split_only_where_vllm_allows(tp: int, dcp: int, heads_per_kv: int, kv_heads: int) -> None:
    """vLLM asks less in one case: with 3 GPUs to a KV head it lets two of them share a context, and so two that have
    other KV heads."""
    config = pytest.importorskip("vllm.config.model").ModelConfig
    heads = heads_per_kv * kv_heads
    split = True
    try:
        grouped(heads, kv_heads).kernels(mesh=Mesh(tp=tp, dcp=dcp))
    except EinsumError:
        split = False
    model = SimpleNamespace(
        use_mla=False,
        model_arch_config=SimpleNamespace(total_num_attention_heads=heads),
        get_total_num_kv_heads=lambda: kv_heads,
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=tp, decode_context_parallel_size=dcp, pipeline_parallel_size=1, enable_hc_sp=False,
        enable_expert_parallel=False, data_parallel_size=1, is_moe_model=False, distributed_executor_backend=None,
    )  # fmt: skip
    allowed = tp % dcp == 0
    try:
        config.verify_with_parallel_config(model, parallel)
    except ValueError:
        allowed = False
    except AttributeError:
        pass  # beyond what concerns contexts, which has been verified by then
    copies = tp // kv_heads  # GPUs that hold the same KV head
    if tp % kv_heads or copies % dcp:
        assert not split
    else:
        assert split == allowed


# -- prefill context parallelism --------------------------------------------------------------------------------------

# What vLLM 0.32 issues, read from its source: the new tokens' latents and rotated keys gathered before they are cached
# (`maybe_gather_mla_latent_cache_inputs`), one after the other; hidden states before sampling
# (`restore_hidden_states`); experts without expert parallelism: hidden states and router logits gathered, the result
# reduce-scattered (`MoERunner._maybe_dispatch`, `_maybe_combine`); with it, as among data-parallel ranks
# (`AgRsAll2AllManager`).
CACHED = [(AG, "pcp", 2), (AG, "pcp", 2)]


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (Mesh(pcp=2), [*CACHED, (AG, "pcp", 2), (AG, "pcp", 2), (RS, "pcp", 2)]),
        (Mesh(pcp=2, ep=2), [*CACHED, (AG, "pcp", 2), (RS, "pcp", 2)]),
        (Mesh(tp=2, pcp=2), [*CACHED, (AR, "tp", 2), (AG, "pcp", 2), (AG, "pcp", 2), (RS, "pcp", 2), (AR, "tp", 2)]),
        (Mesh(tp=2, pcp=2, ep=4), [*CACHED, (AR, "tp", 2), (AG, "pcp", 2), (RS, "pcp", 2), (AR, "tp", 2)]),
        (Mesh(pcp=2, dp=2, ep=4), [*CACHED, (AG, "ep", 4), (RS, "ep", 4)]),
        (Mesh(tp=2, pcp=2, dp=2, ep=8), [*CACHED, (AR, "tp", 2), (AG, "ep", 8), (RS, "ep", 8), (AG, "tp", 2)]),
    ],
)
def test_exchanges_of_split_tokens_are_those_of_vllm(
    mesh: Mesh, expected: list[tuple[str, str, int]], deepseek: Cascade
) -> None:
    assert exchanges(deepseek, mesh, "moe") == expected
    dense = [*CACHED, (AR, "tp", 2), (AR, "tp", 2)] if mesh.tp > 1 else CACHED
    assert exchanges(deepseek, mesh, "dense") == dense
    assert exchanges(deepseek, mesh, "head") == [(AG, "pcp", 2), *([(AG, "tp", 2)] if mesh.tp > 1 else [])]


def test_messages_of_split_tokens(deepseek: Cascade) -> None:
    """Bytes of the gathered tensor, for each token of one rank."""
    found = kernels(deepseek, Mesh(pcp=4))
    assert found["moe.kv_norm.all_gather"].activation_bytes == Terms(tokens=4 * 2 * 512)
    assert found["moe.rope.all_gather"].activation_bytes == Terms(tokens=4 * 2 * 64)
    assert found["moe.router.all_gather"].activation_bytes == Terms(tokens=4 * 2 * 64)
    assert found["head.norm.all_gather"].activation_bytes == Terms(tokens=4 * 2 * 2048)
    assert found["moe.cache"].kv_write_bytes == Terms(tokens=4 * 2 * (512 + 64)), "each rank keeps all"


@pytest.mark.parametrize("mesh", [Mesh(pcp=4), Mesh(pcp=4, ep=4), Mesh(tp=2, pcp=2), Mesh(tp=2, pcp=2, ep=4)])
def test_ranks_of_split_tokens_do_the_whole_work_together(deepseek: Cascade, mesh: Mesh) -> None:
    """Work for each of a rank's tokens is what tensor parallelism leaves; experts see the tokens of all ranks, and each
    has its share of them."""
    one, split = kernels(deepseek, Mesh(tp=mesh.tp)), kernels(deepseek, mesh)
    for name, kernel in one.items():
        times = 1.0
        if name == "moe.sum":  # every rank adds up what it has: slices of all experts, or some whole ones
            times = mesh.pcp if mesh.ep == 1 else 1 / mesh.tp
        assert split[name].flops == pytest.approx(Terms(*(times * value for value in kernel.flops))), name
        share = mesh.pcp if kernel.experts is not None else 1
        assert split[name].weight_bytes == kernel.weight_bytes / share
        assert split[name].kv_read_bytes == kernel.kv_read_bytes, "every rank keeps all"
