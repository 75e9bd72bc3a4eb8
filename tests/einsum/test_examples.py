"""The cascade that shows how to write one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.einsum import Cascade, Mesh, dump_cascade, load_cascade

PATH = Path(__file__).parents[2] / "examples" / "olmoe-1b-7b.yaml"


@pytest.fixture(scope="module")
def olmoe() -> Cascade:
    return load_cascade(PATH)


def test_parameters_are_the_published_ones(olmoe: Cascade) -> None:
    """arXiv 2409.02060, table 1: 6.9 billion, of which 1.3 are active; to the last as in the published safetensors."""
    assert olmoe.parameters() == 6_919_161_856
    assert olmoe.active_parameters() == pytest.approx(1.3e9, rel=0.02)


def test_round_trip(olmoe: Cascade) -> None:
    assert load_cascade(dump_cascade(olmoe)) == olmoe


def test_norms_over_all_heads_gather_them(olmoe: Cascade) -> None:
    """vLLM's `OlmoeAttention._apply_qk_norm`; collectives have names of their own."""
    collectives = {k.name: k.collective.op for k in olmoe.kernels(mesh=Mesh(tp=2)) if k.collective}
    assert collectives == {
        "embed.embed.all_reduce": "all_reduce",
        "layer.qkv.all_gather": "all_gather",
        "layer.qkv.KN.all_gather": "all_gather",
        "layer.o.all_reduce": "all_reduce",
        "layer.sum.all_reduce": "all_reduce",
        "head.lm_head.all_gather": "all_gather",
    }


@pytest.mark.parametrize("source", [str(PATH), PATH, load_cascade(PATH)], ids=["text", "path", "cascade"])
def test_predictions_follow_from_it(source: str | Path | Cascade) -> None:
    model = EnergyModel(source, Deployment(tensor_parallel_size=2))
    step = model.step([(1, 1000)] * 64 + [(512, 0)])
    assert 0 < step.energy_j < 50
    assert sum(step.components.values()) == pytest.approx(step.energy_j)
    assert step.components["experts"] > 0
    assert step.components["communication"] > 0
