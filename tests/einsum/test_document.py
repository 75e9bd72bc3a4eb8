"""YAML and Python are two spellings of one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.einsum import Cascade, EinsumError, Rank, block, build_cascade, dump_cascade, load_cascade

TEXT = """
name: tiny
ranks: {t: tokens, d: 8, f: {size: 16, split: tp}}
tensors: {plain: W1 W2, input: IN}
blocks:
  layer:
    count: 2
    kernels:
      up: A[t,f] = IN[t,d] * W1[d,f]
      down: B[t,d] = A[t,f] * W2[f,d]
"""


def test_round_trip(any_cascade: Cascade) -> None:
    text = dump_cascade(any_cascade)
    assert load_cascade(text) == any_cascade
    assert dump_cascade(load_cascade(text)) == text


def test_text_path_and_mapping_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    cascade = load_cascade(TEXT)
    assert load_cascade(path) == cascade
    assert load_cascade(str(path)) == cascade
    assert load_cascade(yaml.safe_load(TEXT)) == cascade
    assert cascade.parameters() == 2 * 2 * 8 * 16


sizes = st.integers(1, 512)


@st.composite
def ranks(draw: st.DrawFn) -> Rank:
    kind = draw(st.sampled_from(["fixed", "tokens", "sampled", "context"]))
    if kind == "fixed":
        size = draw(sizes)
        return Rank(
            size,
            split=draw(st.sampled_from([None, "tp", "ep"])),
            select=draw(st.none() | st.integers(1, size)),
            pad=draw(st.sampled_from([1, 64])),
        )
    phase = draw(st.sampled_from(["all", "prefill", "decode"]))
    if kind != "context":
        return Rank(bound=kind, phase=phase)  # type: ignore[arg-type]  # one of its values
    window = draw(st.none() | sizes)
    return Rank(
        bound="context",
        phase=phase,
        window=window,
        chunk=None if window else draw(st.none() | sizes),
        causal=draw(st.booleans()),
    )


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """A chain of tensors over any ranks, each made of the one before and a weight of the same ranks."""
    given_ranks = draw(st.dictionaries(st.sampled_from("abcdyno"), ranks(), min_size=1))
    indices = ",".join(given_ranks)
    fixed = ",".join(name for name, rank in given_ranks.items() if rank.bound is None)
    length = draw(st.integers(1, 6))
    lines = []
    for i in range(length):
        product = f"f(A{i}[{indices}]) * W{i}[{fixed}]" if fixed else f"f(A{i}[{indices}])"
        lines.append(f"A{i + 1}[{indices}] = {product} + A{i}[{indices}]")
    cut = draw(st.integers(0, length))
    groups = {name: part for name, part in (("on", lines[:cut]), ("off", lines[cut:])) if part}
    weights = [f"W{i}" for i in range(length)] if fixed else []
    return build_cascade(
        draw(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)),
        ranks=given_ranks,
        tensors={"input": ["A0"], draw(st.sampled_from(["quantized", "expert", "plain"])): weights},
        blocks=[block("layer", groups, count=draw(st.none() | st.integers(1, 99)))],
        tied=({"W1": "W0"} if length > 1 and fixed else {}),
    )


@settings(max_examples=150, deadline=None)
@given(cascades())
def test_any_cascade_round_trips(cascade: Cascade) -> None:
    assert load_cascade(dump_cascade(cascade)) == cascade


def test_order_round_trips() -> None:
    document = yaml.safe_load(TEXT)
    document["blocks"]["other"] = {"count": 1, "kernels": {"a": "C[t,d] = f(B[t,d])"}}
    document["order"] = "layer other"
    cascade = load_cascade(document)
    assert cascade.order == ("layer", "other")
    assert load_cascade(dump_cascade(cascade)) == cascade


@pytest.mark.parametrize(
    ("replace", "by", "message"),
    [
        ("name: tiny", "nam: tiny", "unknown value 'nam' (did you mean 'name'?)"),
        ("name: tiny", "order: []", "field 'name' is missing"),
        ("d: 8", "d: 8.5", "rank 'd': 8.5 is neither a size, a bound nor a mapping"),
        ("d: 8", "d: eight", "rank 'd': rank bound: unknown value 'eight'"),
        ("d: 8", "no: 8", "ranks: the name False is not text (put it in quotes)"),
        ("= A[t,f]", "= A[t,d]", "layer.down: 'B[t,d] = A[t,d] * W2[f,d]': A[t,d] * W2[f,d] sums over f (16)"),
        ("plain: W1 W2", "plain: 5", "tensors plain: 5 is neither names with spaces nor a list of names"),
        ("count: 2", "counts: 2", "block 'layer': field: unknown value 'counts' (did you mean 'count'?)"),
        ("count: 2", "count: two", "block 'layer': count 'two' is not a positive whole number"),
        ("A[t,f] = IN[t,d] * W1[d,f]", "3", "kernel layer.up: 3 is neither an einsum nor a list of einsums"),
        ("A[t,f] = IN[t,d] * W1[d,f]", "A[t,f] = IN[t,d] * W1[d,f", "layer.up: 'A[t,f] = IN[t,d] * W1[d,f'"),
        ("      down:", "      up:", "'up' is given twice"),
        ("name: tiny", "name: [", "not YAML"),
        (TEXT, "\njust words\n", "document: 'just words' is not a mapping"),
    ],
)
def test_bad_documents_name_the_field(replace: str, by: str, message: str) -> None:
    with pytest.raises(EinsumError) as error:
        load_cascade(TEXT.replace(replace, by))
    assert message in str(error.value)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EinsumError, match=r"none\.yaml': No such file"):
        load_cascade(tmp_path / "none.yaml")


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\n")
    with pytest.raises(EinsumError, match=r"bad\.yaml: field 'ranks' is missing"):
        load_cascade(path)


def test_python_and_yaml_give_equal_cascades() -> None:
    built: dict[str, Any] = dict(
        ranks={"t": "tokens", "d": 8, "f": Rank(16, split="tp")}, tensors={"input": ["IN"], "plain": ["W1", "W2"]}
    )
    kernels = {"up": "A[t,f]=IN[t,d]*W1[d,f]", "down": ["B[t,d] = A[t,f] * W2[f,d]"]}
    assert build_cascade("tiny", **built, blocks=[block("layer", kernels, 2)]) == load_cascade(TEXT)
