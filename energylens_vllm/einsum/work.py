"""What one kernel does on one GPU: FLOPs, bytes and shapes of its einsums, given where each of them runs.

FLOPs are those of contractions, 2 for a multiply-add; elementwise functions cost the bytes that they move. A tensor is
read or written once by each kernel that touches it, unless it lives and dies inside the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from energylens_vllm.einsum.expression import Access, Einsum, Term
from energylens_vllm.einsum.kernel import AttentionShape, ExpertShape, Family, GemmShape, Kernel, Phase, Terms, Widths
from energylens_vllm.einsum.sharding import Layout, Place, Sharding

if TYPE_CHECKING:
    from energylens_vllm.einsum.cascade import Cascade

#: Bytes of an element of an `input` tensor (vLLM's int32 token ids and indices) ...
INDEX_BYTES = 4.0
#: ... and of the routing of a token to one expert: a float32 weight and an int32 id.
ROUTING_BYTES = 8.0

Rows = Literal["tokens", "sampled", "keys"]

#: Fields of `Terms` that a rank bound to the batch counts by.
_ROWS: Mapping[str, Rows] = {"tokens": "tokens", "sampled": "sampled", "context": "keys"}


class Amount(NamedTuple):
    """`coefficient` times the field `per` of the batch."""

    per: str
    coefficient: float


class _Gemm(NamedTuple):
    """What GEMMs must share for vLLM to merge them along n."""

    operand: Access
    rows: Rows
    k: float
    batch: int


@dataclass(frozen=True, slots=True)
class Placed:
    """An einsum, where it runs, and how the activations lie that it touches."""

    einsum: Einsum
    place: Place
    operands: Mapping[str, Layout]
    output: Layout


class Sum:
    """Terms that grow."""

    def __init__(self) -> None:
        self._fields = dict.fromkeys(Terms._fields, 0.0)

    def add(self, amount: Amount, times: float = 1.0) -> None:
        self._fields[amount.per] += amount.coefficient * times

    def terms(self) -> Terms:
        return Terms(**self._fields)


class Counter:
    """Counts elements, FLOPs and bytes of one block under one sharding. `experts` is the block's rank of experts."""

    def __init__(self, cascade: Cascade, sharding: Sharding, widths: Widths, experts: str | None) -> None:
        self.cascade, self.sharding, self.widths, self.experts = cascade, sharding, widths, experts
        self.ranks = cascade.ranks

    # -- sizes ----------------------------------------------------------------------------------------------------

    def extent(self, name: str, place: Place, whole: bool = False, remote: bool = False) -> float:
        """Elements on this GPU of a fixed rank; for a selected rank, those of one token, with `remote` also those of
        experts on other GPUs if this GPU has rows for them."""
        rank = self.ranks[name]
        if rank.select is not None:
            if place != "experts" or (remote and not self.sharding.all2all):
                return rank.select
            total, local = self.sharding.experts(name)
            return rank.select * local / total
        return rank.padded / (1 if whole else self.sharding.degree(name, place))

    def amount(self, einsum: Einsum, ranks: Iterable[str], layout: Layout, remote: bool = False) -> Amount:
        """Elements on this GPU of an activation with these ranks; `remote` as in `extent`."""
        size, bounds, selected = 1.0, [], False
        for name in ranks:
            rank = self.ranks[name]
            if rank.bound is not None:
                bounds.append(rank.bound)
                size /= self.sharding.degree(name, layout.place)
            else:
                size *= self.extent(name, layout.place, layout.gathered, remote)
                selected |= rank.select is not None
        if "tokens" in bounds:
            # Experts see every (token, selected expert) once, however tokens travel; other tensors, the tokens sent.
            everyone = selected and layout.place == "experts"
            size *= self.sharding.token_share(layout.place, None if everyone else self.experts)
        if not bounds:
            return Amount("constant", size)
        if len(bounds) == 1:
            return Amount(_ROWS[bounds[0]], size)
        if sorted(bounds) == ["context", "tokens"]:
            return Amount("pairs", size)
        einsum.fail(f"has ranks bound to {' and '.join(bounds)} together; only tokens with context is understood")

    def weight_elements(self, access: Access, place: Place) -> float:
        """Elements on this GPU of a weight."""
        size = 1.0
        for name in access.ranks:
            rank = self.ranks[name]
            size *= self.sharding.experts(name)[1] if rank.select else rank.padded / self.sharding.degree(name, place)
        return size

    def weight_width(self, tensor: str) -> float:
        kind = self.cascade.kind(tensor)
        widths = self.widths
        return {"quantized": widths.weight, "expert": widths.expert_weight}.get(kind, widths.plain_weight)

    def width(self, access: Access) -> float:
        """Bytes per element of an activation, an input or the KV cache."""
        kind = self.cascade.kind(access.tensor)
        if kind == "kv_cache":
            return self.widths.kv_cache
        if kind == "input":
            return INDEX_BYTES
        fixed = [rank for rank in (self.ranks[name] for name in access.ranks) if rank.bound is None]
        return ROUTING_BYTES if fixed and all(rank.select for rank in fixed) else self.widths.activation

    def _held_width(self, access: Access) -> float:
        """`width`, of the KV cache times the share of each request's that this GPU keeps."""
        cache = self.cascade.kind(access.tensor) == "kv_cache"
        return self.width(access) / (self.sharding.mesh.dcp if cache else 1)

    # -- a kernel -------------------------------------------------------------------------------------------------

    def kernel(self, name: str, placed: list[Placed], kept: frozenset[str]) -> Kernel:
        """The kernel of a fused group; `kept` are the tensors that someone outside of it reads."""
        flops, activations, cache_read, cache_written = Sum(), Sum(), Sum(), Sum()
        weights: dict[str, float] = {}
        quantized = False
        made: set[str] = set()
        seen: set[str] = set()
        for each in placed:
            einsum = each.einsum
            self._add_flops(flops, each)
            gathered = gather_source(einsum)
            for access in einsum.reads:
                tensor, kind = access.tensor, self.cascade.kind(access.tensor)
                if tensor in seen or (tensor in made and kind != "kv_cache"):
                    continue
                seen.add(tensor)
                if gathered is not None and access == gathered:
                    activations.add(*self._rows_read(each, gathered))
                elif self.cascade.is_weight(tensor):
                    weights[tensor] = self.weight_elements(access, each.place) * self.weight_width(tensor)
                    quantized |= kind != "plain"
                else:
                    layout = each.operands.get(tensor, Layout())
                    into = cache_read if kind == "kv_cache" else activations
                    # Experts skip the rows of other GPUs' experts. They leave zeros for them, which whatever comes
                    # after them reads and writes as any other row (vLLM, fused_moe.py: `write_zeros_to_output`).
                    remote = not any(self.cascade.is_weight(each.tensor) for each in einsum.reads)
                    into.add(self.amount(einsum, access.ranks, layout, remote), self._held_width(access))
            made.add(einsum.output.tensor)
        written: set[str] = set()
        for each in placed:
            access = each.einsum.output
            if access.tensor in kept and access.tensor not in written:
                written.add(access.tensor)
                into = cache_written if self.cascade.kind(access.tensor) == "kv_cache" else activations
                into.add(self.amount(each.einsum, access.ranks, each.output, remote=True), self._held_width(access))
        family = self._family(placed)
        gemm, gemms = self._gemm(placed) if family in ("linear", "experts") else (None, 1)
        return Kernel(
            name=name,
            family=family,
            count=1,
            flops=flops.terms(),
            weight_bytes=sum(weights.values()),
            quantized=quantized,
            kv_read_bytes=cache_read.terms(),
            kv_write_bytes=cache_written.terms(),
            activation_bytes=activations.terms(),
            gemm=gemm,
            gemms=gemms,
            attention=self._attention(placed) if family == "attention" else None,
            experts=self._experts() if family == "experts" else None,
            phase=self.phase([each.einsum for each in placed]),
        )

    def _add_flops(self, flops: Sum, placed: Placed) -> None:
        layout = Layout(placed.place)
        for term in placed.einsum.terms:
            if contracted(self.cascade, placed.einsum, term):
                ranks = iteration(self.cascade, term)
                per_point = 2.0 if len(term.factors) > 1 else 1.0
                flops.add(self.amount(placed.einsum, ranks, layout), per_point)

    def _rows_read(self, placed: Placed, source: Access) -> tuple[Amount, float]:
        """A gather reads of its source what it hands on; of a split source a GPU owns a share of the rows."""
        einsum = placed.einsum
        degree = prod(
            self.sharding.degree(name, placed.place)
            for name in source.ranks
            if name not in einsum.output.ranks and self.ranks[name].bound is None
        )
        amount = self.amount(einsum, einsum.output.ranks, placed.output)
        weight = self.cascade.is_weight(source.tensor)
        return amount, (self.weight_width(source.tensor) if weight else self.width(source)) / degree

    def _family(self, placed: list[Placed]) -> Family:
        gather = weight = expert = False
        for each in placed:
            if self._bounds(each.einsum.output) >= {"context", "tokens"}:
                return "attention"
            for term in each.einsum.terms:
                gather |= term.is_gather
                accesses = list(term.accesses())
                if self._bounds(*accesses) >= {"context", "tokens"}:
                    return "attention"
                if contracted(self.cascade, each.einsum, term):
                    for access in accesses:
                        if self.cascade.is_weight(access.tensor):
                            weight = True
                            expert |= any(self.ranks[name].select for name in access.ranks)
        return "experts" if expert else "linear" if weight else "gather" if gather else "elementwise"

    def _bounds(self, *accesses: Access) -> set[str]:
        return {bound for access in accesses for name in access.ranks if (bound := self.ranks[name].bound) is not None}

    def phase(self, einsums: Sequence[Einsum]) -> Phase:
        """The requests that a kernel of these einsums serves."""
        accesses = (access for einsum in einsums for access in (einsum.output, *einsum.reads))
        phases = {self.ranks[name].phase for access in accesses for name in access.ranks} - {"all"}
        if len(phases) > 1:
            einsums[0].fail("one kernel cannot serve prefill and decode apart: give each its own")
        return phases.pop() if phases else "all"

    # -- shapes ---------------------------------------------------------------------------------------------------

    def _gemm(self, placed: list[Placed]) -> tuple[GemmShape | None, int]:
        """GEMMs of one input, depth and batch are merged along n, as vLLM merges q, k, v and gate, up. Returns the
        largest, and how many there are (one for each head of a batched GEMM)."""
        merged: dict[_Gemm, float] = {}
        for each in placed:
            for term in each.einsum.terms:
                found = self._one_gemm(each, term)
                if found is not None:
                    merged[found[0]] = merged.get(found[0], 0.0) + found[1]
        if not merged:
            return None, 1
        largest, n = max(merged.items(), key=lambda item: item[0].k * item[1])
        shape = GemmShape(rows=largest.rows, n=round(n), k=round(largest.k))
        return shape, sum(gemm.batch for gemm in merged)

    def _one_gemm(self, placed: Placed, term: Term) -> tuple[_Gemm, float] | None:
        """A term that is one GEMM, and its n; of experts, of one."""
        einsum, place = placed.einsum, placed.place
        depth = contracted(self.cascade, einsum, term)
        weights = [access for access in term.accesses() if self.cascade.is_weight(access.tensor)]
        inputs = [access for access in term.accesses() if not self.cascade.is_weight(access.tensor)]
        rows = [bound for name in einsum.output.ranks if (bound := self.ranks[name].bound) is not None]
        if not depth or len(weights) != 1 or not inputs or len(rows) != 1:
            return None
        given = {name for access in inputs for name in access.ranks}
        fixed = [name for name in weights[0].ranks if not self.ranks[name].select and name not in depth]
        n = prod(self.extent(name, place) for name in fixed if name not in given)
        batch = round(prod(self.extent(name, place) for name in fixed if name in given))
        k = prod(self.extent(name, place) for name in depth if not self.ranks[name].select)
        return _Gemm(inputs[0], _ROWS[rows[0]], k, batch), n

    def _experts(self) -> ExpertShape:
        assert self.experts is not None
        total, local = self.sharding.experts(self.experts)
        return ExpertShape(total=total, local=local, selected=self.ranks[self.experts].select or 1)

    def _attention(self, placed: list[Placed]) -> AttentionShape:
        """Heads and widths read off the einsums: scores are what has tokens and context on the left, values what sums
        over context. Either has the KV heads of what it reads; scores that read no keys (a softmax alone), their own.
        """
        heads, kv_heads = 1.0, 0.0
        head_dim = value_dim = 0.0
        mask, parts = None, 1
        for each in placed:
            einsum, place = each.einsum, each.place
            for access in (einsum.output, *einsum.reads):
                for name in access.ranks:
                    if self.ranks[name].bound == "context":
                        mask, parts = self.ranks[name].mask, self.sharding.degree(name, place)
            scores = self._bounds(einsum.output) >= {"context", "tokens"}
            if scores:
                heads = self._fixed(einsum.output.ranks, place)
            for term in einsum.terms:
                depth = contracted(self.cascade, einsum, term)
                keys = [a for a in term.accesses() if self._bounds(a) == {"context"}]
                if scores and depth and keys:
                    head_dim += prod(self.extent(name, place) for name in depth)
                    own = set(depth)
                elif keys and any(self.ranks[name].bound == "context" for name in depth):
                    weights = {name for a in term.accesses() if a != keys[0] for name in a.ranks}
                    own = {n for n in keys[0].ranks if n not in weights and self.ranks[n].groups not in weights}
                    value_dim += self._fixed(own, place)
                    heads = self._fixed((name for name in weights if name in einsum.output.ranks), place)
                else:
                    continue
                kv_heads = max(kv_heads, self._fixed((n for n in keys[0].ranks if n not in own), place))
        assert mask is not None
        return AttentionShape(round(heads), round(kv_heads or heads), round(head_dim), round(value_dim), mask, parts)

    def _fixed(self, ranks: Iterable[str], place: Place) -> float:
        return prod(self.extent(name, place) for name in ranks if self.ranks[name].bound is None)


# -- reading einsums ----------------------------------------------------------------------------------------------


def gather_source(einsum: Einsum) -> Access | None:
    """The tensor whose rows a gather picks."""
    return next(einsum.terms[0].accesses()) if einsum.terms[0].is_gather else None


def iteration(cascade: Cascade, term: Term) -> list[str]:
    """Ranks that a term loops over. Query heads loop over their KV heads already."""
    ranks = dict.fromkeys(name for access in term.accesses() for name in access.ranks)
    return [name for name in ranks if cascade.ranks[name].groups not in ranks]


def contracted(cascade: Cascade, einsum: Einsum, term: Term) -> list[str]:
    """Ranks that a term sums over; none for a function that stands alone, which is no sum."""
    if term.is_function:
        return []
    return [name for name in iteration(cascade, term) if name not in einsum.output.ranks]


def partial_candidates(term: Term, linear: frozenset[str]) -> Iterator[tuple[Access, bool]]:
    """Every access of a term, and whether the term is linear in it."""
    for factor in term.factors:
        if isinstance(factor, Access):
            yield factor, True
        elif factor.function in linear and len(factor.arguments) == 1 and len(factor.arguments[0]) == 1:
            yield from partial_candidates(factor.arguments[0][0], linear)
        else:
            for access in factor.accesses():
                yield access, False
