"""The step model of GPUs: kernels and a profile, and any number of steps evaluated in closed form.

Work that depends on the tokens of a step alone (linear layers, experts, elementwise kernels, collectives) is evaluated
once for each different number of tokens; attention is evaluated for each step. Pipeline stages launch the same kernels,
only not as often, so one launch is evaluated for all stages. Then `power.operate` finds each stage's clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np

from energylens_vllm.einsum.kernel import Kernel, Mask, Mesh, Phase, Terms
from energylens_vllm.energy import kernel_time
from energylens_vllm.energy.batch import Array, Attention, Integers, Steps
from energylens_vllm.energy.factors import Factors
from energylens_vllm.energy.power import Power, operate
from energylens_vllm.energy.precision import Format, kernel_format
from energylens_vllm.energy.routing_load import RankLoads
from energylens_vllm.energy.timing import Timed
from energylens_vllm.hardware.profile import GpuProfile

#: What joules are spent on; those of a step sum to its energy.
COMPONENTS = (
    "static", "linear", "attention", "experts", "weights", "kv_cache", "activations", "communication", "host_gap",
)  # fmt: skip


class Alike(NamedTuple):
    """Kernels that each stage launches equally often."""

    counts: Array  #: launches of each in a step, of shape (S, 1)
    kernels: list[Kernel]


class Exchanged(NamedTuple):
    """A collective's seconds and joules on one GPU, for each message size."""

    time_s: Array
    energy_j: Array


@dataclass(frozen=True, slots=True)
class Evaluated:
    """N steps of a GPU of each of S unlike pipeline stages; every array has shape (S, N), `serial_s` (N,).

    `gpu_s` is how long its kernels take at `clock` (relative to the top clock); `host_s` how long the host needs to
    launch them, beside the GPU; `serial_s` the host's work between steps, in which the GPU waits. Components (without
    static power) sum to the energy above static; `prefill_share` is prefill's part.
    """

    gpu_s: Array
    host_s: Array
    serial_s: Array
    clock: Array
    static_w: Array
    components: dict[str, Array]
    prefill_share: Array
    communication_s: Array
    waiting_s: Array  #: of `gpu_s`, time in which the mean rank waits for the one with the hottest experts
    padding_j: Array  #: of the experts' arithmetic, what rows cost that only fill tiles up


class Work:
    """Seconds and joules that kernels add up to: of one launch each of one shape (N,), of S stages of (S, N)."""

    def __init__(self, like: Array) -> None:
        self.nothing = nothing = np.zeros_like(like)  # one for all: sums make new arrays
        self.time_s = self.clocked_s = self.communication_s = self.waiting_s = self.padding_j = nothing
        self.memory_j: dict[str, Array] = {}  #: HBM and links; only a share of it follows the core voltage
        self.core_j: dict[str, Array] = {}  #: arithmetic; follows the core voltage

    def run(self, timed: Timed) -> None:
        self.time_s = self.time_s + timed.time_s
        self.clocked_s = self.clocked_s + timed.clocked_s

    def spend(self, into: dict[str, Array], name: str, joules: Array) -> None:
        into[name] = into[name] + joules if name in into else joules

    def add(self, counts: Array, launch: Work) -> None:
        """Add `launch` as often as each stage has it; `counts` is of shape (S, 1)."""
        self._add(launch, lambda values: counts * values)

    def take(self, other: Work, index: Integers) -> None:
        """Add `other`, whose entry index[i] belongs to step i."""
        self._add(other, lambda values: np.take(values, index, axis=-1))

    def _add(self, other: Work, made: Callable[[Array], Array]) -> None:
        for name in ("time_s", "clocked_s", "communication_s", "waiting_s", "padding_j"):
            if (values := getattr(other, name)) is not other.nothing:
                setattr(self, name, getattr(self, name) + made(values))
        for mine, theirs in ((self.memory_j, other.memory_j), (self.core_j, other.core_j)):
            for name, joules in theirs.items():
                self.spend(mine, name, made(joules))


def per_token(terms: Terms, rows: Array) -> Array:
    """`terms` of a kernel that sees `rows` tokens, or as many sampled rows, or as many keys that are no new tokens."""
    value: Array = terms.constant + (terms.keys or terms.tokens + terms.sampled) * rows
    return value


class GpuStep:
    """A GPU of each of S unlike pipeline stages, of which `stages` has the kernels. `masks` is the order that
    `Steps.attention` must have.

    `loads` gives the experts' loads of a kernel for a number of tokens (needed with expert kernels), `collective` the
    cost of a collective kernel for message sizes (needed with collectives). `mesh` says what kernels do not: of each
    step the GPU has one of pcp parts, and which hosts work for an engine.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Kernel]],
        masks: Sequence[Mask],
        profile: GpuProfile,
        form: Format | None,
        capture_sizes: Sequence[int],
        power_limit_w: float | None = None,
        async_scheduling: bool = True,
        kv_cache_bytes: float = 2.0,
        loads: Callable[[Kernel, Array], RankLoads] | None = None,
        collective: Callable[[Kernel, Array], Exchanged] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.profile, self.form, self.loads, self.collective = profile, form, loads, collective
        self.masks, self.stages, mesh = tuple(masks), len(stages), mesh or Mesh()
        self.token_parts = mesh.pcp
        self.decode_kernel = "attention.decode" if kv_cache_bytes > 1 else "attention.decode_fp8"
        self.capture_sizes = np.array(sorted(capture_sizes), dtype=np.float64)
        launches: dict[Kernel, list[int]] = {}
        for index, kernels in enumerate(stages):
            for kernel in kernels:
                launches.setdefault(replace(kernel, stage=0, count=1), [0] * self.stages)[index] += kernel.count
        # How often each stage launches a kernel, of shape (S, 1); the kernel's own count is the largest of them.
        counts = {
            replace(kernel, count=max(each)): np.array(each, dtype=np.float64)[:, None]
            for kernel, each in launches.items()
        }
        attention = [k for k in counts if k.attention is not None]
        rest = [k for k in counts if k.attention is None]
        by_keys = [k for k in rest if k.gemm is not None and k.gemm.rows == "keys"]
        by_rows = [k for k in rest if _is_sampled(k)]
        elsewhere = {*by_keys, *by_rows}
        of_phase = {phase: [k for k in rest if k.phase == phase and k not in elsewhere] for phase in get_args(Phase)}
        beside = {phase: [k for k in of if k.split_context] for phase, of in of_phase.items()}
        self.attention, self.by_keys, self.by_rows = (_alike(each, counts) for each in (attention, by_keys, by_rows))
        self.by_tokens = {
            phase: _alike([k for k in of if not k.split_context], counts) for phase, of in of_phase.items()
        }
        self.beside_attention = {phase: _alike(of, counts) for phase, of in beside.items()}
        #: seconds in which the host launches what CUDA graphs would replay: attention, which only full graphs (pure
        #: decodes) hold, and everything else
        none = np.zeros((self.stages, 1))
        self.attention_launch_s = profile["host.attention_s"] * sum((counts[k] for k in attention), none)
        self.beside_launch_s = {
            phase: profile["host.launch_s"] * sum((counts[k] for k in of), none) for phase, of in beside.items() if of
        }
        self.other_launch_s = sum(
            (
                counts[k] * profile["host.experts_s" if k.family == "experts" else "host.launch_s"]
                for k in rest
                if not k.split_context
            ),
            none,
        )
        #: whether each GPU's worker is a process of its own, as the executors for several GPUs have it
        self.worker_processes = mesh.tp * mesh.pcp * mesh.pp > 1
        #: what workers of pipeline stages take for messages to each other, be the stages alike or not
        self.messages_s = profile["host.pipeline_s"] if mesh.pp > 1 else 0.0
        #: host work between steps, for each step and for each of its requests
        hidden = async_scheduling and not (profile.eager_contexts and self.beside_attention["all"])
        self.serial_s = (0.0, 0.0) if hidden else (profile["host.serial_s"], profile["host.serial_request_s"])
        self.power = self.rated = Power(
            static_w=profile["power.static_w"],
            floor_w=profile["power.floor_w"],
            voltage_floor=profile["power.voltage_floor"],
            limit_w=(power_limit_w or profile["power.limit_w"]) * profile["power.limit_share"],
        )
        self.factors = Factors()

    def with_factors(self, factors: Factors) -> GpuStep:
        """The same GPU with other factors than now on what the profile says."""
        other, rated = copy.copy(self), self.rated
        other.factors = factors
        other.power = replace(
            rated,
            static_w=rated.static_w * factors.static,
            floor_w=rated.floor_w * factors.static,
            limit_w=rated.limit_w * factors.limit,
        )
        return other

    def padded(self, tokens: Array) -> Array:
        """Tokens that kernels see: the next CUDA-graph size, or the tokens themselves beyond the largest."""
        if not len(self.capture_sizes):
            return tokens
        index = np.searchsorted(self.capture_sizes, tokens)
        largest = len(self.capture_sizes) - 1
        return np.where(index <= largest, self.capture_sizes[np.minimum(index, largest)], tokens)

    def evaluate(self, steps: Steps) -> Evaluated:
        """Time and energy of N steps on a GPU of each stage."""
        p = self.profile
        prefill_tokens = steps.tokens - steps.decode_tokens
        work, prefill_j = self._work(steps)
        if not self.factors.is_neutral():
            prefill_j = self._apply_factors(work, prefill_j)
        on_chip = p["energy.memory_core_share"]
        memory_j, core_j = _sum(work.memory_j, work.time_s), _sum(work.core_j, work.time_s)
        at = operate(self.power, work.time_s, work.clocked_s, (1 - on_chip) * memory_j, on_chip * memory_j + core_j)
        memory_factor = 1 - on_chip + on_chip * at.voltage_squared
        components = {name: joules * memory_factor for name, joules in work.memory_j.items()}
        for name, joules in work.core_j.items():
            components[name] = joules * at.voltage_squared

        host_s = self._host_s(steps, prefill_tokens)
        # A phase's part: its tokens' share of what all tokens share, and its own attention.
        total_j, own_j = memory_j + core_j, _own_j(work)
        shared = np.divide(prefill_tokens, steps.tokens, out=np.zeros_like(total_j), where=steps.tokens > 0)
        prefill_share = (shared * (total_j - own_j) + prefill_j) / np.maximum(total_j, 1e-30)
        return Evaluated(
            gpu_s=at.time_s,
            host_s=host_s,
            serial_s=self.serial_s[0] + self.serial_s[1] * steps.sequences,
            clock=at.clock,
            static_w=at.static_w,
            components=components,
            prefill_share=prefill_share,
            communication_s=work.communication_s,
            waiting_s=work.waiting_s,
            padding_j=work.padding_j * at.voltage_squared,
        )

    def _apply_factors(self, work: Work, prefill_j: Array) -> Array:
        """Multiply `work`'s joules by the factors; returns the joules of prefill's attention, which keep their part."""
        factors, before_j = self.factors, _own_j(work)
        for name in work.memory_j:
            work.memory_j[name] = work.memory_j[name] * (
                factors.communication if name == "communication" else factors.memory
            )
        for name in work.core_j:
            work.core_j[name] = work.core_j[name] * factors.compute
        work.padding_j = work.padding_j * factors.compute
        return np.divide(prefill_j * _own_j(work), before_j, out=np.zeros_like(before_j), where=before_j > 0)

    def _work(self, steps: Steps) -> tuple[Work, Array]:
        """All kernels' seconds and joules at the top clock, and the joules of prefill's attention."""
        work = Work(np.zeros((self.stages, len(steps))))
        self._add_rows(work, self.by_rows, steps.sequences)  # of which every rank has all
        steps = steps.chunked(self.token_parts) if self.token_parts > 1 else steps
        prefill_tokens = steps.tokens - steps.decode_tokens
        self._add_rows(work, self.by_tokens["all"], self.padded(steps.tokens))
        self._add_rows(work, self.by_tokens["prefill"], prefill_tokens)
        self._add_rows(work, self.by_tokens["decode"], steps.decode_tokens)
        for phase in self.beside_launch_s:
            self._add_rows(work, self.beside_attention[phase], self._rows_beside(steps, phase))
        return work, self._add_attention(work, steps, prefill_tokens)

    def _rows_beside(self, steps: Steps, phase: Phase) -> Array:
        """What the kernels beside attention over split contexts see: of prefills alone it is the contexts that they
        have already, else tokens."""
        if phase == "decode":
            return steps.decode_tokens
        context = steps.attention[0].prefill_keys - (steps.tokens - steps.decode_tokens)
        if phase == "prefill":
            return np.asarray(context)
        some = (steps.decode_tokens + context > 0) | self.profile.eager_contexts
        return np.where(some, self.padded(steps.tokens), 0.0)

    def _host_s(self, steps: Steps, prefill_tokens: Array) -> Array:
        """Seconds that the host needs for each step; it works on one while the GPU runs the one before.

        The engine schedules and hands out tokens; a GPU's worker prepares inputs and launches kernels. On one GPU vLLM
        runs both in one Python process, so their times add up; on several each worker is a process of its own. Workers
        of pipeline stages also exchange tensors, described by messages between their hosts, and the sampled tokens.
        """
        p = self.profile
        requests_s = (
            p["host.step_s"]
            + p["host.sequence_s"] * steps.decode_sequences
            + p["host.prompt_s"] * (steps.sequences - steps.decode_sequences)
        )
        uncaptured = steps.tokens > self.token_parts * (self.capture_sizes[-1] if len(self.capture_sizes) else 0.0)
        launches_s = np.where(uncaptured, self.other_launch_s, 0.0)
        in_graph = ~uncaptured & (prefill_tokens == 0)
        launches_s = launches_s + np.where(in_graph, 0.0, self.attention_launch_s)
        for phase, launch_s in self.beside_launch_s.items():
            launches_s = launches_s + np.where(in_graph | (self._rows_beside(steps, phase) == 0), 0.0, launch_s)
        if not self.worker_processes:
            return np.asarray(requests_s + launches_s)
        engine_s = p["host.engine_share"] * requests_s
        worker_s = requests_s - engine_s + launches_s + self.messages_s
        return np.asarray(np.maximum(engine_s, worker_s))

    # -- groups of kernels ----------------------------------------------------------------------------------------

    def _add_rows(self, work: Work, kernels: Sequence[Alike], rows: Array) -> None:
        """Add kernels that depend on a number of rows alone, evaluated once for each different number of rows."""
        if not kernels or not rows.size:
            return
        different, index = _different(rows)
        group = Work(different)
        for counts, alike in kernels:
            launch = Work(different)
            self._add_kernels(launch, alike, different)
            group.add(counts, launch)
        if different[0] == 0:  # nothing is launched for no rows
            group.time_s[..., 0] = group.clocked_s[..., 0] = group.communication_s[..., 0] = 0.0
            group.waiting_s[..., 0] = group.padding_j[..., 0] = 0.0
            for joules in (*group.memory_j.values(), *group.core_j.values()):
                joules[..., 0] = 0.0
        work.take(group, index)

    def _add_kernels(self, work: Work, kernels: Sequence[Kernel], rows: Array) -> None:
        """Add one launch of each, in the order in which they run."""
        for kernel in kernels:
            self._add_kernel(work, kernel, rows)

    def _add_kernel(self, work: Work, kernel: Kernel, rows: Array) -> None:
        if kernel.family == "linear":
            flops, activation_bytes = per_token(kernel.flops, rows), per_token(kernel.activation_bytes, rows)
            self._add_linear(work, kernel, rows, flops, activation_bytes)
        elif kernel.family == "experts":
            self._add_experts(work, kernel, rows)
        elif kernel.family == "collective":
            self._add_collective(work, kernel, rows)
        else:
            self._add_elementwise(work, kernel, rows)

    def _add_attention(self, work: Work, steps: Steps, prefill_tokens: Array) -> Array:
        """Add attention; returns the joules of it that prefill takes."""
        prefill_j = np.zeros_like(steps.tokens)
        for counts, alike in self.attention:
            launch, own_j = Work(steps.tokens), np.zeros_like(steps.tokens)
            for kernel in alike:
                assert kernel.attention is not None
                load = steps.attention[self.masks.index(kernel.attention.mask)]
                if kernel.phase != "decode":
                    own_j = own_j + self._add_prefill_attention(launch, kernel, load, steps)
                if kernel.phase != "prefill":
                    self._add_decode_attention(launch, kernel, steps, load)
            work.add(counts, launch)
            prefill_j = prefill_j + counts * own_j
        for counts, alike in self.by_keys:  # up-projection of all cached latents (MLA), for prefill
            keys, launch = steps.attention[0].prefill_keys, Work(steps.tokens)
            for kernel in alike:
                self._add_linear(launch, kernel, keys, kernel.flops.keys * keys, kernel.activation_bytes.keys * keys)
            work.add(counts, launch)
        return prefill_j

    # -- one launch each ------------------------------------------------------------------------------------------

    def _hbm(self, activation_bytes: Array) -> Array:
        """Activation bytes that reach HBM: what fits the L2 cache stays there (a smooth corner at its size)."""
        cache = self.profile["memory.l2_bytes"]
        reached: Array = activation_bytes * activation_bytes / (activation_bytes + cache)
        return reached

    def _add_linear(self, work: Work, kernel: Kernel, rows: Array, flops: Array, activation_bytes: Array) -> None:
        p, form = self.profile, kernel_format(self.form, kernel)
        assert kernel.gemm is not None
        moved = self._hbm(activation_bytes)
        work.run(kernel_time.linear(p, form, kernel, rows, flops, moved))
        byte_j = p["energy.memory_j_per_byte"]
        work.spend(work.memory_j, "weights", np.where(rows > 0, byte_j * kernel.weight_bytes, 0.0))
        work.spend(work.memory_j, "activations", byte_j * moved)
        work.spend(work.core_j, "linear", p[f"energy.{form}.j_per_flop"] * flops)

    def _add_experts(self, work: Work, kernel: Kernel, tokens: Array) -> None:
        p, form, shape = self.profile, kernel_format(self.form, kernel), kernel.experts
        assert shape is not None
        assert self.loads is not None
        loads = self.loads(kernel, tokens)
        moved = self._hbm(per_token(kernel.activation_bytes, tokens))
        choices = loads.rows * shape.total / shape.local  # (token, expert) pairs that the kernel is shown
        # An empty row of a tile costs a share of a full one's energy: zeros toggle few wires.
        empty_share, contiguous = p["experts.padding_energy_share"], p.contiguous_experts and form.startswith("fp8")
        if contiguous:
            rows = kernel_time.contiguous_rows(choices, shape.local)
            loads = loads._replace(padded_rows=rows, hottest_padded_rows=rows)
            moved = self._hbm(kernel_time.contiguous_bytes(kernel, rows))
            empty_share = 1.0  # rows that nobody wrote hold what earlier steps left there, not zeros
        hottest, mean = (
            kernel_time.experts(p, form, kernel, choices, active, padded_rows, moved, contiguous)
            for active, padded_rows in (
                (loads.hottest_active, loads.hottest_padded_rows),
                (loads.active, loads.padded_rows),
            )
        )
        work.run(hottest)
        work.waiting_s = work.waiting_s + (hottest.time_s - mean.time_s)
        weights = kernel.weight_bytes * loads.active / shape.local
        flops_per_row: Array = np.divide(
            per_token(kernel.flops, tokens), loads.rows, out=np.zeros_like(tokens), where=loads.rows > 0
        )
        wasted = empty_share * np.maximum(loads.padded_rows - loads.rows, 0.0)
        byte_j = p["energy.memory_j_per_byte"]
        work.spend(work.memory_j, "weights", byte_j * weights)
        work.spend(work.memory_j, "activations", byte_j * moved)
        row_j = p[f"energy.{form}.j_per_flop"] * flops_per_row
        work.padding_j = work.padding_j + row_j * wasted
        work.spend(work.core_j, "experts", row_j * (loads.rows + wasted))

    def _add_elementwise(self, work: Work, kernel: Kernel, rows: Array) -> None:
        moved = self._hbm(per_token(kernel.activation_bytes, rows))
        work.run(kernel_time.elementwise(self.profile, moved))
        work.spend(work.memory_j, "activations", self.profile["energy.memory_j_per_byte"] * moved)

    def _add_decode_attention(self, work: Work, kernel: Kernel, steps: Steps, load: Attention) -> None:
        p, shape = self.profile, kernel.attention
        assert shape is not None
        self._add_scores(work, kernel, load.decode_pairs)
        read = load.decode_keys * kernel.kv_read_bytes.keys
        work.run(
            kernel_time.attention_decode(
                p, self.decode_kernel, shape, steps.decode_sequences, load.decode_keys, kernel.kv_read_bytes.keys
            )
        )
        written = kernel.kv_write_bytes.tokens * steps.decode_tokens
        work.spend(work.memory_j, "kv_cache", p["energy.memory_j_per_byte"] * (read + written))
        # The query heads that share a KV head fill one tile; its empty rows are computed all the same.
        packing = max(1.0, p["attention.decode.tile_rows"] / (shape.heads / shape.kv_heads))
        flop_j = p["energy.attention.j_per_flop"] * kernel.flops.pairs * packing
        work.spend(work.core_j, "attention", flop_j * load.decode_pairs)

    def _add_prefill_attention(self, work: Work, kernel: Kernel, load: Attention, steps: Steps) -> Array:
        """Add it; returns its joules."""
        p, shape = self.profile, kernel.attention
        assert shape is not None
        self._add_scores(work, kernel, load.prefill_pairs)
        tokens, sequences = steps.tokens - steps.decode_tokens, steps.sequences - steps.decode_sequences
        # A prefill reads its own fresh keys from cache; the keys of earlier chunks come from HBM.
        earlier = np.maximum(load.prefill_keys - tokens, 0.0) * kernel.kv_read_bytes.keys
        work.run(
            kernel_time.attention_prefill(p, shape, sequences, tokens, load.prefill_pairs, kernel.flops.pairs, earlier)
        )
        memory_j = p["energy.memory_j_per_byte"] * (earlier + kernel.kv_write_bytes.tokens * tokens)
        core_j = p["energy.attention.j_per_flop"] * kernel.flops.pairs * load.prefill_pairs
        work.spend(work.memory_j, "kv_cache", memory_j)
        work.spend(work.core_j, "attention", core_j)
        return np.asarray(memory_j + core_j)

    def _add_scores(self, work: Work, kernel: Kernel, pairs: Array) -> None:
        """Scores that an attention kernel passes through HBM, as one taken apart does; a fused one has none."""
        if kernel.activation_bytes.pairs:
            moved = self._hbm(kernel.activation_bytes.pairs * pairs)
            p = self.profile
            seconds = moved / (p["memory.bandwidth_bytes_per_s"] * p["elementwise.memory_efficiency"])
            work.run(Timed(seconds, np.zeros_like(pairs)))
            work.spend(work.memory_j, "activations", p["energy.memory_j_per_byte"] * moved)

    def _add_collective(self, work: Work, kernel: Kernel, rows: Array) -> None:
        assert self.collective is not None
        cost = self.collective(kernel, per_token(kernel.activation_bytes, rows))
        work.run(Timed(cost.time_s, np.zeros_like(rows)))
        work.communication_s = work.communication_s + cost.time_s
        work.spend(work.memory_j, "communication", cost.energy_j)


#: Whole numbers up to this are told apart by a table, which takes no sorting.
_TABLE = 1 << 17


def _different(rows: Array) -> tuple[Array, Integers]:
    """The different values, in order, and of each row which one it is: `np.unique`, faster for token counts."""
    whole = rows.astype(np.int64)
    if len(rows) < 256 or whole.max() >= _TABLE or not np.array_equal(whole, rows):
        return np.unique(rows, return_inverse=True)
    present = np.zeros(int(whole.max()) + 1, dtype=bool)
    present[whole] = True
    return np.flatnonzero(present).astype(np.float64), (np.cumsum(present) - 1)[whole]


def _alike(kernels: Iterable[Kernel], counts: Mapping[Kernel, Array]) -> list[Alike]:
    """The kernels by how often each stage launches them, in order."""
    groups: dict[bytes, Alike] = {}
    for kernel in kernels:
        groups.setdefault(counts[kernel].tobytes(), Alike(counts[kernel], [])).kernels.append(kernel)
    return list(groups.values())


def _is_sampled(kernel: Kernel) -> bool:
    """Whether the kernel sees the rows that reach the head, and not all tokens."""
    if kernel.gemm is not None:
        return kernel.gemm.rows == "sampled"
    return kernel.activation_bytes.sampled > 0 and kernel.activation_bytes.tokens == 0


def _own_j(work: Work) -> Array:
    """Joules that belong to single requests: their attention and their cache."""
    joules: Array = work.memory_j.get("kv_cache", 0.0) + work.core_j.get("attention", np.zeros_like(work.time_s))
    return joules


def _sum(parts: dict[str, Array], like: Array) -> Array:
    total = np.zeros_like(like)
    for joules in parts.values():
        total = total + joules
    return total
