"""Steps without requests add nothing and take nothing from their neighbours."""

from __future__ import annotations

import pytest

from energylens_vllm.einsum.kernel import Mask
from energylens_vllm.energy.batch import steps_from_arrays


@pytest.mark.parametrize(
    ("offsets", "tokens", "keys"),
    [
        ([0, 3, 3], [6, 0], [66, 0]),
        ([0, 0, 1, 1, 3, 3], [0, 1, 0, 5, 0], [0, 11, 0, 55, 0]),
        ([0, 0, 3], [0, 6], [0, 66]),
        ([0, 3], [6], [66]),
    ],
)
def test_empty_steps(offsets: list[int], tokens: list[float], keys: list[float]) -> None:
    steps = steps_from_arrays([1, 2, 3], [10, 20, 30], offsets, [Mask()])
    assert steps.tokens.tolist() == tokens
    assert (steps.attention[0].decode_keys + steps.attention[0].prefill_keys).tolist() == keys


def test_no_step_at_all_has_a_request() -> None:
    assert steps_from_arrays([], [], [0, 0, 0], [Mask()]).tokens.tolist() == [0, 0]
