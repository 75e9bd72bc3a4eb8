"""The text of an einsum, parsed: `Q[t,h,e] = X[t,d] * WQ[d,h,e] + BQ[h,e]`.

The right side is a sum of products of tensors and function calls. A rank of a product that the left side lacks is
summed over (contracted). A function is elementwise in the ranks that it keeps; one that stands alone may also drop
ranks (`argmax`, `topk`) or bring in new ones. `gather(A[v,d], I[t])` picks rows of A by the indices in I.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

from energylens_vllm.einsum.errors import EinsumError

GATHER = "gather"

#: Functions of one argument that a partial sum passes through.
LINEAR = frozenset({"scale"})

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z][A-Za-z0-9_]*)|(?P<mark>[\[\](),*+=]))")


@dataclass(frozen=True, slots=True)
class Access:
    """A tensor with the ranks that index it."""

    tensor: str
    ranks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.tensor}[{','.join(self.ranks)}]"

    def accesses(self) -> Iterator[Access]:
        yield self

    def calls(self) -> Iterator[Call]:
        yield from ()


@dataclass(frozen=True, slots=True)
class Call:
    """A function of sums."""

    function: str
    arguments: tuple[tuple[Term, ...], ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(_sum_text(argument) for argument in self.arguments)})"

    def accesses(self) -> Iterator[Access]:
        for argument in self.arguments:
            for term in argument:
                yield from term.accesses()

    def calls(self) -> Iterator[Call]:
        yield self
        for argument in self.arguments:
            for term in argument:
                for factor in term.factors:
                    yield from factor.calls()


@dataclass(frozen=True, slots=True)
class Term:
    """A product."""

    factors: tuple[Access | Call, ...]

    def __str__(self) -> str:
        return " * ".join(str(factor) for factor in self.factors)

    def accesses(self) -> Iterator[Access]:
        for factor in self.factors:
            yield from factor.accesses()

    @property
    def is_gather(self) -> bool:
        return len(self.factors) == 1 and isinstance(self.factors[0], Call) and self.factors[0].function == GATHER

    @property
    def is_function(self) -> bool:
        return len(self.factors) == 1 and isinstance(self.factors[0], Call)


def _sum_text(terms: tuple[Term, ...]) -> str:
    return " + ".join(str(term) for term in terms)


@dataclass(frozen=True)
class Einsum:
    """One assignment. Two are equal when their parsed forms are; `str` gives the canonical text."""

    output: Access
    terms: tuple[Term, ...]
    where: str = field(default="", compare=False)  #: block and kernel, for messages

    def __str__(self) -> str:
        return f"{self.output} = {_sum_text(self.terms)}"

    @cached_property
    def reads(self) -> tuple[Access, ...]:
        """Every access on the right side, in order, repeats kept."""
        return tuple(access for term in self.terms for access in term.accesses())

    def fail(self, problem: str) -> NoReturn:
        raise EinsumError(f"{self.where}: {str(self)!r}: {problem}")


def parse_einsum(text: str, where: str = "einsum") -> Einsum:
    """Parse one einsum. Raises EinsumError that points at the place where the text stops making sense."""
    return _Parser(text, where).einsum()


class _Parser:
    """Recursive descent over: access "=" sum; sum: term ("+" term)*; term: factor ("*" factor)*."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    def einsum(self) -> Einsum:
        output = self.factor()
        if not isinstance(output, Access):
            self.fail("the left side must be one tensor")
        self.expect("=")
        terms = self.sum()
        if self.text[self.at :].strip():
            self.fail("expected '*', '+' or the end")
        return Einsum(output, terms, self.where)

    def sum(self) -> tuple[Term, ...]:
        terms = [self.term()]
        while self.take("+"):
            terms.append(self.term())
        return tuple(terms)

    def term(self) -> Term:
        factors = [self.factor()]
        while self.take("*"):
            factors.append(self.factor())
        return Term(tuple(factors))

    def factor(self) -> Access | Call:
        name = self.name("a tensor or a function")
        if self.take("["):
            ranks = [self.name("a rank")] if self.peek() != "]" else []
            while self.take(","):
                ranks.append(self.name("a rank"))
            self.expect("]")
            return Access(name, tuple(ranks))
        if not self.take("("):
            self.fail(f"expected '[' or '(' after {name!r}")
        arguments = [self.sum()]
        while self.take(","):
            arguments.append(self.sum())
        self.expect(")")
        return Call(name, tuple(arguments))

    def peek(self) -> str:
        found = _TOKEN.match(self.text, self.at)
        return found.group().strip() if found else ""

    def take(self, mark: str) -> bool:
        if self.peek() != mark:
            return False
        self.at = self.text.index(mark, self.at) + 1
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            self.fail(f"expected {mark!r}")

    def name(self, what: str) -> str:
        found = _TOKEN.match(self.text, self.at)
        if not found or not found.group("name"):
            self.fail(f"expected {what}")
        self.at = found.end()
        return found.group("name")

    def fail(self, problem: str) -> NoReturn:
        raise EinsumError(f"{self.where}: {self.text!r}: {problem} at column {self.at + 1}")
