"""A cascade: the whole network as blocks of fused groups of einsums, checked when it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal, get_args

from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.expression import GATHER, Access, Call, Einsum, Term, parse_einsum
from energylens_vllm.einsum.kernel import Kernel, Mesh, Widths
from energylens_vllm.einsum.rank import Rank, RankLike, make_rank
from energylens_vllm.errors import is_positive_whole, unknown

Kind = Literal["quantized", "expert", "plain", "kv_cache", "input", "activation"]

#: Weights by what quantization does to them: linear layers, experts, and what it leaves alone.
WEIGHTS: tuple[Kind, ...] = ("quantized", "expert", "plain")


@dataclass(frozen=True, slots=True)
class Group:
    """Einsums that run as one kernel: what they hand to each other never reaches HBM."""

    name: str
    einsums: tuple[Einsum, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Kernels in order. `count` is how many layers of the model are this block; None for what is no layer
    (embedding, head) and runs once."""

    name: str
    groups: tuple[Group, ...]
    count: int | None = None

    @property
    def einsums(self) -> Iterator[Einsum]:
        for group in self.groups:
            yield from group.einsums


def block(name: str, kernels: Mapping[str, str | Iterable[str]], count: int | None = None) -> Block:
    """A block from its kernels: each a name and one or more einsums as text, in the order in which they run.

    Raises EinsumError on text that is no einsum.
    """
    if count is not None and not is_positive_whole(count):
        raise EinsumError(f"block {name!r}: count {count!r} is not a positive whole number")
    groups = []
    for kernel, texts in kernels.items():
        lines = [texts] if isinstance(texts, str) else list(texts)
        if not lines:
            raise EinsumError(f"kernel {name}.{kernel}: has no einsum")
        groups.append(Group(kernel, tuple(parse_einsum(line, f"{name}.{kernel}") for line in lines)))
    if not groups:
        raise EinsumError(f"block {name!r}: has no kernels")
    return Block(name, tuple(groups), count)


@dataclass(frozen=True)
class Cascade:
    """Made by `build_cascade` or `load_cascade`, which check it; equal cascades describe the same work.

    `ranks` by name; `kinds` of every tensor that is not an activation; `tied` weights that are the memory of another
    (a head tied to the embedding); `order` the cycle in which the kinds of layers alternate, empty where each block's
    layers follow one another.
    """

    name: str
    ranks: Mapping[str, Rank]
    kinds: Mapping[str, Kind]
    blocks: tuple[Block, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    _lowered: dict[tuple[Widths, Mesh], tuple[Kernel, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        return f"<Cascade {self.name!r}: {', '.join(f'{each.count or 1} {each.name}' for each in self.blocks)}>"

    def kind(self, tensor: str) -> Kind:
        return self.kinds.get(tensor, "activation")

    def is_weight(self, tensor: str) -> bool:
        return self.kinds.get(tensor) in WEIGHTS

    def einsums(self) -> Iterator[Einsum]:
        for each in self.blocks:
            yield from each.einsums

    @cached_property
    def handed_on(self) -> Mapping[str, tuple[Einsum, Access]]:
        """Activations that a layer takes from the block before it, with the einsum that reads them."""
        found: dict[str, tuple[Einsum, Access]] = {}
        for each in self.blocks:
            made: set[str] = set()
            for einsum in each.einsums:
                for access in einsum.reads:
                    if self.kind(access.tensor) == "activation" and access.tensor not in made:
                        found.setdefault(access.tensor, (einsum, access))
                made.add(einsum.output.tensor)
        return found

    @cached_property
    def kept(self) -> Mapping[tuple[str, str], frozenset[str]]:
        """Of each (block, group), the tensors it makes that reach HBM: those that another group of the block reads, or
        the next block, the next step (KV cache), or nobody (results)."""
        kept = {}
        for each in self.blocks:
            readers: dict[str, set[str]] = {}
            for group in each.groups:
                for einsum in group.einsums:
                    for access in einsum.reads:
                        readers.setdefault(access.tensor, set()).add(group.name)
            for group in each.groups:
                kept[each.name, group.name] = frozenset(
                    tensor
                    for tensor in {einsum.output.tensor for einsum in group.einsums}
                    if tensor in self.handed_on
                    or self.kind(tensor) == "kv_cache"
                    or readers.get(tensor) != {group.name}
                )
        return kept

    def expert_rank(self, block: Block) -> str | None:
        """The rank of a block's experts."""
        for einsum in block.einsums:
            for access in einsum.reads:
                for name in access.ranks:
                    if self.ranks[name].select is not None:
                        return name
        return None

    @cached_property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return sum(block.count or 1 for block in self.blocks if self.expert_rank(block) is not None)

    def parameters(self) -> int:
        """Elements of all weights of the whole model, tied ones once."""
        return self._parameters(lambda rank: rank.size or 1)

    def active_parameters(self) -> int:
        """Elements of the weights that one token meets: of experts only those that it selects."""
        return self._parameters(lambda rank: rank.select or rank.size or 1)

    def _parameters(self, extent: Callable[[Rank], int]) -> int:
        total = 0
        for each in self.blocks:
            weights = {
                access.tensor: access.ranks
                for einsum in each.einsums
                for access in einsum.reads
                if self.is_weight(access.tensor) and access.tensor not in self.tied
            }
            elements = sum(prod(extent(self.ranks[rank]) for rank in ranks) for ranks in weights.values())
            total += elements * (each.count or 1)
        return total

    def kernels(self, widths: Widths | None = None, mesh: Mesh | None = None) -> list[Kernel]:
        """The kernels that one GPU launches in a step, of every pipeline stage (see `Kernel.stage`).

        Raises EinsumError where the mesh cannot split a rank.
        """
        from energylens_vllm.einsum.lowering import lower

        key = (widths or Widths(), mesh or Mesh())
        if key not in self._lowered:
            self._lowered[key] = tuple(lower(self, *key))
        return list(self._lowered[key])

    def weight_bytes(self, widths: Widths | None = None, mesh: Mesh | None = None) -> list[float]:
        """Bytes of the weights that one GPU of each pipeline stage holds.

        Raises EinsumError where the mesh cannot split a rank.
        """
        from energylens_vllm.einsum.lowering import weight_bytes

        return weight_bytes(self, widths or Widths(), mesh or Mesh())


def build_cascade(
    name: str,
    *,
    ranks: Mapping[str, RankLike],
    tensors: Mapping[str, str | Iterable[str]],
    blocks: Iterable[Block],
    tied: Mapping[str, str] | None = None,
    order: Iterable[str] = (),
) -> Cascade:
    """A checked cascade.

    `ranks`: name -> size, or "tokens" / "sampled" / "context", or a `Rank` (or a mapping of its fields).
    `tensors`: kind ("quantized", "expert", "plain", "kv_cache", "input") -> tensor names, as a list or one string
    with spaces; tensors named nowhere are activations. `blocks` in the order in which they run, see `block`. `tied`:
    weight -> the weight whose memory it is. `order`: the cycle of block names in which layers alternate.

    Raises EinsumError, naming the einsum, the rank and both sizes.
    """
    kinds: dict[str, Kind] = {}
    accepted = [kind for kind in get_args(Kind) if kind != "activation"]
    for kind, names in tensors.items():
        if kind not in accepted:
            raise EinsumError(str(unknown("tensors", kind, accepted)))
        for tensor in names.split() if isinstance(names, str) else names:
            if tensor in kinds:
                raise EinsumError(f"tensors: {tensor!r} is listed as {kinds[tensor]} and as {kind}")
            kinds[tensor] = kind  # type: ignore[assignment]  # one of `accepted`
    cascade = Cascade(
        name=name,
        ranks={rank: make_rank(rank, given) for rank, given in ranks.items()},
        kinds=kinds,
        blocks=tuple(blocks),
        tied=dict(tied or {}),
        order=tuple(order),
    )
    _check(cascade)
    return cascade


def _check(cascade: Cascade) -> None:
    _check_names(cascade)
    for einsum in cascade.einsums():
        _check_einsum(cascade, einsum)
    made: dict[str, Einsum] = {}  # activation or cache -> an einsum that makes it
    for einsum in cascade.einsums():
        made.setdefault(einsum.output.tensor, einsum)
    first = dict(made)
    for each in cascade.blocks:
        weights: dict[str, Einsum] = {}
        for einsum in each.einsums:
            for access in (*einsum.reads, einsum.output):
                if cascade.is_weight(access.tensor):  # each block has its own
                    known = weights.setdefault(access.tensor, einsum)
                elif access.tensor in made or cascade.kind(access.tensor) != "activation":
                    known = first.setdefault(access.tensor, einsum)
                else:
                    near = unknown("tensor", access.tensor, {*made, *cascade.kinds})
                    einsum.fail(f"{access} is read but no einsum makes it, and `tensors` does not list it: {near}")
                _check_same_ranks(cascade, einsum, access, known)


def _check_names(cascade: Cascade) -> None:
    names = [each.name for each in cascade.blocks]
    for name in names:
        if names.count(name) > 1:
            raise EinsumError(f"block {name!r}: there are two of that name")
    layers = [each.name for each in cascade.blocks if each.count is not None]
    for name in cascade.order:
        if name not in layers:
            raise EinsumError(str(unknown("order", name, layers, "Only blocks with a count are layers.")))
    if cascade.order and set(cascade.order) != set(layers):
        raise EinsumError(f"order: leaves out {', '.join(sorted(set(layers) - set(cascade.order)))}")
    for name, rank in cascade.ranks.items():
        if rank.groups is None:
            continue
        if rank.groups not in cascade.ranks:
            raise EinsumError(f"rank {name!r}: {unknown('groups', rank.groups, cascade.ranks)}")
        of = cascade.ranks[rank.groups]
        if of.size is None or rank.size is None or of.size % rank.size:
            raise EinsumError(f"rank {name!r} ({rank.size}) does not divide rank {rank.groups!r} ({of.size})")
    used = {access.tensor for einsum in cascade.einsums() for access in (*einsum.reads, einsum.output)}
    for tensor in cascade.kinds:
        if tensor not in used:
            raise EinsumError(str(unknown("tensors", tensor, used, "No einsum uses it.")))
    for tensor, other in cascade.tied.items():
        for which in (tensor, other):
            if not cascade.is_weight(which):
                raise EinsumError(f"tied: {which!r} is not a weight")
        if other in cascade.tied:
            raise EinsumError(f"tied: {other!r} is tied itself")


def _check_einsum(cascade: Cascade, einsum: Einsum) -> None:
    for access in (einsum.output, *einsum.reads):
        for rank in access.ranks:
            if rank not in cascade.ranks:
                einsum.fail(f"{access}: {unknown('rank', rank, cascade.ranks)}")
        if len(set(access.ranks)) < len(access.ranks):
            einsum.fail(f"{access} has a rank twice")
    if cascade.kind(einsum.output.tensor) not in ("activation", "kv_cache"):
        einsum.fail(f"{einsum.output.tensor} is listed as {cascade.kind(einsum.output.tensor)} and cannot be made")
    calls = [call for term in einsum.terms for factor in term.factors for call in factor.calls()]
    if any(call.function == GATHER for call in calls):
        _check_gather(cascade, einsum)
        return
    for term in einsum.terms:
        _check_covers(cascade, einsum, term)
        _check_sums(cascade, einsum, term)


def _check_covers(cascade: Cascade, einsum: Einsum, term: Term) -> None:
    """A term has every rank of the left side, unless it is a bias. A function may bring in selected ranks (top-k)."""
    if len(einsum.terms) > 1 and all(cascade.is_weight(access.tensor) for access in term.accesses()):
        return
    available = {name for access in term.accesses() for name in access.ranks}
    for name in einsum.output.ranks:
        rank = cascade.ranks[name]
        of_group = any(cascade.ranks[other].groups == name for other in available)
        if name not in available and not of_group and not (term.is_function and rank.select):
            others = ", ".join(_sized(cascade, other) for other in sorted(available - set(einsum.output.ranks)))
            einsum.fail(f"{term} lacks rank {_sized(cascade, name)} of {einsum.output}; it has {others or 'no other'}")


def _check_sums(cascade: Cascade, einsum: Einsum, term: Term) -> None:
    """In a product, a rank that is summed over joins two tensors; one tensor alone may be summed."""
    if len(term.factors) == 1:
        return
    holders: dict[str, int] = {}
    for factor in term.factors:
        names = {name for access in factor.accesses() for name in access.ranks}
        names |= {of for name in names if (of := cascade.ranks[name].groups) is not None}
        for name in names:
            holders[name] = holders.get(name, 0) + 1
    lone = [
        name
        for access in term.accesses()
        for name in access.ranks
        if name not in einsum.output.ranks and holders[name] == 1 and cascade.ranks[name].groups not in holders
    ]
    if lone:
        ranks = " and ".join(_sized(cascade, name) for name in dict.fromkeys(lone))
        einsum.fail(f"{term} sums over {ranks}, which only one of its tensors has and {einsum.output} lacks")


def _check_gather(cascade: Cascade, einsum: Einsum) -> None:
    call = einsum.terms[0].factors[0]
    accesses = [term.factors[0] for argument in call.arguments for term in argument] if isinstance(call, Call) else []
    if len(einsum.terms) > 1 or len(einsum.terms[0].factors) > 1 or len(accesses) != 2:
        einsum.fail("gather(tensor, indices) stands alone and takes two tensors")
    source, index = accesses
    if not isinstance(source, Access) or not isinstance(index, Access):
        einsum.fail("gather(tensor, indices) stands alone and takes two tensors")
    taken = [name for name in source.ranks if name not in einsum.output.ranks]
    if len(taken) != 1:
        einsum.fail(f"gather takes away one rank of {source}, but {einsum.output} lacks {len(taken)} of them")
    expected = {*source.ranks, *index.ranks} - set(taken)
    if expected != set(einsum.output.ranks):
        wanted = ", ".join(_sized(cascade, name) for name in sorted(expected))
        given = ", ".join(_sized(cascade, name) for name in einsum.output.ranks)
        einsum.fail(f"gather gives the ranks {wanted}, but {einsum.output} has {given}")


def _sized(cascade: Cascade, name: str) -> str:
    rank = cascade.ranks[name]
    return f"{name} ({rank.size or rank.bound})"


def _check_same_ranks(cascade: Cascade, einsum: Einsum, access: Access, known: Einsum) -> None:
    """Wherever a tensor appears its ranks have the same sizes; names may differ, and a cache is written by tokens
    and read by context."""
    other = next(a for a in (known.output, *known.reads) if a.tensor == access.tensor)
    if len(other.ranks) != len(access.ranks):
        einsum.fail(f"{access} has {len(access.ranks)} ranks, but {other} in {str(known)!r} has {len(other.ranks)}")
    cache = cascade.kind(access.tensor) == "kv_cache"
    for mine, theirs in zip(access.ranks, other.ranks, strict=True):
        a, b = cascade.ranks[mine], cascade.ranks[theirs]
        same_bound = a.bound == b.bound or (cache and {a.bound, b.bound} == {"tokens", "context"})
        if a.size != b.size or not same_bound or a.split != b.split:
            einsum.fail(
                f"{access}: rank {_sized(cascade, mine)} does not fit rank {_sized(cascade, theirs)} of {other} in "
                f"{str(known)!r} ({known.where})"
            )
