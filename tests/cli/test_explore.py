"""`energylens explore` through the command: what it prints and writes, and commands that vLLM takes."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest

from energylens_vllm.cli import main
from energylens_vllm.energy.precision import ONLINE_QUANTIZATIONS
from energylens_vllm.explore import Load, Space, explore

BASE = ["explore", "--model", "llama-3.1-70b", "--gpu", "H100-SXM", "--prompt", "1000", "--output", "300"]
MOE = ["explore", "--model", "qwen3-30b-a3b-fp8", "--gpu", "H100-SXM", "--max-gpus", "4", "--prompt", "500",
       "--output", "200", "-dp", "1", "2", "-ep"]  # fmt: skip

ONLINE = [*BASE, "-q", *ONLINE_QUANTIZATIONS, "--top", "50"]
EVERY = [*MOE, "--enable-eplb", "--num-redundant-experts", "0", "8", "--expert-routing", "zipf:0.8", "--enable-dbo",
         "--all2all-backend", "allgather_reducescatter", "deepep_high_throughput", "--top", "50"]  # fmt: skip
CONTEXTS = ["explore", "--model", "deepseek-v2-lite", "--gpu", "H200-SXM", "--max-gpus", "4", "--prompt", "8000",
            "--output", "200", "-q", "none", "--kv-cache-dtype", "auto", "-pp", "1", "-dp", "1", "-pcp", "1", "2",
            "--dcp-comm-backend", "ag_rs", "a2a", "--top", "50"]  # fmt: skip


def test_the_json_is_what_the_library_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--ttft", "1s", "--tpot", "50ms", "--top", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = explore("llama-3.1-70b", Load(1000, 300, ttft_s=1.0, tpot_s=0.05), Space(gpus=("H100-SXM",)))
    assert printed["deployments"] == len(found.deployments)
    assert printed["feasible"] == found.feasible.sum()
    assert len(printed["front"]) == found.front.sum()
    for printed_row, index in zip(printed["best"], found.best(3), strict=True):
        assert printed_row["energy_per_output_token_j"] == pytest.approx(found.deployments.token_j[index], rel=1e-5)
        assert sum(printed_row["components_j"].values()) == pytest.approx(printed_row["energy_per_output_token_j"])


def test_the_text_says_why_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--tpot", "50ms", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "1. Time per token bounds it: " in text
    assert "The next best, " in text
    assert "more than the best: +" in text
    assert text.count("vllm serve meta-llama/Llama-3.1-70B ") == 2


def test_a_rate_names_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explore", "--model", "llama-3.1-8b", "--gpu", "H100-SXM", "--prompt", "1000", "--output", "300",
                 "-tp", "1", "-pp", "1"]  # fmt: skip
    assert main([*arguments, "--tpot", "50ms", "--rate", "3600/min", "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert "60 requests a second keep" in text
    assert "# on each of " in text


def test_files_hold_every_deployment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, page = tmp_path / "all.csv", tmp_path / "report.html"
    assert main([*BASE, "--tpot", "50ms", "--json", "--csv", str(table), "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == printed["deployments"]
    assert sum(row["feasible"] == "True" for row in rows) == printed["feasible"]
    least = min((row for row in rows if row["feasible"] == "True"), key=lambda r: float(r["energy_per_output_token_j"]))
    assert float(least["energy_per_output_token_j"]) == printed["best"][0]["energy_per_output_token_j"]
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.vllm
@pytest.mark.parametrize("arguments", [[*BASE, "--top", "5"], ONLINE, MOE, EVERY, CONTEXTS],
                         ids=["dense", "online quantization", "experts", "every way", "contexts"])  # fmt: skip
def test_vllm_takes_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert main([*arguments, "--json"]) == 0
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for row in json.loads(capsys.readouterr().out)["best"]:
        program, verb, _, *words = shlex.split(row["command"])
        assert (program, verb) == ("vllm", "serve")
        args = parser.parse_args(words)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel",
                     "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "enable_eplb", "all2all_backend",
                     "enable_dbo", "prefill_context_parallel_size", "decode_context_parallel_size"):  # fmt: skip
            assert getattr(args, name) == row[name]
        assert (args.dcp_comm_backend or "ag_rs") == row["dcp_comm_backend"]  # vLLM says later which is its default
        assert args.eplb_config.num_redundant_experts == row["num_redundant_experts"]
        # A checkpoint that is stored in its quantization says so itself.
        assert args.quantization in (None, *QUANTIZATION_METHODS)
        assert args.quantization == (None if "-fp8" in arguments[2] else row["quantization"])
        assert args.gpu_memory_utilization == 0.9
        assert args.max_cudagraph_capture_size == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tp", "3"], "rank h (64) is not divisible by tp = 3"),
        (["--max-gpus", "1", "-q", "none"], "does not fit 1 x H100-SXM: a GPU would hold 141.1 GB of weights"),
        (["--gpus", "7", "-pp", "1", "-q", "none"], "gpus: no deployment of Llama-3.1-70B uses exactly 7 GPUs"),
        (["--gpus", "0"], "--gpus: 0; accepted: 1 or more"),
        (["--max-gpus", "0"], "max_gpus: 0"),
        (["--rate", "-5"], "--rate: '-5'; accepted: a rate such as 20/s"),
        (["--rate", "-3/s"], "--rate: '-3/s'; accepted: a rate such as 20/s"),
        (["--rate", "20/day"], "--rate: '20/day'"),
        (["--rate", "1000/s"], "keeps up with 1000 requests a second"),
        (["--tpot", "fast"], "--tpot: 'fast'; accepted: a time such as 1s or 50ms"),
        (["--tpot", "0ms"], "--tpot: '0ms'"),
        (["--tpot", "1ms"], "tpot: no deployment of Llama-3.1-70B keeps it within 1 ms; the nearest, 8 x H100-SXM"),
        (["--prompt", "-1000"], "--prompt: -1000"),
        (["--gpu", "H100"], "'H100' (did you mean 'H100-SXM'?)"),
        (["--top", "0"], "--top: 0"),
        (["--power-limit-w", "-300"], "power_limit_w: -300.0"),
        (["--csv", "/no/such/folder/x.csv"], "/no/such/folder/x.csv"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
