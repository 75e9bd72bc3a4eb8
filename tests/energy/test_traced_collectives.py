"""The collectives that follow from the sharding, against those that vLLM issues with two ranks on CPUs and on GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from energylens_vllm.architectures import build, load_config
from energylens_vllm.einsum import Cascade, Mesh

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
RECORDED = HERE.parent / "data" / "h200_vllm"
TWO_LAYERS = {"num_hidden_layers": 2}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip


def derived(cascade: Cascade, mesh: Mesh, tokens: int, requests: int) -> list[list[object]]:
    """What a step of decodes, or any step of a network whose kernels are the same for prompts, issues, in order:
    [operation, group, ranks, bytes]."""
    kernels = [k for k in cascade.kernels(mesh=mesh) if k.collective is not None and k.phase != "prefill"]
    found: list[list[object]] = []
    for block in cascade.blocks:
        inside = [k for k in kernels if k.name.startswith(f"{block.name}.")]
        for _ in range(inside[0].count if inside else 0):
            for kernel in inside:
                shape, size = kernel.collective, kernel.activation_bytes
                assert shape is not None
                message = size.constant + size.tokens * tokens + size.sampled * requests
                found.append([shape.op, shape.axis, shape.size, message])
    return found


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_vllm_issues_the_collectives_that_follow_from_the_sharding(experts: bool, tmp_path: Path) -> None:
    write = [sys.executable, "-c", "import sys, json, pathlib; from tiny_model import write_model; "
             "write_model(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))"]  # fmt: skip
    overrides = json.dumps(EXPERTS if experts else {})
    subprocess.run([*write, tmp_path, overrides], check=True, env=os.environ | {"PYTHONPATH": str(EXAMPLES)})
    run = subprocess.run(
        [sys.executable, HERE / "traced_collectives.py", tmp_path],
        env=os.environ | {
            "PYTHONPATH": str(HERE), "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_PLUGINS": "none", "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.PIPE, text=True, timeout=600, check=True,
    )  # fmt: skip
    steps = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("[[")))
    assert sum(tokens for tokens, _, _ in steps) == 12 + 5 + 2 * 2
    for tokens, requests, calls in steps:
        assert calls == derived(build(load_config(tmp_path)), Mesh(tp=2), tokens, requests)


@pytest.mark.parametrize(
    ("case", "config", "mesh"),
    [
        ("deepseek-tp2", {**load_config("deepseek-v2-lite"), **TWO_LAYERS}, Mesh(tp=2)),
        ("deepseek-dcp2", {**load_config("deepseek-v2-lite"), **TWO_LAYERS}, Mesh(tp=2, dcp=2)),
        ("mqa-dcp2", {**load_config("llama-3.1-8b"), **TWO_LAYERS, "num_key_value_heads": 1}, Mesh(tp=2, dcp=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_so_did_vllm_on_two_gpus(case: str, config: dict[str, Any], mesh: Mesh) -> None:
    """As `traced_collectives.py` saw vLLM 0.25.1 on two H200s: steps of decodes, for its latent attention also takes
    prompts of a few tokens for such."""
    traced = json.loads((RECORDED / "collectives.json").read_text())[case]
    decodes = [step for step in traced if step[0] == step[1]]
    assert len(decodes) == 3
    for tokens, requests, calls in decodes:
        assert calls == derived(build(config), mesh, tokens, requests)
