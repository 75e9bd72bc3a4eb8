"""Load what connects the GPUs of a node, and nodes: JSON beside the code, as for GPU profiles.

A collective's time is written as NCCL's own tuner writes it (NVIDIA/nccl, src/graph/tuning.cc): each path (an
algorithm with a protocol) costs a latency, more per further GPU, and seconds per byte; a library takes the path that is
fastest at the size. Fitted by benchmarks/fit_collectives.py; docs/collectives.md has the errors.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hardware.profile import Coefficient

INTERCONNECTS = pathlib.Path(__file__).parent / "interconnects"

WIRES = ("ring_all_reduce", "ring", "one_shot", "multicast", "point_to_point")


def wire_factor(wire: str, size: int) -> float:
    """Bytes that one of `size` GPUs sends over its links, per byte of the buffer."""
    if wire == "ring_all_reduce":
        return 2 * (size - 1) / size  # reduce-scatter, then all-gather
    if wire == "ring":
        return (size - 1) / size  # all-gather, reduce-scatter; an all-to-all sends as much
    if wire == "one_shot":
        return size - 1.0  # every GPU reads every other's whole buffer
    return 1.0  # the switch reduces and copies, or one GPU sends to one


@dataclass(frozen=True, slots=True)
class Path:
    """One algorithm and protocol: t = latency_s + hop_s (n - 1) + bytes (byte_s + wire_byte_s wire(n)).

    `bytes` is the buffer's size (see docs/collectives.md for each operation's), n the number of GPUs, wire(n) the
    factor of the kind `wire`. `byte_s` is the GPU's own pass over its buffer, `wire_byte_s` the link's time.
    Only for n >= `min_size`.
    """

    name: str
    wire: str
    latency_s: float
    hop_s: float = 0.0
    byte_s: float = 0.0
    wire_byte_s: float = 0.0
    min_size: int = 2

    def __post_init__(self) -> None:
        if self.wire not in WIRES:
            raise unknown(f"wire of path {self.name}", self.wire, WIRES)

    def wire_factor(self, size: int) -> float:
        """Bytes sent by one of `size` GPUs per byte of the buffer."""
        return wire_factor(self.wire, size)

    def fixed_s(self, size: int) -> float:
        """Seconds that an empty message takes among `size` GPUs."""
        return self.latency_s + self.hop_s * (size - 1)

    def slope_s(self, size: int) -> float:
        """Seconds per byte of the buffer among `size` GPUs."""
        return self.byte_s + self.wire_byte_s * self.wire_factor(size)


@dataclass(frozen=True, slots=True)
class Fit:
    """The paths that one operation of one library chooses among, where they were measured, and how well they fit.

    `std` is the root mean square of log(predicted / measured) on message sizes held out of the fit.
    """

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]  #: GPU counts measured; empty if none was
    max_bytes: float  #: largest buffer measured
    std: float
    source: str

    def usable(self, size: int) -> tuple[Path, ...]:
        """The paths that exist among `size` GPUs."""
        return tuple(path for path in self.paths if size >= path.min_size)


@dataclass(frozen=True, slots=True)
class ExpertExchange:
    """A DeepEP kernel inside a node, for T tokens a rank of `hidden` elements, k of E experts, n ranks.

    t = latency_s + expert_s E + T hidden (element_s + copy_s copies). `copies`: how many remote ranks a token goes to
    (high throughput sends one copy a rank) or k (low latency sends one an expert).
    """

    latency_s: float
    expert_s: float
    element_s: float
    copy_s: float
    element_bytes: float  #: on the wire (dispatch sends fp8, combine bfloat16)
    std: float
    max_tokens: float
    source: str


@dataclass(frozen=True)
class Interconnect:
    """Everything that collectives need of one kind of node.

    `fits`: library and operation ("nccl.all_gather", "one_shot", ...) to its `Fit`. `all_reduce`: for each chain of
    all-reduce backends and each GPU count, (fit, largest buffer in bytes it takes), in the order vLLM asks them; NCCL
    takes what is left. `measured` is False where nothing was fitted and physics stands in.
    """

    name: str
    link: str
    gpus_per_node: int
    measured: bool
    coefficients: Mapping[str, Coefficient]
    fits: Mapping[str, Fit]
    all_reduce: Mapping[str, Mapping[int, tuple[tuple[str, float], ...]]]
    expert_exchange: Mapping[str, ExpertExchange] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        try:
            return self.coefficients[name].value
        except KeyError:
            raise unknown(f"coefficient of interconnect {self.name}", name, self.coefficients) from None

    def with_values(self, values: Mapping[str, float], source: str) -> Interconnect:
        """A copy with some coefficients replaced (a fit on serving data); `source` says by whom."""
        changed = dict(self.coefficients)
        for name, value in values.items():
            self[name]  # refuses a name that does not exist
            changed[name] = replace(changed[name], value=float(value), source=source)
        return replace(self, coefficients=changed)

    def to_json(self) -> dict[str, Any]:
        """As it is stored in JSON, which `parse` reads."""
        return asdict(self)


def known_interconnects() -> list[str]:
    """GPU names whose node is described."""
    return sorted(path.stem for path in INTERCONNECTS.glob("*.json"))


def load_interconnect(gpu: str, nvlink: bool = True) -> Interconnect:
    """The interconnect of a node of `gpu`s.

    A GPU that is not described gets that of an H100 node (with NVLink) or an L40S node (without), marked as not
    measured, so that every prediction from it is wide and flagged.
    """
    if gpu in known_interconnects():
        return _read(INTERCONNECTS / f"{gpu}.json")
    stand_in = _read(INTERCONNECTS / f"{'H100-SXM' if nvlink else 'L40S'}.json")
    return replace(stand_in, name=gpu, measured=False)


@cache
def _read(path: pathlib.Path) -> Interconnect:
    try:
        return parse(json.loads(path.read_text()))
    except KeyError as error:
        raise EnergyLensError(f"interconnect {path}: field {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise EnergyLensError(f"interconnect {path}: {error}") from error


def parse(raw: Mapping[str, Any]) -> Interconnect:
    """An interconnect from its JSON. Raises KeyError, TypeError or ValueError where a field is wrong."""
    return Interconnect(
        name=str(raw["name"]),
        link=str(raw["link"]),
        gpus_per_node=int(raw["gpus_per_node"]),
        measured=bool(raw["measured"]),
        coefficients={
            str(name): Coefficient(float(c["value"]), float(c["std"]), str(c["unit"]), str(c["source"]))
            for name, c in raw["coefficients"].items()
        },
        fits={
            str(name): Fit(
                paths=tuple(Path(**path) for path in fit["paths"]),
                sizes=tuple(int(size) for size in fit["sizes"]),
                max_bytes=float(fit["max_bytes"]),
                std=float(fit["std"]),
                source=str(fit["source"]),
            )
            for name, fit in raw["fits"].items()
        },
        all_reduce={
            str(chain): {
                int(size): tuple((str(name), float(limit)) for name, limit in steps) for size, steps in by_size.items()
            }
            for chain, by_size in raw["all_reduce"].items()
        },
        expert_exchange={str(name): ExpertExchange(**fit) for name, fit in raw["expert_exchange"].items()},
    )
