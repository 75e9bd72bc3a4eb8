"""Engine steps, summed up once: all that the step model reads of a batch, for any number of steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from energylens_vllm.einsum.kernel import Mask
from energylens_vllm.errors import EnergyLensError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention work of each step under one mask, each of shape (steps,). A request is a decode when it has one new
    token after at least one computed, or when the caller says so."""

    decode_pairs: Array
    prefill_pairs: Array
    decode_keys: Array  #: KV-cache tokens that decodes read
    prefill_keys: Array


@dataclass(frozen=True, slots=True)
class Steps:
    """N engine steps of one data-parallel rank; every array has shape (N,)."""

    tokens: Array
    decode_tokens: Array
    sequences: Array
    decode_sequences: Array
    attention: tuple[Attention, ...]  #: in the order of the masks given

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | Integers) -> Steps:
        """Some of the steps."""
        return self._each(lambda values: values[which])

    def share(self, parts: int) -> Steps:
        """An even share of each step: what one of `parts` data-parallel ranks has of it."""
        return self._each(lambda values: values / parts)

    def _each(self, made: Callable[[Array], Array]) -> Steps:
        return Steps(
            made(self.tokens),
            made(self.decode_tokens),
            made(self.sequences),
            made(self.decode_sequences),
            tuple(
                Attention(
                    made(load.decode_pairs), made(load.prefill_pairs), made(load.decode_keys), made(load.prefill_keys)
                )
                for load in self.attention
            ),
        )

    def chunked(self, parts: int) -> Steps:
        """What one of `parts` prefill-context-parallel ranks has of each step, attention without windows.

        Decodes are shared out whole. A prompt's n new tokens after c are cut into 2 parts chunks, of which rank r takes
        chunks r and 2 parts - 1 - r, as two requests: the ranks then have equally many pairs, and each reads
        2 c + (1 + 1 / 2 parts) n keys, its chunks' own and all before them. Source: vLLM 0.32, v1/worker/gpu/
        pcp_manager.py `_iter_rank_chunks`.
        """
        shared = self.share(parts)
        prefill_tokens, prompts = self.tokens - self.decode_tokens, self.sequences - self.decode_sequences
        again = (1 - 1 / (2 * parts)) * prefill_tokens
        return replace(
            shared,
            sequences=shared.decode_sequences + 2 * prompts,
            attention=tuple(
                replace(mine, prefill_keys=2 * whole.prefill_keys - again)
                for mine, whole in zip(shared.attention, self.attention, strict=True)
            ),
        )


def causal_pairs(new: Any, computed: Any, mask: Mask) -> Any:
    """(query, key) pairs of requests with `new` tokens after `computed`, under `mask`. Arrays broadcast.

    Full causal: sum over j = 1..n of (c + j) = n c + n (n + 1) / 2. A window w caps each term at w. Chunked attention
    counts only keys in the query's own chunk.
    """
    if not mask.causal:
        return new * (computed + new)
    if mask.window is not None:
        return _capped(computed + new, mask.window) - _capped(computed, mask.window)
    if mask.chunk is not None:
        return _chunked(computed + new, mask.chunk) - _chunked(computed, mask.chunk)
    return new * computed + new * (new + 1) / 2


def keys_read(new: Any, computed: Any, mask: Mask) -> Any:
    """Distinct KV-cache tokens that attention of a request reads in this step, under `mask`. Arrays broadcast."""
    end = computed + new
    if mask.window is not None:
        return np.minimum(end, new + mask.window - 1)
    if mask.chunk is not None:
        return np.minimum(end, new + computed % mask.chunk)
    return end


def _capped(length: Any, window: int) -> Any:
    """Sum over positions 1..length of min(position, window)."""
    ramp = np.minimum(length, window)
    return ramp * (ramp + 1) / 2 + (length - ramp) * window


def _chunked(length: Any, chunk: int) -> Any:
    """Sum over positions 1..length of the position within its chunk."""
    rest = length % chunk
    return (length - rest) / chunk * (chunk * (chunk + 1) / 2) + rest * (rest + 1) / 2


def steps_from_arrays(new: Any, computed: Any, offsets: Any, masks: Sequence[Mask], decode: Any = None) -> Steps:
    """Sum up N steps given in compressed rows: step i holds requests offsets[i]:offsets[i+1] of `new` and `computed`.

    `decode` (booleans, one a request) overrides the rule of `Attention`: with speculative decoding a decode has
    several new tokens. Steps without requests give zeros.
    """
    n = np.asarray(new, dtype=np.float64)
    c = np.asarray(computed, dtype=np.float64)
    bounds = np.asarray(offsets, dtype=np.int64)
    is_decode = ((n == 1) & (c > 0)) if decode is None else np.asarray(decode, dtype=bool)
    sizes = np.diff(bounds)
    if len(sizes) == 1:  # one step, the scheduler's case: plain sums are several times cheaper than reduceat

        def total(values: Any) -> Array:
            return np.array([values.sum()])
    else:

        def total(values: Any) -> Array:
            # One more zero, because steps without requests may come last and start behind the last request.
            sums: Array = np.add.reduceat(np.append(values, 0.0), bounds[:-1])
            return np.where(sizes > 0, sums, 0.0)

    if is_decode.all() and (n == 1.0).all():  # what a server does nearly always: each query is its keys' only one
        rows, none = sizes.astype(np.float64), np.zeros(len(sizes))
        seen = [total(keys_read(1.0, c, mask)) for mask in masks]
        return Steps(rows, rows, rows, rows, tuple(Attention(sums, none, sums, none) for sums in seen))
    dec = is_decode.astype(np.float64)
    attention = []
    for mask in masks:
        pairs, keys = causal_pairs(n, c, mask), keys_read(n, c, mask)
        decode_pairs, decode_keys = total(pairs * dec), total(keys * dec)
        attention.append(Attention(decode_pairs, total(pairs) - decode_pairs, decode_keys, total(keys) - decode_keys))
    return Steps(
        tokens=total(n),
        decode_tokens=total(n * dec),
        sequences=sizes.astype(np.float64),
        decode_sequences=total(dec),
        attention=tuple(attention),
    )


def steps_from_requests(
    requests: Sequence[tuple[int, int]], masks: Sequence[Mask], decode: Sequence[bool] | None = None
) -> Steps:
    """One step from a list of (num_new_tokens, num_computed_tokens).

    Raises EnergyLensError for a negative count or a pair of another shape.
    """
    try:
        table = np.array(requests, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.array([np.nan])
    if not len(requests):
        table = np.zeros((0, 2))
    if table.ndim != 2 or table.shape[1] != 2 or not np.all(np.isfinite(table)):
        raise EnergyLensError("requests: every entry must be a pair (num_new_tokens, num_computed_tokens)")
    if table.size and table.min() < 0:
        raise EnergyLensError(f"requests: negative token count {table.min():.0f}; accepted: zero or more")
    return steps_from_arrays(table[:, 0], table[:, 1], np.array([0, len(table)]), masks, decode)


def steps_of_mixtures(
    decoding: Array,
    context: float,
    starting: Array,
    new: Array,
    uncached: Array | float,
    cached: float,
    masks: Sequence[Mask],
    decoded: float = 1.0,
) -> Steps:
    """Steps that each hold `decoding` requests of `context` tokens, `decoded` of them new (more than one with drafts to
    verify), and prefill `new` tokens of `starting` prompts, each of `uncached` tokens after `cached` ones. Arrays of
    shape (N,), fractions allowed; `uncached` may be one number for all."""
    attention = []
    prompts = new / uncached
    for mask in masks:
        attention.append(
            Attention(
                decoding * causal_pairs(decoded, context - 1, mask),
                prompts * causal_pairs(uncached, cached, mask),
                decoding * keys_read(decoded, context - 1, mask),
                prompts * keys_read(uncached, cached, mask),
            )
        )
    decodes = decoding * decoded
    return Steps(decodes + new, decodes, decoding + starting, decoding, tuple(attention))
