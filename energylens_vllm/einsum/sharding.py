"""Sharding: how ranks are split over a mesh as vLLM splits them, and which exchange a change of layout needs.

Places where an einsum can run, by which tokens a GPU holds there:

`local`     the tokens of its data-parallel rank, replicated over tp; ranks with `split: tp` are split over tp
`sequence`  a tp-th of those tokens (vLLM's sequence-parallel experts: tp, dp and expert parallelism together); the
            tokens take up the tp axis, so nothing else can be split over it
`experts`   the tokens of all data-parallel ranks; experts are split over ep = tp * dp, or without expert parallelism
            each expert's `tp` ranks over tp * dp. Where prefill context parallelism splits tokens over pcp, its ranks
            join those of dp
`context`   the tokens of `local`, where the KV cache lies: a request's context is split over the dcp ranks that tp
            lends for it, so that heads can only be split over the tp / dcp that are left (decode context parallelism)
`whole`     the tokens of all pcp ranks, where `local` has a pcp-th of them

Source: vLLM 0.32 `FusedMoEParallelConfig.make`, `ParallelConfig.use_sequence_parallel_moe`, `QKVParallelLinear`,
`VocabParallelEmbedding`, `AgRsAll2AllManager`, `ModelConfig.verify_with_parallel_config`, `PCPManager`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NoReturn

from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.kernel import CollectiveShape, Mesh, reached
from energylens_vllm.errors import is_positive_whole

if TYPE_CHECKING:
    from energylens_vllm.einsum.cascade import Cascade
    from energylens_vllm.einsum.expression import Access

Place = Literal["local", "sequence", "experts", "context", "whole"]
Axis = Literal["tp", "pcp", "dp", "dcp"]

WHOLE: frozenset[Axis] = frozenset()
#: Axes over which experts may be shared out.
EXPERT_AXES: tuple[Axis, ...] = ("tp", "pcp", "dp")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an activation lies, the axes over which it is still a partial sum, and whether ranks that would be split
    were gathered."""

    place: Place = "local"
    partial: frozenset[Axis] = WHOLE
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective that turns one layout into another; `payload` is the layout in which its bytes are counted."""

    shape: CollectiveShape
    payload: Layout


def check_mesh(mesh: Mesh) -> None:
    """Raises EinsumError on degrees that no deployment has."""
    for name in ("tp", "pp", "dp", "ep", "pcp", "dcp"):
        degree = getattr(mesh, name)
        if not is_positive_whole(degree):
            raise EinsumError(f"mesh {name}: {degree!r} is not a positive whole number")
    if mesh.ep not in (1, mesh.tp * mesh.pcp * mesh.dp):
        ranks = "tp * dp" if mesh.pcp == 1 else "tp * pcp * dp"
        raise EinsumError(f"mesh ep: {mesh.ep} is neither 1 (off) nor {ranks} = {mesh.tp * mesh.pcp * mesh.dp}")
    if mesh.tp % mesh.dcp:
        raise EinsumError(f"mesh dcp: {mesh.dcp} does not divide tp = {mesh.tp}, whose ranks it shares")
    if mesh.pcp > 1 and mesh.dcp > 1:
        raise EinsumError(f"mesh dcp: {mesh.dcp} together with pcp = {mesh.pcp}; accepted: one of them")


class Sharding:
    """How one mesh splits the ranks of one cascade."""

    def __init__(self, cascade: Cascade, mesh: Mesh) -> None:
        check_mesh(mesh)
        self.cascade, self.ranks, self.mesh = cascade, cascade.ranks, mesh
        #: sequence-parallel experts: only where tokens are replicated over tp and experts live on all GPUs
        self.sequence = mesh.ep > 1 and mesh.tp > 1 and mesh.dp > 1
        #: all-to-all kernels, which vLLM uses with data parallelism only, send each GPU the tokens of its own experts,
        #: and no row is made for another's
        self.all2all = mesh.all2all and mesh.ep > 1 and mesh.dp > 1
        #: the axes of the group that shares the experts
        self.expert_axes: frozenset[Axis] = frozenset(axis for axis in EXPERT_AXES if getattr(mesh, axis) > 1)
        self._degrees: dict[tuple[str, Place], int] = {}
        if mesh.pcp > 1:
            self._check_tokens()
        if mesh.dcp > 1:
            self._check_context()

    def _check_tokens(self) -> None:
        """Raises EinsumError where vLLM cannot split tokens over pcp either, and for what is not derived."""
        mesh = self.mesh
        for _, name in self._of_context():
            if self.ranks[name].phase == "all":
                self._fail(name, f"is of prefill and decode together: vLLM splits tokens over pcp = {mesh.pcp} only of "
                                 "latent attention")  # fmt: skip
        if mesh.dp > 1 and mesh.ep == 1 and any(rank.select for rank in self.ranks.values()):
            raise EinsumError(f"mesh pcp: {mesh.pcp} with dp = {mesh.dp} is only understood with expert parallelism")

    def _check_context(self) -> None:
        """Raises EinsumError where vLLM cannot split contexts either."""
        tp, dcp = self.mesh.tp, self.mesh.dcp
        for access, context in self._of_context():
            if self.ranks[context].window or self.ranks[context].chunk:
                self._fail(context, f"has a window or chunks, and no such context can be split over dcp = {dcp}")
            if self.cascade.kind(access.tensor) == "activation":
                continue  # made where the context lies, of all heads there
            for name in access.ranks:
                if name != context and self.degree(name, "context") != self.degree(name, "local"):
                    most = max(tp // self.ranks[name].padded, 1)
                    self._fail(
                        name,
                        f"differs between GPUs that were to share a context over dcp = {dcp}; accepted with tp = {tp}: "
                        f"up to {most}, as many as hold the same KV heads",
                    )

    def _of_context(self) -> Iterator[tuple[Access, str]]:
        """What einsums read and make that has a rank bound to context, with that rank."""
        for einsum in self.cascade.einsums():
            for access in (einsum.output, *einsum.reads):
                yield from ((access, name) for name in access.ranks if self.ranks[name].bound == "context")

    def degree(self, name: str, place: Place) -> int:
        """Into how many parts the rank is split. Raises EinsumError where it does not divide."""
        key = (name, place)
        if key not in self._degrees:
            self._degrees[key] = self._degree(name, place)
        return self._degrees[key]

    def _degree(self, name: str, place: Place) -> int:
        rank = self.ranks[name]
        if rank.bound == "context":
            return self.mesh.dcp if place == "context" else 1
        if rank.groups is not None:  # KV heads: as many parts as the query heads, replicated beyond their number
            assert rank.size is not None
            parts = self.degree(rank.groups, place)
            if parts % rank.size and rank.size % parts:
                self._fail(name, f"follows rank {rank.groups} in {parts} parts, but neither number divides the other")
            return min(parts, rank.size)
        mesh = self.mesh
        if place == "sequence" or rank.split is None:
            return 1
        if rank.split == "ep":
            return mesh.ep if place == "experts" else 1
        if place == "experts":
            over, parts = " * ".join(("tp", *(axis for axis in ("pcp", "dp") if axis in self.expert_axes))), 1
            if mesh.ep == 1:
                parts = mesh.tp * mesh.pcp * mesh.dp
        elif place == "context":
            over, parts = "tp / dcp", mesh.tp // mesh.dcp
        else:
            over, parts = "tp", mesh.tp
        if rank.padded % parts:
            self._fail(name, f"is not divisible by {over} = {parts}")
        return parts

    def _fail(self, name: str, problem: str) -> NoReturn:
        user = next(e for e in self.cascade.einsums() if any(name in a.ranks for a in (e.output, *e.reads)))
        rank = self.ranks[name]
        user.fail(f"rank {name} ({rank.bound or rank.padded}) {problem}")

    def experts(self, name: str) -> tuple[int, int]:
        """(experts of the layer, experts on the GPU that has most), redundant ones included."""
        size = self.ranks[name].size
        assert size is not None
        total = size + self.mesh.redundant_experts
        return total, -(-total // self.degree(name, "experts"))

    def token_share(self, place: Place, experts: str | None) -> float:
        """Tokens that a GPU holds in `place`, as a multiple of its data-parallel rank's tokens. `experts`: the rank of
        the experts, for which all-to-all kernels send each GPU only the tokens that it needs."""
        if place in ("local", "context"):
            return 1.0
        if place == "whole":
            return self.mesh.pcp
        if place == "sequence":
            return 1.0 / self.mesh.tp
        wanted = 1.0
        if self.all2all and experts is not None:  # under uniform routing
            total, local = self.experts(experts)
            wanted = reached(self.ranks[experts].select or total, total, local)
        return self.mesh.pcp * self.mesh.dp * wanted

    # -- exchanges ------------------------------------------------------------------------------------------------

    def reduce(self, layout: Layout) -> tuple[Exchange, Layout]:
        """Complete a partial sum."""
        shape = {
            frozenset({"tp"}): CollectiveShape("all_reduce", "tp", self.mesh.tp),
            frozenset({"dp"}): CollectiveShape("all_reduce", "dp", self.mesh.dp),
        }.get(layout.partial, CollectiveShape("all_reduce", "ep", self.mesh.tp * self.mesh.pcp * self.mesh.dp))
        return Exchange(shape, layout), replace(layout, partial=WHOLE)

    def gather_rank(self, layout: Layout) -> tuple[Exchange, Layout]:
        """Put together a tensor whose ranks are split over tp."""
        after = replace(layout, gathered=True)
        return Exchange(CollectiveShape("all_gather", "tp", self.mesh.tp), after), after

    def gather_sequence(self, layout: Layout) -> tuple[Exchange, Layout]:
        after = replace(layout, place="local")
        return Exchange(CollectiveShape("all_gather", "tp", self.mesh.tp), after), after

    def gather_tokens(self, layout: Layout) -> tuple[Exchange, Layout]:
        """Put together the tokens that pcp splits."""
        after = replace(layout, place="whole")
        return Exchange(CollectiveShape("all_gather", "pcp", self.mesh.pcp), after), after

    def dispatch(self, layout: Layout) -> tuple[Exchange | None, Layout]:
        """From where tokens are to the experts."""
        after = Layout("experts")
        if self.mesh.pcp * self.mesh.dp == 1:
            return None, after  # every GPU of the group holds all tokens: it skips those of other GPUs' experts
        return Exchange(self._expert_shape("all_gather"), after), after

    def combine(self, layout: Layout) -> tuple[Exchange | None, Layout]:
        """From the experts back; what stays partial over tp is for the consumer to reduce."""
        if self.mesh.pcp * self.mesh.dp == 1:
            return None, Layout("local", layout.partial)
        shape = self._expert_shape("reduce_scatter")
        left = WHOLE if shape.axis == "ep" else frozenset(axis for axis in layout.partial if axis != shape.axis)
        after = Layout("sequence" if self.sequence else "local", left)
        return Exchange(shape, layout), after

    def _expert_shape(self, op: Literal["all_gather", "reduce_scatter"]) -> CollectiveShape:
        mesh = self.mesh
        if self.all2all:
            return CollectiveShape("all_to_all", "ep", mesh.ep)
        if self.sequence or (mesh.pcp > 1 and mesh.dp > 1):
            return CollectiveShape(op, "ep", mesh.ep)
        return CollectiveShape(op, "dp", mesh.dp) if mesh.dp > 1 else CollectiveShape(op, "pcp", mesh.pcp)


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, as vLLM's `get_pp_indices`: a remainder goes to stages from the last but one
    backwards. Raises EinsumError if a stage would have none."""
    if stages > max(layers, 1):
        raise EinsumError(f"mesh pp: {stages} stages for {layers} layers")
    counts = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        counts[-i] += 1
    return counts


def layer_sequence(counts: Mapping[str, int], order: Iterable[str]) -> list[str]:
    """The block of each layer: `order` over and over, each block until its count is used up; without it one block
    after the other."""
    cycle = list(order)
    if not cycle:
        return [name for name, count in counts.items() for _ in range(count)]
    left = dict(counts)
    sequence: list[str] = []
    while any(left.values()):
        for name in cycle:
            if left[name]:
                left[name] -= 1
                sequence.append(name)
    return sequence
