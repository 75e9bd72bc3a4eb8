"""Building cascades: what is counted, and what is refused with which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from energylens_vllm.einsum import Cascade, EinsumError, Rank, block, build_cascade, load_cascade
from energylens_vllm.errors import EnergyLensError

DOCS = Path(__file__).parents[2] / "docs" / "einsum.md"


def small(*lines: str, **changes: Any) -> Cascade:
    """Two matrices in a row, with einsums added after them."""
    given: dict[str, Any] = {
        "ranks": {"t": "tokens", "c": "context", "d": 64, "f": 256, "h": Rank(8), "g": Rank(2, groups="h"), "e": 16},
        "tensors": {"plain": "W1 W2", "input": "IN"},
    } | changes
    ranks, tensors, rest = given.pop("ranks"), given.pop("tensors"), given
    first = ["A[t,f] = IN[t,d] * W1[d,f]", "B[t,d] = A[t,f] * W2[f,d]"]
    return build_cascade(
        "small", ranks=ranks, tensors=tensors, blocks=[block("only", {"mlp": [*first, *lines]})], **rest
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # Elements of the checkpoints' safetensors, from their model cards on huggingface.co.
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v2-lite", 15_706_484_224),
    ],
)
def test_parameters_are_the_published_ones(name: str, published: int) -> None:
    cascade = load_cascade(Path(__file__).parent / "cascades" / f"{name}.yaml")
    assert cascade.parameters() == published


def test_the_documented_cascade_in_python_is_the_one_in_yaml(llama: Cascade) -> None:
    code = re.search(r"```python\n(from energylens_vllm.einsum import Rank.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code.group(1), scope)
    assert scope["cascade"] == llama


def test_a_tied_weight_is_counted_once(llama: Cascade) -> None:
    tied = build_cascade(
        "tied",
        ranks=llama.ranks,
        tensors={kind: [t for t, k in llama.kinds.items() if k == kind] for kind in set(llama.kinds.values())},
        blocks=llama.blocks,
        tied={"WH": "E"},
    )
    assert llama.parameters() - tied.parameters() == 128256 * 4096


def test_errors_are_the_packages_own() -> None:
    with pytest.raises(EnergyLensError):
        small("C[t,z] = B[t,z]")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # A tensor read with other ranks than it was made with: the einsum, the rank and both sizes.
        ("C[t,e] = A[t,d] * W2[d,e]", ["'C[t,e] = A[t,d] * W2[d,e]'", "d (64)", "f (256)"]),
        ("C[t,d] = B[t,f] * W1[d,f]", ["B[t,f]", "f (256)", "d (64)", "only.mlp"]),
        ("C[t,f] = B[t,d] * W2[d,f]", ["W2[d,f]", "d (64)", "f (256)"]),
        # A product that does not line up.
        ("C[t,e] = B[t,d] * A[t,f]", ["lacks rank e (16)", "d (64)", "f (256)"]),
        ("C[t] = B[t,d] * A[t,f]", ["sums over d (64) and f (256)", "only one of its tensors has"]),
        ("C[t,f] = silu(B[t,d])", ["lacks rank f (256)", "d (64)"]),
        ("C[t,f] = A[t,f] + B[t,d]", ["B[t,d] lacks rank f (256)", "d (64)"]),
        ("C[c,d] = B[t,d]", ["lacks rank c (context)", "t (tokens)"]),
        # Names.
        ("C[t,d] = B[t,z]", ["unknown value 'z'"]),
        ("C[t,d] = BB[t,d]", ["BB[t,d] is read but no einsum makes it", "did you mean 'B'"]),
        ("C[t,t] = B[t,d]", ["has a rank twice"]),
        ("W1[d,f] = A[t,f] * B[t,d]", ["W1 is listed as plain and cannot be made"]),
        ("C[t] = B[t]", ["has 1 ranks, but B[t,d]", "has 2"]),
        # Gather.
        ("C[t,d] = gather(B[t,d], IN[t,d])", ["takes away one rank of B[t,d], but C[t,d] lacks 0"]),
        ("C[c,e] = gather(B[t,d], A[t,f])", ["takes away one rank of B[t,d], but C[c,e] lacks 2"]),
        ("C[t,e] = gather(B[t,d], A[t,f])", ["gives the ranks f (256), t (tokens)", "C[t,e] has t (tokens), e (16)"]),
        ("C[t,d] = gather(B[t,d]) + B[t,d]", ["stands alone and takes two tensors"]),
        ("C[t,d] = gather(B[t,d], A[t,f] + A[t,f])", ["stands alone and takes two tensors"]),
    ],
)
def test_what_does_not_fit_is_refused(line: str, words: list[str]) -> None:
    with pytest.raises(EinsumError) as error:
        small(line)
    message = str(error.value)
    assert message.startswith("only.mlp: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"plain": "W1 W2 W3", "input": "IN"}}, "tensors: unknown value 'W3' (did you mean 'W2'?)"),
        ({"tensors": {"plain": "W1 W2", "input": "IN W1"}}, "'W1' is listed as plain and as input"),
        ({"tensors": {"weight": "W1 W2", "input": "IN"}}, "tensors: unknown value 'weight'; accepted: expert, "),
        ({"tied": {"IN": "W1"}}, "tied: 'IN' is not a weight"),
        ({"tied": {"W1": "W2", "W2": "W1"}}, "tied: 'W2' is tied itself"),
        ({"order": ["only"]}, "order: unknown value 'only'"),
    ],
)
def test_declarations_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EinsumError) as error:
        small(**change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({"size": 8, "bound": "tokens"}, "needs either a size or a bound"),
        ({}, "needs either a size or a bound"),
        (0, "rank size: 0 is not a positive whole number"),
        (True, "rank size: True is not a positive whole number"),
        ("token", "unknown value 'token' (did you mean 'tokens'?)"),
        ({"size": 8, "splt": "tp"}, "unknown value 'splt' (did you mean 'split'?)"),
        ({"size": 8, "split": "pp"}, "rank split: unknown value 'pp' (did you mean 'tp'?); accepted: ep, tp"),
        ({"size": 8, "select": 9}, "cannot select 9 of 8"),
        ({"size": 8, "window": 4}, "properties of a rank bound to context"),
        ({"bound": "tokens", "split": "tp"}, "need a fixed size"),
        ({"size": 8, "phase": "decode"}, "phase is a property of a rank bound"),
        ({"size": 3, "groups": "h"}, "rank 'z' (3) does not divide rank 'h' (8)"),
        ({"size": 3, "groups": "q"}, "groups: unknown value 'q'"),
    ],
)
def test_ranks_are_checked(rank: Any, message: str) -> None:
    with pytest.raises(EinsumError) as error:
        small(ranks={"t": "tokens", "d": 64, "f": 256, "h": 8, "z": rank})
    assert "rank 'z'" in str(error.value)
    assert message in str(error.value)


def test_blocks_are_checked() -> None:
    with pytest.raises(EinsumError, match=r"block 'layer': count 0 is not a positive whole number"):
        block("layer", {"a": "B[t] = A[t]"}, count=0)
    with pytest.raises(EinsumError, match=r"block 'layer': has no kernels"):
        block("layer", {})
    with pytest.raises(EinsumError, match=r"kernel layer\.a: has no einsum"):
        block("layer", {"a": []})
    twice = [block("layer", {"a": "B[t] = A[t]"})] * 2
    with pytest.raises(EinsumError, match=r"block 'layer': there are two of that name"):
        build_cascade("twice", ranks={"t": "tokens"}, tensors={"input": "A"}, blocks=twice)


def test_a_rank_may_have_another_name_of_the_same_size() -> None:
    """Self-attention without a cache: the keys are the same tokens under another name."""
    cascade = build_cascade(
        "encoder",
        ranks={"t": "tokens", "d": 64, "f": 64},
        tensors={"plain": "W", "input": "IN"},
        blocks=[block("only", {"a": "A[t,d] = IN[t,f] * W[f,d]", "b": "B[t,f] = silu(A[t,f])"})],
    )
    assert cascade.parameters() == 64 * 64
