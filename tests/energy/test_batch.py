"""Batches summed up: against counting request by request and key by key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.einsum.kernel import Mask
from energylens_vllm.energy.batch import (
    causal_pairs,
    keys_read,
    steps_from_arrays,
    steps_from_requests,
    steps_of_mixtures,
)
from energylens_vllm.errors import EnergyLensError

MASKS = (Mask(), Mask(window=5), Mask(chunk=7), Mask(causal=False))


def seen(mask: Mask, new: int, computed: int) -> list[set[int]]:
    """Of each new token, the positions that it attends to."""
    keys = []
    for position in range(computed, computed + new):
        last = computed + new if not mask.causal else position + 1
        first = 0
        if mask.window is not None:
            first = max(0, position + 1 - mask.window)
        if mask.chunk is not None:
            first = position // mask.chunk * mask.chunk
        keys.append(set(range(first, last)))
    return keys


@given(st.sampled_from(MASKS), st.integers(1, 30), st.integers(0, 40))
def test_pairs_and_keys_are_those_of_the_mask(mask: Mask, new: int, computed: int) -> None:
    keys = seen(mask, new, computed)
    assert causal_pairs(new, computed, mask) == sum(len(each) for each in keys)
    assert keys_read(new, computed, mask) == len(set.union(*keys))


requests = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), max_size=6)


@given(st.lists(requests, min_size=1, max_size=5))
def test_many_steps_are_each_step_alone(steps: list[list[tuple[int, int]]]) -> None:
    flat = [request for step in steps for request in step]
    new, computed = ([request[i] for request in flat] for i in (0, 1))
    offsets = np.cumsum([0, *(len(step) for step in steps)])
    together = steps_from_arrays(new, computed, offsets, MASKS)
    for i, step in enumerate(steps):
        alone = steps_from_requests(step, MASKS)
        for name in ("tokens", "decode_tokens", "sequences", "decode_sequences"):
            assert getattr(together, name)[i] == getattr(alone, name)[0]
        for ours, theirs in zip(together.attention, alone.attention, strict=True):
            assert ours.decode_pairs[i] == theirs.decode_pairs[0]
            assert ours.prefill_keys[i] == pytest.approx(theirs.prefill_keys[0])


def test_a_decode_has_one_new_token_after_others_or_is_said_to_be_one() -> None:
    batch = [(1, 0), (1, 9), (4, 9)]
    assert steps_from_requests(batch, ()).decode_tokens.tolist() == [1.0]
    assert steps_from_requests(batch, (), [False, True, True]).decode_tokens.tolist() == [5.0]


def test_shares_add_up() -> None:
    steps = steps_from_requests([(1, 100)] * 8 + [(64, 0)] * 2, MASKS)
    half = steps.share(2)
    assert half.tokens.tolist() == [68.0]
    assert half.attention[0].decode_keys.tolist() == [4 * 101]


def test_mixtures_are_batches_of_like_requests() -> None:
    mixture = steps_of_mixtures(np.array([8.0]), 101.0, np.array([2.0]), np.array([128.0]), 64.0, 16.0, MASKS)
    batch = steps_from_requests([(1, 100)] * 8 + [(64, 16)] * 2, MASKS)
    for name in ("tokens", "decode_tokens", "sequences", "decode_sequences"):
        assert getattr(mixture, name).tolist() == getattr(batch, name).tolist()
    for ours, theirs in zip(mixture.attention, batch.attention, strict=True):
        for name in ("decode_pairs", "prefill_pairs", "decode_keys", "prefill_keys"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


@pytest.mark.parametrize("batch", [[(1,)], [(1,), (2,)], [(1, 2, 3)], ["ab"], [(None, 1)]])
def test_what_is_no_batch_is_refused(batch: list[tuple[int, int]]) -> None:
    with pytest.raises(EnergyLensError, match=r"requests: every entry must be a pair"):
        steps_from_requests(batch, ())


def test_negative_counts_are_refused() -> None:
    with pytest.raises(EnergyLensError, match=r"negative token count -3; accepted: zero or more"):
        steps_from_requests([(1, 5), (-3, 0)], ())
