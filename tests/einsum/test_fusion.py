"""Other fusions of one network compute the same and move other bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.einsum import Cascade, EinsumError, Kernel, Mesh, Terms, compare, fuse, unfuse


def per_field(kernels: list[Kernel], name: str) -> Terms:
    return Terms(*(sum(k.count * getattr(k, name)[i] for k in kernels) for i in range(len(Terms._fields))))


def assert_no_more(less: Terms, more: Terms) -> None:
    for field, a, b in zip(Terms._fields, less, more, strict=True):
        assert a <= b * (1 + 1e-12), field


def test_fusing_the_mlp_saves_its_intermediates(llama: Cascade) -> None:
    fused = fuse(llama, {"layer.mlp": ["gate_up", "act", "down"]})
    assert fused.parameters() == llama.parameters()
    difference = {each.name: each for each in compare(llama, fused)}
    assert set(difference) == {"layer.gate_up", "layer.act", "layer.down", "layer.mlp"}
    mlp = difference["layer.mlp"].after
    assert mlp is not None
    assert difference["layer.mlp"].before is None
    assert difference["layer.act"].after is None
    d, f = 4096, 14336
    assert mlp.activation_bytes == Terms(tokens=2 * (d + d))
    assert mlp.flops == Terms(tokens=2 * 3 * d * f)
    assert mlp.gemms == 2
    saved = (
        per_field(llama.kernels(), "activation_bytes").tokens - per_field(fused.kernels(), "activation_bytes").tokens
    )
    assert saved == 32 * 2 * (2 * 2 * f + 2 * f)  # gate, up and the product, each written and read


def test_attention_without_flash_writes_its_scores(llama: Cascade) -> None:
    apart = {kernel.name: kernel for kernel in unfuse(llama).kernels()}
    assert apart["layer.attention.1"].activation_bytes == Terms(tokens=2 * 32 * 128, pairs=2 * 32)
    assert apart["layer.attention.2"].activation_bytes == Terms(pairs=2 * 2 * 32)
    assert {kernel.family for name, kernel in apart.items() if "attention" in name} == {"attention"}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2)])
def test_attention_taken_apart_keeps_its_heads(any_cascade: Cascade, mesh: Mesh) -> None:
    """Query heads that share a KV head fill one tile, in the product with the values as in that with the keys."""
    shapes = {kernel.name: kernel.attention for kernel in any_cascade.kernels(mesh=mesh) if kernel.attention}
    apart = {kernel.name: kernel.attention for kernel in unfuse(any_cascade).kernels(mesh=mesh) if kernel.attention}
    for name, whole in shapes.items():
        scores, softmax, values = (apart[f"{name}.{i}"] for i in (1, 2, 3))
        assert (scores.heads, scores.kv_heads, scores.head_dim) == (whole.heads, whole.kv_heads, whole.head_dim)
        assert (values.heads, values.kv_heads, values.value_dim) == (whole.heads, whole.kv_heads, whole.value_dim)
        assert softmax.heads == whole.heads
        assert softmax.head_dim == softmax.value_dim == 0
    assert shapes


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=2, dp=2), Mesh(tp=2, dp=2, ep=4)])
def test_fusion_never_adds_bytes_and_never_changes_work(any_cascade: Cascade, mesh: Mesh) -> None:
    fused, apart = any_cascade.kernels(mesh=mesh), unfuse(any_cascade).kernels(mesh=mesh)
    assert unfuse(any_cascade).parameters() == any_cascade.parameters()
    assert per_field(fused, "flops") == pytest.approx(per_field(apart, "flops"))
    for name in ("activation_bytes", "kv_read_bytes", "kv_write_bytes"):
        assert_no_more(per_field(fused, name), per_field(apart, name))
    assert sum(k.count * k.weight_bytes for k in fused) <= sum(k.count * k.weight_bytes for k in apart)
    assert [k.collective for k in fused if k.collective] == [k.collective for k in apart if k.collective]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_neighbours_may_be_fused(llama: Cascade, data: st.DataObject) -> None:
    names = [group.name for group in llama.blocks[1].groups]
    start = data.draw(st.integers(0, len(names) - 1))
    stop = data.draw(st.integers(start + 1, len(names)))
    fused = fuse(llama, {"layer.one": names[start:stop]})
    before, after = llama.kernels(), fused.kernels()
    assert len(after) == len(before) - (stop - start) + 1
    assert per_field(after, "flops") == per_field(before, "flops")
    assert_no_more(per_field(after, "activation_bytes"), per_field(before, "activation_bytes"))
    assert_no_more(per_field(after, "kv_read_bytes"), per_field(before, "kv_read_bytes"))
    assert per_field(after, "kv_write_bytes") == per_field(before, "kv_write_bytes")


def test_equal_cascades_do_not_differ(any_cascade: Cascade) -> None:
    assert compare(any_cascade, any_cascade, mesh=Mesh(tp=2)) == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"layers.mlp": ["act"]}, "unknown value 'layers' (did you mean 'layer'?)"),
        ({"layer": ["act"]}, "write it as block.kernel, such as layer.mlp"),
        ({"layer.mlp": ["acts"]}, "unknown value 'acts' (did you mean 'act'?)"),
        ({"layer.mlp": []}, "no kernels given"),
        (
            {"layer.mlp": ["gate_up", "down"]},
            "gate_up, down are not neighbours; from gate_up on come gate_up, act, down",
        ),
        ({"layer.qkv": ["act", "down"]}, "there is a kernel of that name"),
    ],
)
def test_bad_fusions_are_refused(llama: Cascade, groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(EinsumError) as error:
        fuse(llama, groups)
    assert message in str(error.value)
