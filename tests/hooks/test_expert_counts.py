"""How tokens choose experts is counted as vLLM's routers choose them, or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from releases import TESTED, folder
from server import ENVIRONMENT, READY_S, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
LAYERS, EXPERTS, SELECTED = 3, 8, 2


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE, served as the tiny model is."""
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    from tiny_model import write_model

    path = tmp_path_factory.mktemp("tiny-experts")
    write_model(
        path,
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        head_dim=32,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=SELECTED,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        mlp_only_layers=[],
    )
    return path


def test_counts_are_what_the_routers_chose(experts_model: Path) -> None:
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, HERE / "choices.py", experts_model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"chosen"')))
    chosen = np.array(result["chosen"])
    assert chosen.shape == (LAYERS, EXPERTS)
    # Each token but a request's last goes through all layers, profiling and warm-up are left out.
    tokens = sum(range(3, 60)) + 57 * 3
    assert chosen.sum(axis=1).tolist() == [SELECTED * tokens] * LAYERS
    assert len({tuple(row) for row in chosen.tolist()}) == LAYERS
    assert result["published"] == chosen.tolist()
    assert result["failures"] == {}
    known = np.array(result["known"])
    assert known.shape == chosen.shape
    # The predictor's are some of the first, or all: it does not start anew for less than 1 % of change.
    assert np.abs(known / known.sum(axis=1, keepdims=True) - chosen / chosen.sum(axis=1, keepdims=True)).sum() < 0.1


@pytest.mark.nightly
@pytest.mark.timeout(2 * READY_S)
def test_a_server_shows_them(experts_model: Path, tmp_path: Path) -> None:
    lengths, outputs = (900, 880, 860, 840, 820), 16
    setting = '{"learn_expert_routing": true, "report_interval_s": 1}'
    arguments = ("--plugin=energylens", f"--energylens={setting}")
    with serving(experts_model, tmp_path, 8830, *arguments, TMPDIR=str(tmp_path)) as server:
        for _ in range(2):
            server.complete_all(lengths, outputs)
        computed = 2 * len(lengths) * (outputs - 1) + sum(lengths)  # the second time prompts are mostly in the cache
        least = computed * SELECTED * LAYERS
        shown = server.metrics_when(lambda found: total(found, "expert_selections_total") >= least)
        shown = server.metrics_when(lambda found: total(found, "expert_imbalance_ratio") > 0, 30.0)
        said = server.log.read_text()
    tokens = total(shown, "^energylens_tokens_total")
    assert total(shown, "expert_selections_total") == tokens * SELECTED * LAYERS
    assert total(shown, "expert_hottest_ratio") >= 1
    assert total(shown, "expert_imbalance_ratio") == 1  # one rank has all experts
    assert total(shown, "failures") == 0
    assert f"counts how tokens choose experts in {LAYERS} layers" in said


def total(shown: dict[str, float], name: str) -> float:
    return sum(value for key, value in shown.items() if re.search(name, key))


def test_rows_of_padding_and_ids_of_no_expert_are_left_out() -> None:
    torch = pytest.importorskip("torch")
    from energylens_vllm.hooks.vllm.expert_counts import Counter

    buffer = torch.randint(0, EXPERTS, (3000, LAYERS, SELECTED), dtype=torch.int32)
    buffer[5, 0, 0], buffer[6, 1, 1], buffer[7, 2, 0] = -1, EXPERTS, 1000
    counter = Counter(buffer, EXPERTS)
    counter.add(2500)
    counter.add(1)
    assert counter.steps == 2
    rows = np.concatenate([buffer[:2500].numpy(), buffer[:1].numpy()])
    expected = [[int((rows[:, layer] == expert).sum()) for expert in range(EXPERTS)] for layer in range(LAYERS)]
    assert counter.table().tolist() == expected
    assert counter.table().sum() == 2501 * LAYERS * SELECTED - 3


def config(**parallel: Any) -> SimpleNamespace:
    defaults = {
        "use_ubatching": False, "use_sequence_parallel_moe": False,
        "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1,
    }  # fmt: skip
    return SimpleNamespace(model_config=SimpleNamespace(), parallel_config=SimpleNamespace(**defaults | parallel))


def test_what_stands_in_the_way_is_said() -> None:
    from energylens_vllm.hooks.vllm.expert_counts import _obstacle

    assert _obstacle(config()) is None
    taken = config()
    taken.model_config.enable_return_routed_experts = True  # where vLLM 0.25 has it
    assert "--enable-return-routed-experts" in str(_obstacle(taken))
    taken = config()
    taken.aux_output_config = SimpleNamespace(enable_return_routed_experts=True)  # and 0.32
    assert "--enable-return-routed-experts" in str(_obstacle(taken))
    for name, value in (
        ("use_ubatching", True), ("use_sequence_parallel_moe", True), ("decode_context_parallel_size", 2),
    ):  # fmt: skip
        assert _obstacle(config(**{name: value}))


def test_a_failure_stays_out_of_the_forward_pass(caplog: pytest.LogCaptureFixture) -> None:
    from energylens_vllm.hooks.vllm.expert_counts import _Tap

    class Broken:
        calls = 0

        def capture(self, layer_id: int, topk_ids: object) -> None:
            self.calls += 1
            raise AssertionError("unexpected topk_ids batch dim 7")

    broken = Broken()
    tap = _Tap(broken)
    for _ in range(3):
        tap.capture(0, None)
    assert (tap.failed, broken.calls) == (True, 1)
    assert len(caplog.records) == 1


NAMES = """
import inspect
from vllm.config import ParallelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
import vllm, vllm.v1.worker.gpu_worker as worker
parameters = [list(inspect.signature(f).parameters)[1:] for f in (RoutedExpertsCapturer, RoutedExpertsCapturer.capture)]
assert parameters == [["vllm_config"], ["layer_id", "topk_ids"]], parameters
assert "self.device_buffer" in inspect.getsource(RoutedExpertsCapturer.__init__)
assert inspect.signature(BaseRouter.set_capture_fn) and MoERunner.layer_id and MoERunner._quant_method
for name in ("use_ubatching", "use_sequence_parallel_moe"):
    assert isinstance(getattr(ParallelConfig, name), property), name
for name in ("prefill_context_parallel_size", "decode_context_parallel_size", "data_parallel_index"):
    assert name in ParallelConfig.__dataclass_fields__, name
assert "instance_id" in VllmConfig.__dataclass_fields__
assert "energylens" in inspect.unwrap(worker.Worker.load_model).__module__ or worker.Worker.load_model.__wrapped__
print("all there in", vllm.__version__)
"""


@pytest.mark.releases
@pytest.mark.parametrize("version", TESTED)
def test_other_releases_have_what_is_used(version: str) -> None:
    path = os.pathsep.join(filter(None, (str(folder(version)), os.environ.get("PYTHONPATH", ""))))
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()\n" + NAMES
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"all there in {version}" in done.stdout


def test_a_release_without_the_place_is_served_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    from energylens_vllm.hooks.vllm.expert_counts import install

    with caplog.at_level("INFO", logger="energylens_vllm"):
        install(ModuleType("gpu_worker"))
    assert "cannot learn how tokens choose experts in this release" in caplog.text
