"""The cascade that shows how to write one's own, and the page about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.einsum import Cascade, EinsumError, Mesh, dump_cascade, load_cascade

ROOT = Path(__file__).parents[2]
PATH = ROOT / "examples" / "olmoe-1b-7b.yaml"
PAGE = (ROOT / "docs" / "einsum.md").read_text()


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


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_shows_the_example() -> None:
    written = set(PATH.read_text().splitlines())
    shown = [line for text in blocks("yaml") for line in text.splitlines()]
    assert len(shown) > 20
    assert [line for line in shown if line not in written] == []


def test_the_code_on_the_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    complete = [code for code in blocks("python") if code.startswith("from ")]
    assert len(complete) == 4
    for code in complete:
        exec(code, scope)
    assert load_cascade(capsys.readouterr().out).name == "Qwen3-30B-A3B"
    assert scope["step"].energy_j > 0
    assert scope["fused"].parameters() == scope["cascade"].parameters()


def test_the_error_on_the_page_is_the_one_that_is_raised() -> None:
    shown = blocks("text")[0].strip()
    text = (ROOT / "tests" / "einsum" / "cascades" / "llama-3.1-8b.yaml").read_text()
    with pytest.raises(EinsumError) as error:
        load_cascade(text.replace("X[t,d] = H[t,f] * WD[f,d]", "X[t,d] = H[t,f] * WD[e,d]"))
    assert str(error.value).endswith(shown)
