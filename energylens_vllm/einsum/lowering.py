"""Cascade + mesh -> kernels of one GPU, with the collectives that the sharding makes necessary.

Walks a block's einsums in order and keeps, for every activation, how it lies. Where an einsum needs an operand in
another layout, the exchange in between is a collective: a sum over a split rank leaves a partial sum that the first
reader who is not linear in it must have completed, a function that drops a split rank needs it whole, experts need
tokens from where they are, and attention needs its queries where the cache lies (context.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from energylens_vllm.einsum.context import SplitContext, context_ranks, query_makers
from energylens_vllm.einsum.expression import LINEAR, Access, Einsum
from energylens_vllm.einsum.kernel import CollectiveShape, Kernel, Mesh, Terms, Widths
from energylens_vllm.einsum.sharding import WHOLE, Axis, Exchange, Layout, Place, Sharding, layer_sequence, stage_layers
from energylens_vllm.einsum.work import Counter, Placed, Sum, contracted, gather_source, iteration, partial_candidates

if TYPE_CHECKING:
    from energylens_vllm.einsum.cascade import Block, Cascade


def lower(cascade: Cascade, widths: Widths, mesh: Mesh) -> list[Kernel]:
    """The kernels of one GPU of each pipeline stage. Raises EinsumError where the mesh cannot split a rank."""
    sharding = Sharding(cascade, mesh)
    blocks = {block.name: _Walk(cascade, block, sharding, widths).kernels() for block in cascade.blocks}
    kernels: list[Kernel] = []
    stages = list(_stages(cascade, mesh))
    for stage, launches in enumerate(stages):
        if stage:
            kernels += _boundary(cascade, sharding, widths, stage, sending=False)
        for name, count in launches.items():
            kernels += [replace(kernel, count=count, stage=stage) for kernel in blocks[name]]
        if stage + 1 < len(stages):
            kernels += _boundary(cascade, sharding, widths, stage, sending=True)
    return kernels


def weight_bytes(cascade: Cascade, widths: Widths, mesh: Mesh) -> list[float]:
    """Bytes of the weights that one GPU of each pipeline stage holds. A tied weight takes memory only on a stage that
    lacks the weight whose memory it is."""
    sharding = Sharding(cascade, mesh)
    blocks = {}
    for block in cascade.blocks:
        walk = _Walk(cascade, block, sharding, widths)
        blocks[block.name] = dict(walk.weights())
    totals = []
    for launches in _stages(cascade, mesh):
        present = {tensor for name in launches for tensor in blocks[name]}
        totals.append(
            sum(
                count * size
                for name, count in launches.items()
                for tensor, size in blocks[name].items()
                if cascade.tied.get(tensor) not in present
            )
        )
    return totals


def _stages(cascade: Cascade, mesh: Mesh) -> Iterator[dict[str, int]]:
    """How often each block runs on each pipeline stage. What comes before the layers is on the first, the rest on the
    last."""
    layers = {block.name: block.count for block in cascade.blocks if block.count is not None}
    sequence = layer_sequence(layers, cascade.order)
    first = next((i for i, block in enumerate(cascade.blocks) if block.count is not None), 0)
    start = 0
    for stage, count in enumerate(stage_layers(len(sequence), mesh.pp)):
        here = sequence[start : start + count]
        start += count
        launches = {}
        for index, block in enumerate(cascade.blocks):
            if block.count is not None:
                launches[block.name] = here.count(block.name)
            else:
                launches[block.name] = int(stage == (0 if index < first else mesh.pp - 1))
        yield {name: count for name, count in launches.items() if count}


def _boundary(cascade: Cascade, sharding: Sharding, widths: Widths, stage: int, sending: bool) -> list[Kernel]:
    """Between pipeline stages: each tensor that layers hand on is sent in tp slices, which the receivers gather
    (vLLM's `isend_tensor_dict` with `all_gather_group`)."""
    tp = sharding.mesh.tp
    if sending:
        what, shape, share = "send", CollectiveShape("send_recv", "pp", 2), 1.0 / tp
    elif tp > 1:
        what, shape, share = "receive", CollectiveShape("all_gather", "tp", tp), 1.0
    else:
        return []
    counter = Counter(cascade, sharding, widths, None)
    kernels = []
    for einsum, access in cascade.handed_on.values():
        total = Sum()
        total.add(counter.amount(einsum, access.ranks, Layout()), counter.width(access) * share)
        kernels.append(_collective(f"pipeline.{access.tensor}.{what}", shape, total.terms(), stage))
    return kernels


def _collective(name: str, shape: CollectiveShape, message: Terms, stage: int = 0) -> Kernel:
    return Kernel(name, "collective", 1, activation_bytes=message, collective=shape, stage=stage)


class _Walk:
    """One block under one sharding."""

    def __init__(self, cascade: Cascade, block: Block, sharding: Sharding, widths: Widths) -> None:
        self.cascade, self.block, self.sharding = cascade, block, sharding
        experts = cascade.expert_rank(block)
        self.counter = Counter(cascade, sharding, widths, experts)
        self.layouts: dict[str, Layout] = {}
        self.stayed: dict[str, Layout] = {}  #: of what was sent to the experts, how it still lies where it came from
        self.made: dict[str, tuple[str, Einsum]] = {}  #: activation -> the group and einsum that last made it
        self.out: list[Kernel] = []
        self.sliced = _dispatched(cascade, block) if sharding.sequence else frozenset()
        self.context = SplitContext(block, self.counter)
        self.replicated = query_makers(cascade, block) if sharding.mesh.dcp_q_replicate else frozenset()

    def kernels(self) -> list[Kernel]:
        for group, placed in self._groups():
            kept = self.cascade.kept[self.block.name, group]
            self.out.append(self.counter.kernel(f"{self.block.name}.{group}", placed, kept))
        for tensor in self.made:
            if tensor in self.cascade.handed_on:
                self._bring(tensor, "local")
                self._complete(tensor)
        return self.out

    def weights(self) -> Iterator[tuple[str, float]]:
        """Bytes of each of the block's weights on this GPU."""
        for _, placed in self._groups():
            for each in placed:
                for access in each.einsum.reads:
                    if self.cascade.is_weight(access.tensor):
                        elements = self.counter.weight_elements(access, each.place)
                        yield access.tensor, elements * self.counter.weight_width(access.tensor)

    def _groups(self) -> Iterator[tuple[str, list[Placed]]]:
        index = 0
        for group in self.block.groups:
            placed = []
            for einsum in group.einsums:
                placed.append(self._place(einsum, group.name, index))
                index += 1
            yield group.name, placed

    def _place(self, einsum: Einsum, group: str, index: int) -> Placed:
        """Bring the operands to where the einsum runs, and note how its output lies there."""
        activations = [a for a in einsum.reads if self.cascade.kind(a.tensor) == "activation"]
        place = "context" if index in self.replicated else self._where(einsum, activations)
        if place == "context":
            self._gather_queries(einsum, activations, f"{self.block.name}.{group}.queries")
        else:
            for access in activations:
                self._bring(access.tensor, place)
            if self.sharding.mesh.dcp > 1:
                self.out += self.context.gather_cache(f"{self.block.name}.{group}.cache", einsum)
        partial = self._partial(einsum, place)
        for access in self._dropped(einsum, place):
            self._complete(access.tensor)
            exchange, after = self.sharding.gather_rank(self._layout(access.tensor))
            self._exchange([access.tensor], exchange, after)
        operands = {access.tensor: self._seen(access.tensor, place) for access in activations}
        slice_now = index in self.sliced and place == "local"
        output = Layout("sequence" if slice_now else place, partial)
        self.layouts[einsum.output.tensor] = output
        self.stayed.pop(einsum.output.tensor, None)
        self.made[einsum.output.tensor] = group, einsum
        written = replace(output, place=place) if slice_now else output
        return Placed(einsum, place, operands, written)

    def _layout(self, tensor: str) -> Layout:
        return self.layouts.get(tensor, Layout())

    def _seen(self, tensor: str, place: Place) -> Layout:
        """How an operand lies for an einsum in `place`: of what was gathered a GPU may read its own part."""
        layout = self._layout(tensor)
        return replace(layout, place=place) if layout.place in ("context", "whole") else layout

    def _where(self, einsum: Einsum, activations: list[Access]) -> Place:
        if any(self.cascade.ranks[name].select for access in einsum.reads for name in access.ranks):
            return "experts"
        if self.sharding.mesh.dcp > 1 and context_ranks(self.cascade, einsum.reads):
            made = [access for access in activations if context_ranks(self.cascade, [access])]
            if made:  # scores, or keys that were made from the cache
                return self._layout(made[0].tensor).place
            return "context" if self.context.lies_at_cache(einsum) else "local"
        if self.sharding.mesh.pcp > 1:
            if self.sharding.mesh.ep == 1 and self._is_routing(einsum.output):
                return "experts"  # vLLM gathers the router's outputs and selects of all tokens
            if self.cascade.kind(einsum.output.tensor) == "kv_cache" or self._sampled(einsum.output):
                return "whole"
        places = {
            "sequence" if self._layout(a.tensor).place == "sequence" else self._after_experts(a.tensor)
            for a in activations
        }
        cache = any(self.cascade.kind(a.tensor) == "kv_cache" for a in (einsum.output, *einsum.reads))
        return "sequence" if places == {"sequence"} and not cache else "local"

    def _after_experts(self, tensor: str) -> Place:
        """Where a tensor lies once it has come back from the experts, or has never left."""
        if tensor in self.stayed:
            return "sequence" if self.stayed[tensor].place == "sequence" else "local"
        if self._layout(tensor).place == "experts" and self.sharding.sequence:
            return "sequence"
        return "local"

    # -- exchanges ------------------------------------------------------------------------------------------------

    def _gather_queries(self, einsum: Einsum, activations: list[Access], kernel: str) -> None:
        """Bring to the cache what attends to it."""
        degree = self.sharding.degree
        queries = [access for access in dict.fromkeys(activations) if not context_ranks(self.cascade, [access])]
        split = [
            access
            for access in queries
            if self._layout(access.tensor).place != "context"
            and any(degree(name, "local") != degree(name, "context") for name in access.ranks)
        ]
        for access in split:
            self._bring(access.tensor, "local")
            self._complete(access.tensor)
            self.layouts[access.tensor] = Layout("context")
        if split:
            self.out += self.context.gather_queries(kernel, einsum, split)
        for rank in context_ranks(self.cascade, einsum.reads):
            if queries:
                self.context.queries[rank] = [(einsum, access) for access in queries]

    def _bring(self, tensor: str, place: Place) -> None:
        """Exchange what is needed for the tensor to lie in `place`."""
        layout = self._layout(tensor)
        if layout.place == place:
            return
        if layout.place == "whole":
            return
        if layout.place == "context":  # gathered heads are whole, outputs are not
            if not layout.partial:
                return
            group, einsum = self.made[tensor]
            self.out += self.context.combine(f"{self.block.name}.{group}", einsum)
            layout = self.layouts[tensor] = Layout()
            if layout.place == place:
                return
        if place == "experts":
            self._dispatch(tensor)
            return
        if place == "whole":
            self._bring(tensor, "local")
            self._complete(tensor)
            self._exchange([tensor], *self.sharding.gather_tokens(self._layout(tensor)))
            return
        if tensor in self.stayed:
            layout = self.layouts[tensor] = self.stayed.pop(tensor)
        elif layout.place == "experts":
            exchange, after = self.sharding.combine(layout)
            self._exchange([tensor], exchange, after)
            layout = after
        if layout.place == "sequence" and place == "local":
            exchange, after = self.sharding.gather_sequence(layout)
            self._exchange([tensor], exchange, after)
        elif layout.place == "local" and place == "sequence":
            self.layouts[tensor] = replace(layout, place="sequence")

    def _dispatch(self, tensor: str) -> None:
        """To the experts, and with it the routing, in one message as vLLM sends them."""
        routing = [
            name
            for name, (_, einsum) in self.made.items()
            if name != tensor and self._layout(name).place != "experts" and self._is_routing(einsum.output)
        ]
        tensors = [tensor, *routing]
        for each in tensors:
            self._complete(each)
        self.stayed |= {each: self._layout(each) for each in tensors}
        exchange, after = self.sharding.dispatch(self._layout(tensor))
        self._exchange(tensors, exchange, after)

    def _sampled(self, access: Access) -> bool:
        return any(self.cascade.ranks[name].bound == "sampled" for name in access.ranks)

    def _is_routing(self, access: Access) -> bool:
        return any(self.cascade.ranks[name].select for name in access.ranks)

    def _complete(self, tensor: str) -> None:
        """Finish a sum over a split rank."""
        layout = self._layout(tensor)
        if layout.partial:
            exchange, after = self.sharding.reduce(layout)
            self._exchange([tensor], exchange, after)

    def _exchange(self, tensors: list[str], exchange: Exchange | None, after: Layout) -> None:
        if exchange is not None:
            message = Sum()
            for tensor in tensors:
                _, einsum = self.made[tensor]
                access = einsum.output
                # Routing goes to every rank whole: a gather knows no experts (vLLM, all2all.py `AgRsAll2AllManager`).
                amount = self.counter.amount(einsum, access.ranks, exchange.payload, remote=True)
                message.add(amount, self.counter.width(access))
            self.out.append(_collective(self._name(tensors[0], exchange), exchange.shape, message.terms()))
        for tensor in tensors:
            self.layouts[tensor] = after

    def _name(self, tensor: str, exchange: Exchange) -> str:
        """After the kernel that made the tensor, and after the tensor where that kernel's have several exchanges."""
        kernel, op = f"{self.block.name}.{self.made[tensor][0]}", exchange.shape.op
        taken = any(other.name == f"{kernel}.{op}" for other in self.out)
        return f"{kernel}.{tensor}.{op}" if taken else f"{kernel}.{op}"

    # -- what an einsum does to layouts ---------------------------------------------------------------------------

    def _partial(self, einsum: Einsum, place: Place) -> frozenset[Axis]:
        """Axes over which the output is a partial sum; completes operands where the einsum is not linear in them."""
        operands: list[list[str]] = []  # of each term, the partial operands that may pass through it
        sums: list[frozenset[Axis]] = []  # of each term, the axes over which it sums itself
        biases = []
        for term in einsum.terms:
            through = []
            for access, linear in partial_candidates(term, LINEAR):
                if self._layout(access.tensor).partial and self.cascade.kind(access.tensor) == "activation":
                    if linear:
                        through.append(access.tensor)
                    else:
                        self._complete(access.tensor)
            if len(through) > 1:
                for tensor in through:
                    self._complete(tensor)
                through = []
            operands.append(through)
            split = self._split_sum(einsum, term_ranks=contracted(self.cascade, einsum, term), place=place)
            sums.append(self._axes(place) if split else WHOLE)
            biases.append(all(self.cascade.is_weight(access.tensor) for access in term.accesses()))
        # A bias is added on one GPU only; any other whole term (a residual) is added to whole sums.
        if any(not through and not own and not bias for through, own, bias in zip(operands, sums, biases, strict=True)):
            for through in operands:
                for tensor in through:
                    self._complete(tensor)
        partial = WHOLE.union(*sums)
        for through in operands:
            for tensor in through:
                partial |= self._layout(tensor).partial
        return partial

    def _split_sum(self, einsum: Einsum, term_ranks: list[str], place: Place) -> bool:
        source = gather_source(einsum)
        if source is not None:  # rows that other GPUs own come out as zeros
            term_ranks = [name for name in source.ranks if name not in einsum.output.ranks]
        return any(self._split(name, place) for name in term_ranks)

    def _split(self, name: str, place: Place) -> bool:
        return self.sharding.degree(name, place) > 1

    def _axes(self, place: Place) -> frozenset[Axis]:
        if place == "context":
            return frozenset({"dcp"})
        return self.sharding.expert_axes if place == "experts" else frozenset({"tp"})

    def _dropped(self, einsum: Einsum, place: Place) -> list[Access]:
        """Operands of a lone function that lose a split rank in it."""
        term = einsum.terms[0]
        if len(einsum.terms) > 1 or not term.is_function or term.is_gather:
            return []
        dropped = {name for name in iteration(self.cascade, term) if name not in einsum.output.ranks}
        split = {name for name in dropped if self._split(name, place)}
        return [a for a in term.accesses() if split.intersection(a.ranks) and not self._layout(a.tensor).gathered]


def _dispatched(cascade: Cascade, block: Block) -> frozenset[int]:
    """Positions of the einsums whose outputs are what experts, and those beside them, read."""
    last: dict[str, int] = {}
    found = set()
    for index, einsum in enumerate(block.einsums):
        experts = [a for a in einsum.reads if any(cascade.ranks[name].select for name in a.ranks)]
        if experts:
            found |= {
                last[a.tensor]
                for a in einsum.reads
                if a not in experts and a.tensor in last and cascade.kind(a.tensor) == "activation"
            }
        last[einsum.output.tensor] = index
    return frozenset(found)
