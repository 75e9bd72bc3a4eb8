"""How tokens reach the experts of other data-parallel ranks with DeepEP's kernels (vLLM's `all2all_backend`).

By default vLLM gathers the tokens of all ranks and scatters the sums: ordinary collectives. DeepEP's kernels send each
token only where its experts are, in a way of their own, and have times of their own (docs/collectives.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from energylens_vllm.einsum.kernel import ExpertShape, Kernel
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.collectives import Collectives, CollectiveTime
from energylens_vllm.errors import EnergyLensError

#: `all2all_backend` -> what its kernels are called in an interconnect's `expert_exchange`; "": plain collectives.
ALL2ALL_BACKENDS = {
    "allgather_reducescatter": "",
    "deepep_high_throughput": "high_throughput",
    "deepep_low_latency": "low_latency",
}
#: Relative standard deviation of steps with these kernels: their times were measured alone, no step with them was.
EXCHANGE_STD = 0.08


@dataclass(frozen=True, slots=True)
class _Sent:
    kernel: str  #: of an interconnect's `expert_exchange`
    experts: ExpertShape
    hidden: int
    token_bytes: float  #: of the collective's message, for each token of the data-parallel rank
    tokens: float  #: that a GPU sends, for each of them
    element_bytes: float  #: on the wire


class ExpertExchanges:
    """The dispatches and combines among one GPU's kernels.

    `fp8`: whether tokens are sent as the experts compute, in 8 bits; else in 16. Combined tokens always are.
    Raises EnergyLensError where DeepEP was not measured on the GPU.
    """

    def __init__(
        self, collectives: Collectives, kernels: Sequence[Kernel], backend: str, tensor_ranks: int, fp8: bool
    ) -> None:
        self._collectives = collectives
        self._sent: Mapping[Kernel, _Sent] = {}
        if not (kind := ALL2ALL_BACKENDS[backend]):
            return
        self._sent = dict(_exchanges(kernels, kind, tensor_ranks, fp8))
        node = collectives.interconnect
        if self._sent and not node.expert_exchange:
            raise EnergyLensError(
                f"all2all_backend: {backend!r} was not measured on {node.name}; accepted: allgather_reducescatter"
            )

    def __bool__(self) -> bool:
        return bool(self._sent)

    def timed(self, kernel: Kernel, message_bytes: Array) -> CollectiveTime | None:
        """Of one launch; None for a kernel that is an ordinary collective."""
        sent = self._sent.get(kernel)
        if sent is None:
            return None
        tokens = message_bytes / sent.token_bytes * sent.tokens
        shape = kernel.collective
        assert shape is not None
        return self._collectives.expert_exchange_s(
            sent.kernel, tokens, sent.hidden, sent.experts.selected, sent.experts.total, shape.size, sent.element_bytes
        )


def _exchanges(kernels: Sequence[Kernel], kind: str, tensor_ranks: int, fp8: bool) -> Iterator[tuple[Kernel, _Sent]]:
    """What is sent to experts comes before them, what they send back behind."""
    for index, kernel in enumerate(kernels):
        if kernel.collective is None or kernel.collective.op != "all_to_all":
            continue
        block = kernel.name.partition(".")[0]
        own = [
            (at, other)
            for at, other in enumerate(kernels)
            if other.experts is not None and other.stage == kernel.stage and other.name.partition(".")[0] == block
        ]
        first, experts = own[0]
        assert experts.gemm is not None
        assert experts.experts is not None
        dispatches = index < first
        yield (
            replace(kernel, stage=0),  # as a stage's step has it
            _Sent(
                kernel=f"{kind}_{'dispatch' if dispatches else 'combine'}",
                experts=experts.experts,
                hidden=experts.gemm.k,
                token_bytes=kernel.activation_bytes.tokens,
                tokens=1 / tensor_ranks,  # with tensor parallelism each GPU sends its part of the tokens
                element_bytes=1.0 if dispatches and fp8 else 2.0,
            ),
        )
