"""A replica's step model in a table: made once from an `EnergyModel`, then read in microseconds.

Two tables hold a replica's steps. Steps that only decode depend on the number of sequences and their mean context;
steps with prefill on the number of sequences decoding and all tokens of the step, at a context of `REFERENCE_CONTEXT`.
What another context adds is read from the first table, and what prompts that attend to more or fewer (query, key) pairs
add is linear in the pairs. `tests/routing/test_table.py` compares with the model itself.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

from energylens_vllm.energy.batch import Array, Steps, steps_from_arrays, steps_of_mixtures
from energylens_vllm.energy.model import EnergyModel
from energylens_vllm.errors import EnergyLensError

#: Mean contexts of the table, in tokens; those between are interpolated.
CONTEXTS = (1.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0)
REFERENCE_CONTEXT = 1024.0
#: Tokens of steps with prefill. The largest CUDA graph has 512 by default; the step after it costs the host's launches.
TOKENS = (2, 8, 16, 32, 64, 128, 256, 384, 512, 513, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
#: Sequences between which marginal joules are taken: finer ones would show vLLM's padding to CUDA graphs, not load.
SMOOTH = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """Steps of one data-parallel rank. Seconds, and joules over its GPUs, idle power included.

    `decode_s` and `decode_j` have shape (max_num_seqs + 1, contexts), `decode_host_s` (max_num_seqs + 1); row 0 is 0.
    Tables of mixed steps have shape (sizes, tokens): such a step takes the larger of `mixed_gpu_s` and `mixed_host_s`,
    what the host needs to launch it. `marginal_j` is what one more sequence adds to a step, above idle power, of shape
    as `decode_s`: beside those that run, and as long as those last (see `_marginal`).
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: float  #: tokens that the KV cache holds
    idle_w: float
    decode_s: Array
    decode_j: Array
    decode_host_s: Array
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    mixed_gpu_s: Array
    mixed_host_s: Array
    mixed_j: Array
    pair_s: float  #: of a (query, key) pair of prefill, beyond those that `mixed_gpu_s` has
    pair_j: float
    marginal_j: Array
    prefill_s_per_token: float  #: without attention, which `pair_s` and `pair_j` have
    prefill_j_per_token: float  #: likewise, above idle power
    time_std: float  #: relative, as the model states it
    energy_std: float

    @classmethod
    def compile(cls, model: EnergyModel, kv_tokens: float) -> StepTable:
        """Tabulate a model whose KV cache holds `kv_tokens` tokens. Raises EnergyLensError unless that is positive."""
        if not kv_tokens > 0:
            raise EnergyLensError(f"kv_tokens: {kv_tokens!r}; accepted: more than 0 (does the model fit the GPU?)")
        deployment = model.deployment
        most, budget = deployment.max_num_seqs, deployment.max_num_batched_tokens
        idle_w = model.idle_power_w / deployment.data_parallel_size
        n, context = (each.ravel() for each in np.meshgrid(np.arange(1, most + 1), CONTEXTS, indexing="ij"))
        steps = [_decodes(model, n[context == each], each) for each in CONTEXTS]
        decoded = [model.predict(each) for each in steps]
        zero = np.zeros((1, len(CONTEXTS)))
        decode_s = np.concatenate([zero, np.stack([each.time_s for each in decoded], axis=1)])
        decode_j = np.concatenate([zero, np.stack([each.energy_j for each in decoded], axis=1)])
        sizes = (*(size for size in SMOOTH if size < most), most)
        tokens = (*(each for each in TOKENS if each < budget), budget)
        decoding, total = (each.ravel().astype(float) for each in np.meshgrid(sizes, tokens, indexing="ij"))
        new = np.maximum(total - decoding, 1.0)
        # One prompt in each step, of exactly the new tokens: steps_of_mixtures takes one length for all.
        offsets = np.concatenate([[0], np.cumsum(decoding + 1)]).astype(np.int64)
        all_new, computed = np.ones(offsets[-1]), np.full(offsets[-1], REFERENCE_CONTEXT - 1)
        all_new[offsets[1:] - 1], computed[offsets[1:] - 1] = new, 0.0
        is_decode = np.ones(offsets[-1], dtype=bool)
        is_decode[offsets[1:] - 1] = False
        mixed = model.predict(steps_from_arrays(all_new, computed, offsets, model.masks, is_decode))
        shape = (len(sizes), len(tokens))
        pair_s, pair_j = _per_pair(model, budget)
        typical = 1024.0
        alone = model.predict(steps_from_arrays([typical], [0.0], [0, 1], model.masks, [False]))
        large = model.predict(steps_from_arrays([budget], [0.0], [0, 1], model.masks, [False]))
        # Where one prompt is bound by the host, a fuller step is what a busy replica runs.
        s_per_token = min(
            float(each.time_s[0]) / size - pair_s * size / 2 for each, size in ((alone, typical), (large, budget))
        )
        above_idle_j = float(large.energy_j[0]) - idle_w * float(large.time_s[0])
        j_per_token = above_idle_j / budget - (pair_j - idle_w * pair_s) * budget / 2
        sure = decoded[0]
        return cls(
            max_num_seqs=most,
            max_num_batched_tokens=budget,
            kv_tokens=float(kv_tokens),
            idle_w=idle_w,
            decode_s=decode_s,
            decode_j=decode_j,
            decode_host_s=np.concatenate([[0.0], decoded[0].host_s]),
            sizes=sizes,
            tokens=tokens,
            mixed_gpu_s=mixed.gpu_s.reshape(shape),
            mixed_host_s=mixed.host_s.reshape(shape),
            mixed_j=mixed.energy_j.reshape(shape),
            pair_s=pair_s,
            pair_j=pair_j,
            marginal_j=_marginal(decode_j - idle_w * decode_s),
            prefill_s_per_token=s_per_token,
            prefill_j_per_token=j_per_token,
            time_std=float(sure.high_s[0] / sure.time_s[0] - 1) / 1.645,
            energy_std=float(sure.high_j[0] / sure.energy_j[0] - 1) / 1.645,
        )

    def scaled(self, time: float = 1.0, energy: float = 1.0) -> StepTable:
        """A table that is wrong by these factors in all its seconds and joules (idle power stays): another profile."""
        decode_s, decode_j = self.decode_s * time, self.decode_j * energy
        return replace(
            self,
            decode_s=decode_s,
            decode_j=decode_j,
            decode_host_s=self.decode_host_s * time,
            mixed_gpu_s=self.mixed_gpu_s * time,
            mixed_host_s=self.mixed_host_s * time,
            mixed_j=self.mixed_j * energy,
            pair_s=self.pair_s * time,
            pair_j=self.pair_j * energy,
            marginal_j=_marginal(np.maximum(decode_j - self.idle_w * decode_s, 0.0)),
            prefill_s_per_token=self.prefill_s_per_token * time,
            prefill_j_per_token=self.prefill_j_per_token * energy,
        )

    def reader(self) -> Reader:
        """The same for single steps, without numpy's cost per call."""
        return Reader(self)


class Reader:
    """Single steps of a table, in Python lists: about 1 us each."""

    def __init__(self, table: StepTable) -> None:
        self.decode_s, self.decode_j = table.decode_s.tolist(), table.decode_j.tolist()
        self.decode_host_s = table.decode_host_s.tolist()
        self.mixed_gpu_s, self.mixed_host_s = table.mixed_gpu_s.tolist(), table.mixed_host_s.tolist()
        self.mixed_j = table.mixed_j.tolist()
        self.sizes, self.tokens = table.sizes, table.tokens
        self.pair_s, self.pair_j = table.pair_s, table.pair_j
        self.reference = CONTEXTS.index(REFERENCE_CONTEXT)

    def decode(self, n: int, context: float) -> tuple[float, float]:
        """Seconds and joules of a step of `n` decodes whose mean context is `context`."""
        at = min(max(bisect_right(CONTEXTS, context) - 1, 0), len(CONTEXTS) - 2)
        low = CONTEXTS[at]
        part = (context - low) / (CONTEXTS[at + 1] - low)
        time_s, energy_j = self.decode_s[n], self.decode_j[n]
        return (
            time_s[at] + part * (time_s[at + 1] - time_s[at]),
            energy_j[at] + part * (energy_j[at + 1] - energy_j[at]),
        )

    def mixed(self, n: int, context: float, new: int, pairs: float) -> tuple[float, float, float]:
        """A step of `n` decodes and `new` tokens of prompts that attend to `pairs` (query, key) pairs in all: seconds
        of the GPU, joules, and seconds of the host, which may be more. The step takes the larger."""
        total = n + new
        i = min(max(bisect_right(self.sizes, n) - 1, 0), len(self.sizes) - 2)
        j = min(max(bisect_right(self.tokens, total) - 1, 0), len(self.tokens) - 2)
        a = (n - self.sizes[i]) / (self.sizes[i + 1] - self.sizes[i])
        b = (total - self.tokens[j]) / (self.tokens[j + 1] - self.tokens[j])
        b = max(b, 0.0)
        extra = pairs - new * (new + 1) / 2
        result = []
        for table, per_pair in ((self.mixed_gpu_s, self.pair_s), (self.mixed_j, self.pair_j), (self.mixed_host_s, 0.0)):
            low, high = table[i], table[i + 1]
            below = low[j] + b * (low[j + 1] - low[j])
            above = high[j] + b * (high[j + 1] - high[j])
            result.append(below + a * (above - below) + extra * per_pair)
        if n:
            time_s, energy_j = self.decode(n, context)
            result[0] += time_s - self.decode_s[n][self.reference]
            result[1] += energy_j - self.decode_j[n][self.reference]
        floor_s, floor_j = self.decode_s[max(n, 1)][0], self.decode_j[max(n, 1)][0]
        return max(result[0], floor_s), max(result[1], floor_j), result[2]


def _decodes(model: EnergyModel, n: Array, context: float) -> Steps:
    none = np.zeros(len(n))
    return steps_of_mixtures(n.astype(float), max(context, 1.0), none, none, 1.0, 0.0, model.masks)


def _per_pair(model: EnergyModel, new: int) -> tuple[float, float]:
    """Seconds and joules of a (query, key) pair of prefill, from a full chunk with and without tokens before it."""
    before = 16384.0
    steps = steps_from_arrays([new, new], [0.0, before], [0, 1, 2], model.masks, [False, False])
    predicted = model.predict(steps)
    pairs = new * before
    return float(np.diff(predicted.time_s)[0]) / pairs, float(np.diff(predicted.energy_j)[0]) / pairs


def _marginal(above_idle_j: Array) -> Array:
    """Joules above idle power that one more sequence adds to a step beside n others, of shape (n, contexts).

    Beside others it adds g(n + 1) - g(n); when they have all ended it pays g(1), the weights' bytes and all, alone. The
    others end at random with the new one's mean length L, so that after j steps all n have with probability
    (1 - exp(-j / L))^n; `lonely` is its mean over j up to L. Without that term all replicas that run anything
    would cost about the same, and requests would be spread where gathering them saves.
    """
    most = len(above_idle_j) - 1
    nodes = np.array([n for n in SMOOTH if n < most] + [most])
    n = np.arange(most + 1)
    smooth = np.stack([np.interp(n, nodes, column[nodes]) for column in above_idle_j.T], axis=1)
    added = np.diff(smooth, axis=0, append=smooth[-1:] * 2 - smooth[-2:-1])
    y = (np.arange(32) + 0.5) / 32
    lonely = ((1 - np.exp(-y)) ** n[:, None]).mean(axis=1)[:, None]
    return np.asarray(np.maximum(added * (1 - lonely) + lonely * smooth[1], 0.0))
