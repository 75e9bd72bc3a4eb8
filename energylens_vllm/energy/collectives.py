"""Time and energy of collectives: which path vLLM or NCCL takes at a size, and what it costs one GPU.

Pure functions of the message size, vectorised; a `Curve` holds one operation among one number of GPUs as a few lines,
so evaluating it costs a handful of multiply-adds. docs/collectives.md defines the message of each operation, tells
where each number comes from and how far to believe it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from energylens_vllm.einsum.kernel import CollectiveOp, Kernel, reached
from energylens_vllm.energy.batch import Array
from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hardware.interconnect import Fit, Interconnect, load_interconnect, parse
from energylens_vllm.hardware.profile import GpuProfile

OPERATIONS: tuple[str, ...] = get_args(CollectiveOp)

#: Who answers an all-reduce; every other operation goes to NCCL.
#: "vllm": vLLM's custom kernels, then torch symmetric memory, then NCCL (the default to 0.31, and later without
#: FlashInfer); "flashinfer": FlashInfer's kernels first (on by default from 0.32); "nccl": NCCL alone.
BACKENDS = ("vllm", "flashinfer", "nccl")

# Relative standard deviations added in quadrature where no measurement stands behind a prediction. The first is what
# leaving a GPU count out of the fit costs (docs/collectives.md); the others are judgement, meant to be too wide.
OTHER_SIZE_STD = 0.15
OTHER_BYTES_STD = 0.10
NETWORK_STD = 0.40
UNMEASURED_STD = 0.50


class CollectiveTime(NamedTuple):
    """One launch, for each message; all of the messages' shape."""

    time_s: Array
    relative_std: Array  #: one standard deviation of the time, relative to it
    extrapolated: npt.NDArray[np.bool_]  #: no measurement at this GPU count, size or system
    wire_bytes: Array  #: bytes that one GPU sends over its links


class CollectiveEnergy(NamedTuple):
    """Joules of one launch on each participating GPU, above static power."""

    energy_j: Array
    relative_std: Array


@dataclass(frozen=True, slots=True)
class Curve:
    """One operation among a fixed number of GPUs with one backend: a line in the message's bytes for each range of it.

    Range i holds messages above `edges[i - 1]` and up to `edges[i]` bytes; the last edge is infinite. Shapes (R,).
    """

    edges: Array
    fixed_s: Array
    slope_s: Array
    wire: Array
    relative_std: Array
    extrapolated: npt.NDArray[np.bool_]

    def __call__(self, message_bytes: npt.ArrayLike) -> CollectiveTime:
        """Evaluate any number of messages."""
        size = np.asarray(message_bytes, dtype=np.float64)
        i = np.searchsorted(self.edges, size)
        return CollectiveTime(
            self.fixed_s[i] + self.slope_s[i] * size, self.relative_std[i], self.extrapolated[i], self.wire[i] * size
        )


@dataclass(frozen=True)
class Collectives:
    """The collectives of one kind of node."""

    interconnect: Interconnect
    _curves: dict[tuple[str, int, str], Curve] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, gpu: str, nvlink: bool = True) -> Collectives:
        """Those of a GPU by name. One that nobody measured gets a stand-in; all of it is flagged and wide."""
        return cls(load_interconnect(gpu, nvlink))

    @classmethod
    def of(cls, profile: GpuProfile) -> Collectives:
        """Those that a profile brings along as measured, or else those of its GPU."""
        if not profile.interconnect:
            return cls.load(profile.name, profile.nvlink)
        try:
            return cls(parse(profile.interconnect))
        except KeyError as error:
            raise EnergyLensError(f"profile {profile.name}: interconnect: {error.args[0]!r} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise EnergyLensError(f"profile {profile.name}: interconnect: {error}") from error

    def curve(self, op: str, size: int, backend: str = "vllm") -> Curve:
        """`op` among `size` GPUs. Raises EnergyLensError for an unknown operation, backend or an impossible size."""
        key = (op, size, backend)
        if key not in self._curves:
            self._curves[key] = _compile(self.interconnect, op, size, backend)
        return self._curves[key]

    def time_s(self, op: str, message_bytes: npt.ArrayLike, size: int, backend: str = "vllm") -> CollectiveTime:
        """Time of one launch of `op` among `size` GPUs, as the GPU sees it inside a CUDA graph."""
        return self.curve(op, size, backend)(message_bytes)

    def unmeasured_std(self, kernels: Iterable[Kernel]) -> float:
        """Relative standard deviation of the least known of the kernels' collectives that nobody measured with any
        message: other numbers of GPUs, or another system. 0 if there is none. What pipeline stages send is a sliver of
        a step, and left out."""
        shapes = {each.collective for each in kernels if each.collective is not None and each.collective.axis != "pp"}
        curves = [self.curve(shape.op, shape.size) for shape in shapes if shape.size > 1]
        return max((float(curve.relative_std[0]) for curve in curves if curve.extrapolated.all()), default=0.0)

    def energy_j(self, timed: CollectiveTime) -> CollectiveEnergy:
        """Joules on each participating GPU: the SMs that drive it over its time, and the bytes sent over the links.

        Static power runs beside it and is the step model's to add.
        """
        power, byte = (
            self.interconnect.coefficients[name] for name in ("communication_power_w", "energy_per_link_byte_j")
        )
        driven, moved = power.value * timed.time_s, byte.value * timed.wire_bytes
        joules = driven + moved
        spread = np.hypot(driven * np.hypot(power.std, timed.relative_std), moved * byte.std)
        return CollectiveEnergy(joules, np.divide(spread, joules, out=np.zeros_like(joules), where=joules > 0))

    def kernel(self, kernel: Kernel, payload_bytes: npt.ArrayLike, backend: str = "vllm") -> tuple[Array, Array]:
        """Seconds and joules of one launch of a collective kernel on one GPU, for each payload."""
        shape = kernel.collective
        if shape is None:
            raise EnergyLensError(f"kernel {kernel.name}: family {kernel.family!r} is not a collective")
        timed = self.time_s(shape.op, payload_bytes, shape.size, backend)
        return timed.time_s, self.energy_j(timed).energy_j

    def expert_exchange_s(
        self, kernel: str, tokens: npt.ArrayLike, hidden_size: int, selected: int, experts: int, size: int,
        element_bytes: float | None = None,
    ) -> CollectiveTime:  # fmt: skip
        """A DeepEP dispatch or combine of `tokens` a rank, each to `selected` of `experts` over `size` ranks.

        `kernel`: "high_throughput_dispatch", "high_throughput_combine", "low_latency_dispatch" or
        "low_latency_combine". Beyond one node a token's copies cross the network once a node (high throughput) or
        once an expert (low latency). Measured inside nodes of 8 GPUs under uniform routing. `element_bytes`: on the
        wire, if others than were measured (1 in dispatches, 2 in combines): bytes take time in proportion.
        """
        node = self.interconnect
        if kernel not in node.expert_exchange:
            raise unknown("kernel", kernel, node.expert_exchange, f"(of {node.name})")
        fit = node.expert_exchange[kernel]
        count = np.asarray(tokens, dtype=np.float64)
        throughput = kernel.startswith("high_throughput")
        remote = 1 - 1 / size
        copies = remote * size * reached(selected, experts, experts // size) if throughput else float(selected)
        wire = fit.element_bytes if element_bytes is None else element_bytes
        sent = count * hidden_size * (fit.element_s + fit.copy_s * copies) * (wire / fit.element_bytes)
        time_s = fit.latency_s + fit.expert_s * experts + sent
        nodes = math.ceil(size / node.gpus_per_node)
        crossing = 0.0
        if nodes > 1:
            to_nodes = nodes * reached(selected, experts, experts // nodes) if throughput else float(selected)
            crossing = (1 - 1 / nodes) * to_nodes
            network_s = count * hidden_size * wire * crossing / node["network_bandwidth_bytes_per_s"]
            time_s = np.maximum(time_s, network_s) + node["network_hop_s"]
        outside = count > fit.max_tokens
        std = math.hypot(fit.std, NETWORK_STD if nodes > 1 else OTHER_SIZE_STD if size != node.gpus_per_node else 0.0)
        std = math.hypot(std, 0.0 if node.measured else UNMEASURED_STD)
        return CollectiveTime(
            time_s,
            np.where(outside, math.hypot(std, OTHER_BYTES_STD), std),
            outside | (size != node.gpus_per_node) | (not node.measured),
            count * hidden_size * wire * copies,
        )


class _Range(NamedTuple):
    edge: float
    fixed_s: float
    slope_s: float
    wire: float
    relative_std: float
    extrapolated: bool


def _compile(node: Interconnect, op: str, size: int, backend: str) -> Curve:
    if op not in OPERATIONS:
        raise unknown("collective", op, OPERATIONS)
    if backend not in BACKENDS:
        raise unknown("collective backend", backend, BACKENDS)
    if not isinstance(size, int) or size < 1:
        raise EnergyLensError(f"size: {size!r} is not a number of GPUs; accepted: 1 or more")
    ranges: list[_Range] = []
    if size == 1:
        ranges.append(_Range(math.inf, 0.0, 0.0, 0.0, 0.0, False))
    else:
        chain: Sequence[tuple[str, float]] = ()
        if op == "all_reduce" and size <= node.gpus_per_node:
            chain = node.all_reduce.get(backend, {}).get(size, ())
        low = 0.0
        for name, limit in (*chain, (f"nccl.{op}", math.inf)):
            ranges += _ranges(node, node.fits[name], op, size, low, limit)
            low = limit
    edge, fixed_s, slope_s, wire, std, extrapolated = (np.array(column) for column in zip(*ranges, strict=True))
    return Curve(edge, fixed_s, slope_s, wire, std, extrapolated)


def _ranges(node: Interconnect, fit: Fit, op: str, size: int, low: float, high: float) -> list[_Range]:
    """The fastest of a library's paths at each message above `low` and up to `high` bytes."""
    std, measured_bytes = fit.std, fit.max_bytes
    if not node.measured or size not in fit.sizes:
        measured_bytes = -1.0
    if not node.measured:
        std = math.hypot(std, UNMEASURED_STD)
    network_s, network_byte_s = 0.0, 0.0
    if size > node.gpus_per_node:
        network_s, network_byte_s = _network(node, op, size)
        std = math.hypot(std, NETWORK_STD)
    elif size not in fit.sizes:
        std = math.hypot(std, OTHER_SIZE_STD)

    link = node["link_bandwidth_bytes_per_s"]  # no path sends faster, however far it is extrapolated
    lines = [
        (path.fixed_s(size), max(path.slope_s(size), path.wire_factor(size) / link), path.wire_factor(size))
        for path in fit.usable(size)
    ]
    slowest = (0.0, network_byte_s, lines[-1][2])  # what the adapters need at least
    cuts = {measured_bytes, *(_crossing(a, b) for a, b in itertools.combinations([*lines, slowest], 2))}
    bounds = [low, *sorted(cut for cut in cuts if low < cut < high), high]
    ranges = []
    for start, end in itertools.pairwise(bounds):
        inside = 2 * start + 1 if math.isinf(end) else (start + end) / 2
        fixed_s, slope_s, wire = min(lines, key=lambda line: line[0] + line[1] * inside)
        if network_byte_s * inside > fixed_s + slope_s * inside:
            fixed_s, slope_s = slowest[:2]
        outside = inside > measured_bytes
        spread = math.hypot(std, OTHER_BYTES_STD) if inside > fit.max_bytes else std
        ranges.append(_Range(end, fixed_s + network_s, slope_s, wire, spread, outside))
    return ranges


def _crossing(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return (b[0] - a[0]) / (a[1] - b[1]) if a[1] != b[1] else -1.0


def _network(node: Interconnect, op: str, size: int) -> tuple[float, float]:
    """Seconds that steps between nodes add, and seconds per byte that the adapters need at least.

    Rings cross each node's boundary once, spread over the node's adapters (one a GPU); an all-to-all sends every byte
    that leaves the node over the GPU's own adapter. Steps between nodes: NVIDIA/nccl, src/graph/tuning.cc.
    """
    inside, nodes = node.gpus_per_node, math.ceil(size / node.gpus_per_node)
    if op == "all_to_all":
        hops, crossing = nodes - 1, 1 - inside / size
    elif op == "send_recv":
        hops, crossing = 1, 1.0
    elif op == "all_reduce":
        hops, crossing = 2 * (nodes - 1), 2 * (size - 1) / size / inside
    else:
        hops, crossing = nodes - 1, (size - 1) / size / inside
    return hops * node["network_hop_s"], crossing / node["network_bandwidth_bytes_per_s"]
