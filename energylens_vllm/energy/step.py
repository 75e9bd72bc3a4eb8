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


@dataclass(frozen=True, slots=True)
class Loads:
    """How many experts of this GPU a step of T tokens wakes, and how many (token, expert) rows reach it."""

    active: Array
    rows: Array


def uniform_loads(kernel: Kernel, tokens: Array) -> Loads:
    """Uniform routing: T tokens to k of E experts touch E (1 - (1 - k/E)^T) of them."""
    shape = kernel.experts
    assert shape is not None
    share = shape.selected / shape.total
    return Loads(shape.local * -np.expm1(tokens * np.log1p(-min(share, 1 - 1e-12))), tokens * share * shape.local)


def per_token(terms: Terms, tokens: Array, sampled: Array) -> Array:
    """`terms` of a kernel that no attention term touches."""
    value: Array = terms.constant + terms.tokens * tokens + terms.sampled * sampled
    return value


class CompiledStep:
    """The kernels of one GPU with the coefficients of its profile. `masks` is the order `Steps.attention` must have."""

    def __init__(
        self,
        kernels: Sequence[Kernel],
        profile: GpuProfile,
        form: Format | None,
        capture_sizes: Sequence[int],
        power_limit_w: float | None,
        loads: Callable[[Kernel, Array], Loads] = uniform_loads,
        collective: Callable[[Kernel, Array], tuple[Array, Array]] | None = None,
    ) -> None:
        self.profile, self.form, self.loads, self.collective = profile, form, loads, collective
        self.capture_sizes = np.array(sorted(capture_sizes), dtype=np.float64)
        self.limit_w = power_limit_w or profile["power.limit_w"]
        self.attention_kernels = [k for k in kernels if k.family == "attention"]
        self.sampled_kernels = [k for k in kernels if k.gemm is not None and k.gemm.rows == "sampled"]
        self.token_kernels = [
            k for k in kernels if k.family != "attention" and k not in self.sampled_kernels
        ]
        self.masks: tuple[Mask, ...] = tuple(
            dict.fromkeys(k.attention.mask for k in self.attention_kernels if k.attention is not None)
        )
        self.host_kernels = sum(k.count for k in kernels)

    def padded(self, tokens: Array) -> Array:
        """Tokens that kernels see: the next CUDA-graph size, or the tokens themselves beyond the largest."""
        if not len(self.capture_sizes):
            return tokens
        index = np.searchsorted(self.capture_sizes, tokens)
        largest = len(self.capture_sizes) - 1
        return np.where(index <= largest, self.capture_sizes[np.minimum(index, largest)], tokens)

    def evaluate(self, steps: Steps) -> Evaluated:
        """Time and energy of N steps on this GPU."""
        profile = self.profile
        tokens, inverse = np.unique(self.padded(steps.tokens), return_inverse=True)
        work = self._token_work(tokens)
        time_s, clocked_s = np.asarray(work.time_s)[inverse], np.asarray(work.clocked_s)[inverse]
        memory = {name: joules[inverse] for name, joules in work.memory_j.items()}
        compute = {name: joules[inverse] for name, joules in work.compute_j.items()}
        communication_s = (work.communication_s + np.zeros_like(tokens))[inverse]

        rest = self._sampled_work(steps.sequences)
        prefill = self._attention_work(rest, steps)
        time_s, clocked_s = time_s + rest.time_s, clocked_s + rest.clocked_s
        for name, joules in rest.memory_j.items():
            memory[name] = memory.get(name, 0.0) + joules
        for name, joules in rest.compute_j.items():
            compute[name] = compute.get(name, 0.0) + joules

        host_s = profile["host.step_s"] + profile["host.sequence_s"] * steps.sequences
        if not len(self.capture_sizes):
            host_s = host_s + profile["host.launch_s"] * self.host_kernels
        moved_j = sum(memory.values())
        on_chip = profile["energy.memory_core_share"]
        gpu = operate(
            time_s, clocked_s, (1 - on_chip) * moved_j, on_chip * moved_j + sum(compute.values()),
            profile["power.static_w"], profile["power.floor_w"], profile["power.voltage_floor"],
            self.limit_w * profile["power.limit_share"],
        )  # fmt: skip
        seconds = np.maximum(gpu.time_s, host_s)
        components = {name: joules * (1 - on_chip + on_chip * gpu.voltage_squared) for name, joules in memory.items()}
        components.update({name: joules * gpu.voltage_squared for name, joules in compute.items()})
        components["static"] = gpu.static_w * seconds
        energy = np.asarray(sum(components.values()))
        # A phase's share of the step: its tokens' share of what tokens share, its own attention.
        own = components.get("attention", 0.0) + components.get("kv_cache", 0.0)
        share = np.where(steps.tokens > 0, 1 - steps.decode_tokens / np.maximum(steps.tokens, 1), 0.0)
        prefill_share = (share * (energy - own) + prefill * own) / np.maximum(energy, 1e-30)
        return Evaluated(
            time_s=seconds, energy_j=energy, clock=np.asarray(gpu.clock), host_bound=host_s > gpu.time_s,
            components=components, prefill_share=prefill_share, communication_s=communication_s,
        )  # fmt: skip

    # -- the three groups of kernels ------------------------------------------------------------------------------

    def _token_work(self, tokens: Array) -> _Work:
        work = _Work()
        work.time_s = work.clocked_s = np.zeros_like(tokens)
        for kernel in self.token_kernels:
            if kernel.family == "linear":
                self._linear(work, kernel, tokens, per_token(kernel.activation_bytes, tokens, tokens))
            elif kernel.family == "experts":
                self._experts(work, kernel, tokens)
            elif kernel.family == "collective":
                self._collective(work, kernel, tokens)
            else:
                self._elementwise(work, kernel, per_token(kernel.activation_bytes, tokens, tokens))
        return work

    def _sampled_work(self, sampled: Array) -> _Work:
        work = _Work()
        work.time_s = work.clocked_s = np.zeros_like(sampled)
        for kernel in self.sampled_kernels:
            if kernel.family == "linear":
                self._linear(work, kernel, sampled, per_token(kernel.activation_bytes, sampled, sampled))
            elif kernel.family == "collective":
                self._collective(work, kernel, sampled)
        return work

    def _attention_work(self, work: _Work, steps: Steps) -> Array:
        """Add attention; return the prefill share of its joules (clock effects cancel within a step)."""
        prefill_j, total_j = np.zeros_like(steps.tokens), np.zeros_like(steps.tokens)
        for kernel in self.attention_kernels:
            assert kernel.attention is not None
            one = self._attention(work, kernel, steps, steps.attention[self.masks.index(kernel.attention.mask)])
            prefill_j, total_j = prefill_j + one[0], total_j + one[1]
        share: Array = prefill_j / np.maximum(total_j, 1e-30)
        return share

    # -- one kernel each ------------------------------------------------------------------------------------------

    def _hbm(self, activation_bytes: Array) -> Array:
        """Activation bytes that reach HBM: what fits the L2 cache stays there (a smooth corner at its size)."""
        cache = self.profile["memory.l2_bytes"]
        reached: Array = activation_bytes * activation_bytes / (activation_bytes + cache)
        return reached

    def _format(self, kernel: Kernel) -> str:
        return self.form.kernel if kernel.quantized and self.form is not None else "bfloat16"

    def _linear(self, work: _Work, kernel: Kernel, rows: Array, activation_bytes: Array) -> None:
        p, form = self.profile, self._format(kernel)
        flops = per_token(kernel.flops, rows, rows)
        moved = self._hbm(activation_bytes)
        name = f"linear.{form}"
        bandwidth = p["memory.bandwidth_bytes_per_s"] * p[f"{name}.memory_efficiency"]
        peak = p[f"compute.{form}.peak_flops"] * p[f"{name}.compute_efficiency"]
        tiles = np.maximum(rows, TILE_ROWS) / np.maximum(rows, 1)
        timed = roofline((kernel.weight_bytes + moved) / bandwidth, flops * tiles / peak, p[f"{name}.corner"])
        work.add(kernel.count, Timed(timed.time_s + p[f"{name}.launch_s"], timed.clocked_s))
        work.memory("weights", kernel.count * kernel.weight_bytes * p["energy.memory_j_per_byte"] + np.zeros_like(rows))
        work.memory("activations", kernel.count * moved * p["energy.memory_j_per_byte"])
        work.compute("linear", kernel.count * flops * p[f"energy.{form}.j_per_flop"])

    def _experts(self, work: _Work, kernel: Kernel, tokens: Array) -> None:
        p, form, shape = self.profile, self._format(kernel), kernel.experts
        assert shape is not None
        name = f"experts.{form}"
        loads = self.loads(kernel, tokens)
        weights = kernel.weight_bytes * loads.active / shape.local
        tile = expert_tile_rows(tokens)
        padding = expert_padded_rows(loads.rows, loads.active, tile) / np.maximum(loads.rows, 1e-9)
        flops = per_token(kernel.flops, tokens, tokens)
        moved = self._hbm(per_token(kernel.activation_bytes, tokens, tokens))
        bandwidth = p["memory.bandwidth_bytes_per_s"] * p[f"{name}.memory_efficiency"]
        peak = p[f"compute.{form}.peak_flops"] * p[f"{name}.compute_efficiency"]
        timed = roofline((weights + moved) / bandwidth, flops * padding / peak, p[f"{name}.corner"])
        launch = p[f"{name}.launch_s"] + p[f"{name}.token_s"] * tokens
        work.add(kernel.count, Timed(timed.time_s + launch, timed.clocked_s))
        work.memory("weights", kernel.count * weights * p["energy.memory_j_per_byte"])
        work.memory("activations", kernel.count * moved * p["energy.memory_j_per_byte"])
        work.compute("experts", kernel.count * flops * np.minimum(padding, 4.0) ** p["experts.padding_energy"]
                     * p[f"energy.{form}.j_per_flop"])  # fmt: skip

    def _elementwise(self, work: _Work, kernel: Kernel, activation_bytes: Array) -> None:
        p = self.profile
        moved = self._hbm(activation_bytes)
        time_s = p["elementwise.launch_s"] + moved / (
            p["memory.bandwidth_bytes_per_s"] * p["elementwise.memory_efficiency"]
        )
        work.add(kernel.count, Timed(time_s, np.zeros_like(time_s)))
        work.memory("activations", kernel.count * moved * p["energy.memory_j_per_byte"])

    def _attention(self, work: _Work, kernel: Kernel, steps: Steps, load: Attention) -> tuple[Array, Array]:
        p, shape = self.profile, kernel.attention
        assert shape is not None
        per_key, per_pair = kernel.kv_read_bytes.keys, kernel.flops.pairs
        bandwidth = p["memory.bandwidth_bytes_per_s"] * p["attention.decode.memory_efficiency"]
        has_decode = steps.decode_sequences > 0
        decode_s = np.where(has_decode, p["attention.decode.launch_s"], 0.0) + load.decode_keys * per_key / bandwidth
        decode_s = decode_s + steps.decode_sequences * (
            p["attention.decode.sequence_s"] + shape.kv_heads * p["attention.decode.sequence_head_s"]
        )
        peak = p["compute.bfloat16.peak_flops"] * p["attention.prefill.compute_efficiency"]
        prefill_tokens = steps.tokens - steps.decode_tokens
        # Whole tiles are computed: on the causal diagonal half of each 128 x 128 tile is wasted, 64 keys a query.
        tiled_pairs = load.prefill_pairs + 64.0 * prefill_tokens
        compute_s = tiled_pairs * per_pair / peak
        prefill_s = np.where(prefill_tokens > 0, p["attention.prefill.launch_s"], 0.0) + compute_s
        work.add(kernel.count, Timed(decode_s + prefill_s, compute_s))
        byte_j, flop_j = p["energy.memory_j_per_byte"], p["energy.attention.j_per_flop"]
        written = kernel.kv_write_bytes.tokens * steps.tokens
        # A prefill reads its own fresh keys from cache, not from HBM; earlier chunks' keys come from HBM.
        decode_kv = load.decode_keys * per_key
        prefill_kv = np.maximum(load.prefill_keys - prefill_tokens, 0.0) * per_key
        kv_j = kernel.count * byte_j * (decode_kv + prefill_kv + written)
        # A decode packs the query heads that share a KV head into one tile; its empty rows are computed all the same.
        packing = max(1.0, p["attention.decode.tile_rows"] / (shape.heads / shape.kv_heads))
        compute_j = kernel.count * flop_j * per_pair * (packing * load.decode_pairs + load.prefill_pairs)
        work.memory("kv_cache", kv_j)
        work.compute("attention", compute_j)
        prefill_j = kernel.count * (
            byte_j * (prefill_kv + kernel.kv_write_bytes.tokens * prefill_tokens) + flop_j * per_pair * load.prefill_pairs
        )
        return prefill_j, kv_j + compute_j

    def _collective(self, work: _Work, kernel: Kernel, rows: Array) -> None:
        if self.collective is None:
            return
        time_s, joules = self.collective(kernel, per_token(kernel.activation_bytes, rows, rows))
        work.add(kernel.count, Timed(time_s, np.zeros_like(time_s)))
        work.communication_s = work.communication_s + kernel.count * time_s
        work.memory("communication", kernel.count * joules)
