"""Ranks: the named dimensions of tensors, their sizes, and what masks, selection and sharding do to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.kernel import Mask, Phase
from energylens_vllm.errors import is_positive_whole, unknown

Bound = Literal["tokens", "sampled", "context"]
Split = Literal["tp", "ep"]


@dataclass(frozen=True, slots=True)
class Rank:
    """A dimension with either a fixed `size` or a `bound` to what the step's batch holds.

    Bound ranks: `tokens` (the tokens of the step), `sampled` (rows that reach the language-model head), `context`
    (the keys a query attends to, under the mask given by `window`, `chunk` and `causal`). `phase` limits a bound rank
    to the prefill or the decode requests of the step, for models that run different kernels for each.

    Fixed ranks:
    `split`   the mesh axis over which the rank may be split: "tp", or "ep" for experts
    `groups`  this rank has one element for each group of that many elements of another rank: KV heads of query heads
    `select`  a token uses only this many of the rank's elements (top-k experts)
    `pad`     rounded up to a multiple of this on the GPU (vLLM pads the vocabulary to 64); not counted as parameters
    """

    size: int | None = None
    bound: Bound | None = None
    split: Split | None = None
    groups: str | None = None
    select: int | None = None
    pad: int = 1
    window: int | None = None
    chunk: int | None = None
    causal: bool = True
    phase: Phase = "all"

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bound is None):
            raise EinsumError(f"rank: needs either a size or a bound, got size={self.size!r}, bound={self.bound!r}")
        for name, accepted in (("bound", get_args(Bound)), ("split", get_args(Split)), ("phase", get_args(Phase))):
            value = getattr(self, name)
            if value is not None and value not in accepted:
                raise EinsumError(str(unknown(f"rank {name}", value, accepted)))
        for name in ("size", "select", "pad", "window", "chunk"):
            value = getattr(self, name)
            if value is not None and not is_positive_whole(value):
                raise EinsumError(f"rank {name}: {value!r} is not a positive whole number")
        if self.size is None and (self.split or self.groups or self.select or self.pad != 1):
            raise EinsumError(f"rank bound to {self.bound}: split, groups, select and pad need a fixed size")
        if self.bound != "context" and (self.window or self.chunk or not self.causal):
            raise EinsumError("rank: window, chunk and causal are properties of a rank bound to context")
        if self.bound is None and self.phase != "all":
            raise EinsumError("rank: phase is a property of a rank bound to tokens, sampled or context")
        if self.select is not None and self.size is not None and self.select > self.size:
            raise EinsumError(f"rank: cannot select {self.select} of {self.size}")

    @property
    def mask(self) -> Mask:
        return Mask(window=self.window, chunk=self.chunk, causal=self.causal)

    @property
    def padded(self) -> int:
        """Size on the GPU. A fixed rank only."""
        assert self.size is not None
        return -(-self.size // self.pad) * self.pad


RankLike = Rank | int | str | Mapping[str, object]


def make_rank(name: str, given: RankLike) -> Rank:
    """A rank from its short spellings: a size, "tokens" / "sampled" / "context", or a mapping of Rank's fields."""
    try:
        if isinstance(given, Rank):
            return given
        if isinstance(given, int):
            return Rank(size=given)
        if isinstance(given, str):
            return Rank(bound=given)  # type: ignore[arg-type]  # checked by Rank
        known = [field.name for field in fields(Rank)]
        for key in given:
            if key not in known:
                raise unknown("property", key, known)
        return Rank(**given)  # type: ignore[arg-type]  # checked by Rank
    except ValueError as error:
        raise EinsumError(f"rank {name!r}: {error}") from None
