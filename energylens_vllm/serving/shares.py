"""Whose joules a step's joules are: the share of each request in each step, by what it causes.

A step's energy is predicted by component, and each component is divided by its own rule.

| component | divided by |
| --- | --- |
| `kv_cache` | the cache that the request reads and writes |
| `attention` | its (query, key) pairs |
| `linear`, `experts`, `activations`, `communication` | its tokens; of the language-model head, its sampled row |
| `weights` | the rule below |
| `static`, `host_gap` | what it has of all the others: they last as long as the step's work does |

Weights are read once for all requests of a step, so nobody causes that alone. Two rules are known:

- `shapley` (default): the Shapley value, a request's mean extra cost over all orders of arrival. Dense weights are read
  whole for the first request and free for all others, so they are shared equally. Each expert's weights are shared by
  the requests that route a token to it: a request with n tokens, k of E experts each, touches 1 - (1 - k/E)^n of them,
  and pays in proportion to that. So nobody pays more for weights than alone, whoever is in the batch beside.
- `per_token`: in proportion to tokens. Simpler, and each phase's sum is that of the prediction's phases, but a prefill
  of 2000 tokens then pays for the weights that ten decodes beside it would have read anyway.

For decodes of one token each the rules are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.serving.predictor import Rows
from energylens_vllm.serving.settings import RULES

if TYPE_CHECKING:
    from energylens_vllm.einsum.kernel import Kernel, Mask
    from energylens_vllm.energy import EnergyModel

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What one more of something costs a step under one mask, in any one unit for each kind of cost."""

    pair: float = 0.0  #: attention, a (query, key) pair
    key: float = 0.0  #: KV cache, a token that is read


@dataclass(frozen=True, slots=True)
class Prices:
    """By what a step's components are divided. Only ratios within a component matter."""

    decode: Mapping[Mask, Costs]
    prefill: Mapping[Mask, Costs]
    written: float  #: KV cache, a token that is written; in the unit of `Costs.key`
    linear_token: float
    linear_sampled: float
    linear_key: float  #: a cached token that a prefill's linear layers see again (MLA's latents)
    dense_bytes: float
    expert_bytes: float
    expert_share: float  #: of the experts, those that one token is routed to

    @classmethod
    def of(cls, model: EnergyModel) -> Prices:
        """From the kernels and coefficients that the step model is made of."""
        from energylens_vllm.energy.precision import format_of, kernel_format, widths

        deployment, profile, form = model.deployment, model.profile, format_of(model.quantization)
        element = widths(deployment.dtype, model.quantization, deployment.kv_cache_dtype)
        kernels = model.cascade.kernels(element, deployment.mesh)

        def joules_per_flop(kernel: Kernel) -> float:
            return kernel.count * profile[f"energy.{kernel_format(form, kernel)}.j_per_flop"]

        linear = [kernel for kernel in kernels if kernel.family == "linear"]
        experts = [kernel for kernel in kernels if kernel.experts is not None]
        shape = experts[0].experts if experts else None
        return cls(
            decode={
                mask: _costs(kernels, mask, "decode", profile["attention.decode.tile_rows"]) for mask in model.masks
            },
            prefill={mask: _costs(kernels, mask, "prefill") for mask in model.masks},
            written=sum(kernel.count * kernel.kv_write_bytes.tokens for kernel in kernels),
            linear_token=sum(joules_per_flop(kernel) * kernel.flops.tokens for kernel in linear),
            linear_sampled=sum(joules_per_flop(kernel) * kernel.flops.sampled for kernel in linear),
            linear_key=sum(joules_per_flop(kernel) * kernel.flops.keys for kernel in linear),
            dense_bytes=sum(kernel.count * kernel.weight_bytes for kernel in linear),
            expert_bytes=sum(kernel.count * kernel.weight_bytes for kernel in experts),
            expert_share=shape.selected / shape.total if shape else 0.0,
        )


def _costs(kernels: list[Kernel], mask: Mask, phase: str, tile_rows: float = 1.0) -> Costs:
    """Of the attention kernels of a phase under a mask. A decode's tile of query heads is computed whole."""
    pair = key = 0.0
    for kernel in kernels:
        shape = kernel.attention
        if shape is not None and shape.mask == mask and kernel.phase in ("all", phase):
            pair += kernel.count * kernel.flops.pairs * max(1.0, tile_rows / (shape.heads / shape.kv_heads))
            key += kernel.count * kernel.kv_read_bytes.keys
    return Costs(pair, key)


@dataclass(frozen=True, slots=True)
class Spared:
    """What prompt tokens would have cost that were found in a prefix cache: their part of a step full of prefill."""

    token_j: float
    attention_j: float  #: for each unit of attention, as `Prices` has it
    prices: Prices

    @classmethod
    def of(cls, model: EnergyModel, prices: Prices) -> Spared:
        """At what the model says of a prefill that fills a step."""
        tokens = model.deployment.max_num_batched_tokens
        step = model.step([(tokens, 0)])
        all_j = step.energy_j / model.deployment.data_parallel_size
        attention_j = (
            all_j
            * step.components["attention"]
            / (step.energy_j - step.components["static"] - step.components["host_gap"])
        )
        work = _prefill_attention(prices, np.array([float(tokens)]))
        return cls((all_j - attention_j) / tokens, attention_j / max(float(work[0]), 1.0), prices)

    def joules(self, cached_tokens: npt.ArrayLike) -> Array:
        """For each request, of which so many tokens at its beginning were found."""
        cached = np.asarray(cached_tokens, dtype=np.float64)
        return cached * self.token_j + _prefill_attention(self.prices, cached) * self.attention_j


def _prefill_attention(prices: Prices, tokens: Array) -> Array:
    from energylens_vllm.energy.batch import causal_pairs

    work = np.zeros_like(tokens)
    for mask, costs in prices.prefill.items():
        work = work + costs.pair * causal_pairs(tokens, 0.0, mask)
    return work


def shares(rows: Rows, components: Mapping[str, Array], prices: Prices, rule: str = "shapley") -> Array:
    """Joules of each request in each step, in the order of `rows`; those of a step sum to its components' sum.

    Raises KeyError for an unknown rule.
    """
    divide = _RULES[rule]
    step = _Steps.of(rows)
    attention, cache, linear = _own_work(prices, step)
    tokens = components["experts"] + components["activations"] + components["communication"]
    own = step.divide(components["attention"], attention)
    own += step.divide(components["kv_cache"], cache)
    own += step.divide(components["linear"], linear)
    own += step.divide(tokens, step.new)
    own += step.divide(components["weights"], divide(prices, step))
    own += step.divide(components["static"] + components["host_gap"], own)
    return own


@dataclass(frozen=True, slots=True)
class _Steps:
    """The rows, and which of them are of one step."""

    new: Array
    computed: Array
    decode: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]  #: of each row

    @classmethod
    def of(cls, rows: Rows) -> _Steps:
        sizes = np.diff(rows.offsets)
        step = np.repeat(np.arange(len(sizes)), sizes)
        return cls(rows.new.astype(np.float64), rows.computed.astype(np.float64), rows.decode, rows.offsets[:-1], step)

    def sums(self, values: Array) -> Array:
        """For each step. Each has a row at least."""
        return np.asarray(np.add.reduceat(values, self.starts))

    def divide(self, joules: Array, weights: Array) -> Array:
        """`joules` of each step, divided among its rows by weight; by tokens where no row has any."""
        total = self.sums(weights)
        if not total.all():
            weights = np.where((total > 0.0)[self.step], weights, self.new)
            total = self.sums(weights)
        return np.asarray((joules / total)[self.step] * weights)


def _own_work(prices: Prices, step: _Steps) -> tuple[Array, Array, Array]:
    """What each row has of attention, KV cache and linear layers, each in a unit of its own."""
    from energylens_vllm.energy.batch import causal_pairs, keys_read

    attention, cache = np.zeros_like(step.new), prices.written * step.new
    linear = prices.linear_token * step.new + prices.linear_sampled
    for mask, decode in prices.decode.items():
        prefill = prices.prefill[mask]
        pairs = causal_pairs(step.new, step.computed, mask)
        keys = keys_read(step.new, step.computed, mask)
        attention += np.where(step.decode, decode.pair, prefill.pair) * pairs
        # A prefill has its own new keys at hand.
        cache += np.where(step.decode, decode.key * keys, prefill.key * np.maximum(keys - step.new, 0.0))
        if prices.linear_key and mask == next(iter(prices.decode)):
            linear += np.where(step.decode, 0.0, prices.linear_key * keys)
    return attention, cache, linear


def _shapley(prices: Prices, step: _Steps) -> Array:
    """How a step's weights are divided: the dense ones equally, each expert's by who needs it."""
    equal = 1.0 / step.sums(np.ones_like(step.new))[step.step]
    if not prices.expert_bytes:
        return equal
    touched = 1.0 - (1.0 - prices.expert_share) ** step.new
    # What all of a step's tokens together touch is read; that is its experts' part of the bytes.
    read = prices.expert_bytes * (1.0 - (1.0 - prices.expert_share) ** step.sums(step.new))
    return np.asarray(prices.dense_bytes * equal + read[step.step] * touched / step.sums(touched)[step.step])


def _per_token(prices: Prices, step: _Steps) -> Array:
    return step.new


_RULES = dict(zip(RULES, (_shapley, _per_token), strict=True))
