"""What fusion saves: attention taken apart passes its scores through HBM."""

from __future__ import annotations

from pathlib import Path

import pytest

from energylens_vllm.architectures import build, load_config
from energylens_vllm.einsum import unfuse
from energylens_vllm.energy import Deployment, EnergyModel


@pytest.mark.parametrize(("new", "computed"), [(8192, 0), (1, 100_000)])
def test_scores_of_attention_taken_apart_reach_memory(new: int, computed: int) -> None:
    fused = build(load_config("llama-3.1-8b"))
    deployment = Deployment(gpu="A100-SXM-80GB", max_num_batched_tokens=16384)
    requests = [(new, computed)] * (1 if new > 1 else 64)
    whole, apart = (EnergyModel(each, deployment).step(requests) for each in (fused, unfuse(fused)))
    profile = EnergyModel(fused, deployment).profile
    # QK^T writes and softmax reads scores, and writes and PV reads probabilities: four passes of 16 bits, 32 heads,
    # 32 layers.
    pairs = new * computed + new * (new + 1) / 2 if new > 1 else 64 * (computed + 1)
    scores_j = 4 * 2 * 32 * 32 * pairs * profile["energy.memory_j_per_byte"]
    more = apart.components["activations"] - whole.components["activations"]
    assert more == pytest.approx(scores_j, rel=0.35)  # at the power limit the die's share of a byte costs less
    assert apart.time_s > whole.time_s


OLMOE = Path(__file__).parents[2] / "examples" / "olmoe-1b-7b.yaml"


@pytest.mark.parametrize("network", ["llama-3.1-8b", str(OLMOE)])
def test_no_arithmetic_is_saved_by_taking_apart(network: str) -> None:
    """Decodes compute their tiles' empty rows in either; a small batch, so that no power limit slows down the clock."""
    fused = EnergyModel(network, Deployment()).cascade
    whole, apart = (EnergyModel(each, Deployment()).step([(1, 1000)] * 4) for each in (fused, unfuse(fused)))
    assert apart.components["attention"] == pytest.approx(whole.components["attention"])
    assert apart.energy_j > whole.energy_j
