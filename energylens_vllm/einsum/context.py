"""Attention over contexts that are split over GPUs (decode context parallelism): what it takes beside the attention.

The dcp ranks are tensor-parallel ranks that hold the same KV heads; each keeps its share of every request's keys. Heads
cannot be split over GPUs that already split the keys, so queries are gathered, every rank attends with all of their
heads to its own keys, and softmax leaves each with an output that is right up to a factor: a partial sum over dcp,
whose factors follow from the ranks' log-sum-exps. Where keys are made from the cache by a weight (latent attention's
prefill), heads stay and the cache comes to them.

Where one kernel serves requests with several new tokens, their causal mask would fall to the ranks unevenly, so new
tokens attend to each other apart, each rank with its own heads, and the two outputs are merged. The arithmetic of both
is counted with the context's attention: a pair costs a GPU the same in either.

Exchanges along heads, which are not the outermost rank of a tensor, are brought into order by a copy before or after.

Source: vLLM 0.25.1 and 0.32, v1/attention/backends/flash_attn.py `_forward_with_dcp`, model_executor/layers/attention/
mla_attention.py `forward_impl` and `_context_parallel_compute_prefill_context`, v1/attention/ops (`cp_lse_ag_out_rs`,
`dcp_a2a_lse_reduce`), distributed/device_communicators/cuda_communicator.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from energylens_vllm.einsum.expression import Access, Einsum
from energylens_vllm.einsum.kernel import CollectiveOp, CollectiveShape, Kernel, Phase, Terms
from energylens_vllm.einsum.sharding import Layout
from energylens_vllm.einsum.work import Counter, Sum

if TYPE_CHECKING:
    from energylens_vllm.einsum.cascade import Block, Cascade

#: Bytes of a log-sum-exp, float32 whatever the model's type.
LSE_BYTES = 4.0


class SplitContext:
    """The contexts of one block. Its methods give the kernels of an exchange; `kernel` is the name that theirs start
    with."""

    def __init__(self, block: Block, counter: Counter) -> None:
        self.block, self.counter, self.cascade = block, counter, counter.cascade
        self.mesh = counter.sharding.mesh
        self.queries: dict[str, list[tuple[Einsum, Access]]] = {}  #: rank of a context -> what attends to it
        self.gathered: set[str] = set()  #: ranks of contexts whose cache was brought to every GPU

    def lies_at_cache(self, einsum: Einsum) -> bool:
        """Whether an einsum that reads the cache runs where it lies. A weight's heads stay where they are split."""
        return not any(self.cascade.is_weight(access.tensor) for access in einsum.reads)

    def gather_queries(self, kernel: str, einsum: Einsum, split: Sequence[Access]) -> Iterator[Kernel]:
        """What `einsum` reads and is `split` by head, with all heads that share a context and in one message."""
        phase, moved = self.counter.phase([einsum]), [(einsum, access) for access in split]
        local, gathered = self._bytes(moved, Layout()), self._bytes(moved, Layout("context"))
        if len(split) > 1:
            yield self._pass(f"{kernel}.concatenate", phase, local, local)
        yield self._collective(f"{kernel}.all_gather", phase, "all_gather", gathered)
        yield self._pass(f"{kernel}.order_heads", phase, gathered, gathered)

    def gather_cache(self, kernel: str, einsum: Einsum) -> Iterator[Kernel]:
        """All ranks' parts of the contexts that `einsum` reads, unless they were gathered before; as attention takes
        them, no longer in the cache's own type. The step's new tokens are on every rank already."""
        phase = self.counter.phase([einsum])
        for rank in context_ranks(self.cascade, einsum.reads):
            caches = self._caches(rank)
            if caches and rank not in self.gathered:
                self.gathered.add(rank)
                size = sum(map(self._uncached, caches))
                context = Terms(keys=size, tokens=-size)
                yield self._collective(f"{kernel}.all_gather", phase, "all_gather", context)
                yield self._pass(f"{kernel}.order_keys", phase, context, context)

    def combine(self, kernel: str, einsum: Einsum) -> Iterator[Kernel]:
        """From the outputs of `einsum`, partial and of all heads that share a context, to whole ones of own heads."""
        rank, *others = context_ranks(self.cascade, einsum.reads)
        if others:
            einsum.fail(
                f"sums over {len(others) + 1} contexts ({', '.join([rank, *others])}); accepted with dcp = "
                f"{self.mesh.dcp}: one, as each part has a log-sum-exp of its own"
            )
        phase, output = self.counter.phase([einsum]), [(einsum, einsum.output)]
        own, partial = self._bytes(output, Layout()), self._bytes(output, Layout("context"))
        lse = self._log_sum_exps(einsum)
        if self.mesh.dcp_a2a:
            packed = _sum(partial, lse)
            yield self._pass(f"{kernel}.pack", phase, packed, packed)
            yield self._collective(f"{kernel}.all_to_all", phase, "all_to_all", packed)
            yield self._pass(f"{kernel}.unpack", phase, packed, own)
        else:
            everyone = Terms(*(self.mesh.dcp * size for size in lse))
            yield self._pass(f"{kernel}.order_lse", phase, lse, lse)
            yield self._collective(f"{kernel}.all_gather", phase, "all_gather", everyone)
            yield self._pass(f"{kernel}.scale", phase, everyone, partial, partial)
            yield self._pass(f"{kernel}.order_heads", phase, partial, partial)
            yield self._collective(f"{kernel}.reduce_scatter", phase, "reduce_scatter", partial)
            yield self._pass(f"{kernel}.order_tokens", phase, own, own)
        if phase == "all":
            fresh = Terms(tokens=sum(map(self._uncached, self._caches(rank))))
            yield self._pass(f"{kernel}.new_tokens", phase, self._bytes(self.queries[rank], Layout()), fresh, own)
            yield self._pass(f"{kernel}.merge", phase, own, own, own)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _caches(self, rank: str) -> list[tuple[Einsum, Access]]:
        """What the block caches of a context, each with an einsum that reads it."""
        found = {
            access.tensor: (einsum, access)
            for einsum in self.block.einsums
            for access in einsum.reads
            if self.cascade.kind(access.tensor) == "kv_cache" and rank in access.ranks
        }
        return list(found.values())

    def _uncached(self, read: tuple[Einsum, Access]) -> float:
        """Bytes of a token's keys or values outside of the cache."""
        einsum, access = read
        return self.counter.amount(einsum, access.ranks, Layout()).coefficient * self.counter.widths.activation

    def _log_sum_exps(self, einsum: Einsum) -> Terms:
        """One for each of the ranks that the scores have beside context."""
        scores = next(a for a in einsum.reads if context_ranks(self.cascade, [a]) and self._is_activation(a))
        ranks = [name for name in scores.ranks if self.cascade.ranks[name].bound != "context"]
        total = Sum()
        total.add(self.counter.amount(einsum, ranks, Layout("context")), LSE_BYTES)
        return total.terms()

    def _is_activation(self, access: Access) -> bool:
        return self.cascade.kind(access.tensor) == "activation"

    def _bytes(self, moved: Iterable[tuple[Einsum, Access]], layout: Layout) -> Terms:
        total = Sum()
        for einsum, access in moved:
            total.add(self.counter.amount(einsum, access.ranks, layout), self.counter.width(access))
        return total.terms()

    def _collective(self, name: str, phase: Phase, op: CollectiveOp, message: Terms) -> Kernel:
        shape = CollectiveShape(op, "dcp", self.mesh.dcp)
        kernel = Kernel(name, "collective", 1, activation_bytes=message, collective=shape)
        return replace(kernel, phase=phase, split_context=True)

    def _pass(self, name: str, phase: Phase, *moved: Terms) -> Kernel:
        return Kernel(name, "elementwise", 1, activation_bytes=_sum(*moved), phase=phase, split_context=True)


def context_ranks(cascade: Cascade, accesses: Iterable[Access]) -> list[str]:
    """Ranks bound to context."""
    ranks = dict.fromkeys(name for access in accesses for name in access.ranks)
    return [name for name in ranks if cascade.ranks[name].bound == "context"]


def query_makers(cascade: Cascade, block: Block) -> frozenset[int]:
    """Positions of the einsums that make a decode's queries to the cache, from the weights on that give them heads:
    what vLLM's `dcp_q_replicate` repeats on every rank, of latent attention only."""
    wanted: set[str] = set()
    found = set()
    for index, einsum in reversed(list(enumerate(block.einsums))):
        activations = [access for access in einsum.reads if cascade.kind(access.tensor) == "activation"]
        phases = {cascade.ranks[name].phase for name in context_ranks(cascade, einsum.reads)}
        if einsum.output.tensor in wanted:
            wanted.remove(einsum.output.tensor)
            found.add(index)
            wanted |= {a.tensor for a in activations if any(cascade.ranks[name].split for name in a.ranks)}
        elif phases == {"decode"} and not context_ranks(cascade, activations):
            wanted |= {access.tensor for access in activations}
    return frozenset(found)


def _sum(*terms: Terms) -> Terms:
    return Terms(*map(sum, zip(*terms, strict=True)))
