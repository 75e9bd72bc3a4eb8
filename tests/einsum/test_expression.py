"""The text of einsums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.einsum import EinsumError
from energylens_vllm.einsum.expression import Access, Call, Einsum, Term, parse_einsum

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,3}", fullmatch=True)
accesses = st.builds(Access, names, st.lists(names, max_size=3).map(tuple))


def terms(factors: st.SearchStrategy[Access | Call]) -> st.SearchStrategy[tuple[Term, ...]]:
    return st.lists(st.lists(factors, min_size=1, max_size=3).map(tuple).map(Term), min_size=1, max_size=3).map(tuple)


factors = st.recursive(
    accesses,
    lambda inner: st.builds(Call, names, st.lists(terms(inner), min_size=1, max_size=2).map(tuple)),
    max_leaves=6,
)


@given(st.builds(Einsum, accesses, terms(factors)))
def test_text_and_parsed_form_round_trip(einsum: Einsum) -> None:
    assert parse_einsum(str(einsum)) == einsum


def test_spaces_do_not_matter() -> None:
    spaced = parse_einsum(" Q[ t , h ]=X [t,d]*  W[d,h]+B[h] ")
    assert spaced == parse_einsum("Q[t,h] = X[t,d] * W[d,h] + B[h]")
    assert str(spaced) == "Q[t,h] = X[t,d] * W[d,h] + B[h]"


def test_structure() -> None:
    einsum = parse_einsum("H[t,f] = silu(G[t,f] + B[f]) * U[t,f]")
    call = einsum.terms[0].factors[0]
    assert isinstance(call, Call)
    assert call.function == "silu"
    assert [access.tensor for access in einsum.reads] == ["G", "B", "U"]


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("Q[t,h] X[t,d]", "expected '='", 7),
        ("Q[t,h] = X[t,d * W[d,h]", "expected ']'", 15),
        ("Q[t,h] = X[t,d] W[d,h]", "expected '*', '+' or the end", 16),
        ("Q[t,h] = ", "expected a tensor or a function", 9),
        ("f(Q[t]) = X[t]", "the left side must be one tensor", 8),
        ("Q[t] = X", "expected '[' or '(' after 'X'", 9),
        ("Q[t] = f(X[t]", "expected ')'", 14),
        ("Q[t,] = X[t]", "expected a rank", 5),
        ("Q[t] = X[t] * 2", "expected a tensor or a function", 14),
    ],
)
def test_errors_point_at_the_place(text: str, problem: str, column: int) -> None:
    with pytest.raises(EinsumError) as error:
        parse_einsum(text, "layer.qkv")
    message = str(error.value)
    assert message.startswith("layer.qkv: ")
    assert text in message
    assert problem in message
    assert message.endswith(f"at column {column}")
