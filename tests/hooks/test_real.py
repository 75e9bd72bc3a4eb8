"""Servers that compute: vLLM's CPU workers under every arrangement of processes. The token counts are vLLM's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from server import READY_S, Samples, serving

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(2 * READY_S)]
LENGTHS = (12, 40, 7, 300, 200)  # a block of the CPU's KV cache has 128 tokens
OUTPUT_TOKENS = 16

#: name -> (arguments, environment)
ARRANGEMENTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one": ([], {}),
    "two API servers": (["--api-server-count=2"], {}),
    "data parallel": (["--data-parallel-size=2"], {}),
    "tensor parallel": (["--tensor-parallel-size=2"], {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "chunked": (["--max-num-batched-tokens=64", "--max-num-seqs=8"], {}),
    "forked": ([], {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}),
    "ngram": (
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'],
        {},
    ),
}


def total(shown: Samples, name: str) -> float:
    """Sum of the series of a name and some labels, over all engines."""
    return sum(value for key, value in shown.items() if key.startswith("energylens_") and re.search(name, key))


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_tokens_and_joules(name: str, tiny_model: Path, tmp_path: Path) -> None:
    arguments, environment = ARRANGEMENTS[name]
    requests = 2 * len(LENGTHS)
    with serving(tiny_model, tmp_path, 18120, "--plugin=energylens", *arguments, **environment) as server:
        for _ in range(2):
            server.complete_all(LENGTHS, OUTPUT_TOKENS)
        needed = requests * (OUTPUT_TOKENS - 1)  # the first token of each is prefill's
        if name == "ngram":  # steps may verify several tokens, or some that are then wrong
            needed = requests
        shown = server.metrics_when(lambda found: total(found, r"tokens_total{.*decode") >= needed)
        theirs = server.call("/metrics")
        said = server.log.read_text()  # what vLLM says of its end is its own affair
    prompts = sum(float(value) for value in re.findall(r"^vllm:prompt_tokens_total{.*} (\S+)$", theirs, re.M))
    assert prompts == 2 * sum(LENGTHS)
    assert total(shown, "tokens_total{.*prefill") + total(shown, "cached_tokens_total") == prompts
    if name != "data parallel":  # each prompt came twice, but there perhaps to different engines
        assert total(shown, "cached_tokens_total") > 0
    if name != "ngram":
        assert total(shown, "tokens_total{.*decode") == needed
    joules = total(shown, "predicted_energy_joules_total")
    assert joules > 0
    assert total(shown, "component_energy_joules_total") == pytest.approx(joules, rel=1e-9)
    assert total(shown, "measured_step_time_seconds_total") > 0
    assert total(shown, "failures|unpredicted") == 0
    assert total(shown, 'tensor_parallel_size="2"') == (1 if name == "tensor parallel" else 0)
    assert "Traceback" not in said
