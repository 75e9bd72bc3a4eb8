"""The step model: kernels and a profile compiled into arrays, then any number of steps evaluated in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from energylens_vllm.einsum.kernel import Kernel, Mask, Terms
from energylens_vllm.energy.batch import Array, Attention, Steps
from energylens_vllm.energy.power import operate
from energylens_vllm.energy.precision import Format
from energylens_vllm.energy.timing import TILE_ROWS, Timed, expert_padded_rows, expert_tile_rows, roofline
from energylens_vllm.hardware.profile import GpuProfile

#: Compute-energy components, by kernel family.
_COMPUTE = {"linear": "linear", "attention": "attention", "experts": "experts"}
COMPONENTS = (
    "static", "linear", "attention", "experts", "weights", "kv_cache", "activations", "communication",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evaluated:
    """N steps of one GPU; every array has shape (N,). Components sum to `energy_j`; phases too."""

    time_s: Array
    energy_j: Array
    clock: Array
    host_bound: Array
    components: dict[str, Array]
    prefill_share: Array
    communication_s: Array


class _Work:
    """What one group of kernels adds up to: seconds and joules by component, each of shape (N,)."""

    __slots__ = ("clocked_s", "communication_s", "compute_j", "launches", "memory_j", "time_s")

    def __init__(self) -> None:
        self.time_s: Any = 0.0
        self.clocked_s: Any = 0.0
        self.communication_s: Any = 0.0
        self.launches = 0.0
        self.memory_j: dict[str, Any] = {}
        self.compute_j: dict[str, Any] = {}

    def add(self, count: float, timed: Timed) -> None:
        self.time_s = self.time_s + count * timed.time_s
        self.clocked_s = self.clocked_s + count * timed.clocked_s

    def memory(self, name: str, joules: Any) -> None:
        self.memory_j[name] = self.memory_j.get(name, 0.0) + joules

    def compute(self, name: str, joules: Any) -> None:
        self.compute_j[name] = self.compute_j.get(name, 0.0) + joules
