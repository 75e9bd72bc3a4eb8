"""Record scheduler steps, power and energy of real vLLM under steady and mixed load on one or two GPUs.

    python benchmarks/record_steps.py out/ llama8b-fp8 gptoss20b      # a minute or two each

Random weights, an engine for each case in a process of its own, prompts of random tokens. Writes CASE.npz in the step
format that `energylens replay` reads (docs/formats.md), CASE_points.csv with one row per steady window, and log.txt.
Needs vLLM and one NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import in_process
import numpy as np
from in_process import Engine, Meters, Recorder
from in_turn import run_in_turn, wait_for_turn

SETTLE_S = 0.5  #: before each steady window: batch, clock and counter settle
GROWTH = 400  #: tokens that a sequence may gain while it is part of the decode points
LONGEST_OUTPUT = 6000


@dataclass(frozen=True)
class Points:
    """What is recorded of a case."""

    decodes: Sequence[tuple[int, Sequence[int]]]  #: (tokens of each prompt, numbers of sequences)
    prompts: Sequence[int]  #: tokens of the prompts that prefill points are made of
    rates: Sequence[float]  #: requests a second of the mixed loads
    idle_s: float = 1.0
    mix_s: float = 6.0
    route_by_token: bool = False  #: experts are chosen as in a trained model, not as random weights happen to
    uneven: bool = False  #: with it: some experts are chosen far more often, and the plugin counts how often


FAST = Points([(256, (1, 4, 16, 64, 256)), (2048, (8, 32)), (8000, (4, 12))], (64, 512, 2048, 8192), (8,))
ROUTED = replace(FAST, route_by_token=True)
SLOW = Points([(256, (1, 8, 32, 64, 128)), (2048, (8, 16)), (8000, (4,))], (64, 512, 2048, 8192), (3,))
TRIAL = Points([(32, (1, 4))], (64, 512), (4,), mix_s=2.0)
UNEVEN = replace(FAST, decodes=[(256, (16, 64, 256))], prompts=(2048, 8192), rates=(), route_by_token=True, uneven=True)
CONTEXT = Points([(256, (1, 16, 128)), (8000, (4, 16, 48))], (2048,), (4,))
TP2: dict[str, Any] = dict(tensor_parallel_size=2)
DCP2 = TP2 | dict(decode_context_parallel_size=2)
EP2 = TP2 | dict(enable_expert_parallel=True)
#: One KV head, which both GPUs then hold: what decode-context parallelism needs without latent attention.
LLAMA_MQA = in_process.LLAMA | dict(num_key_value_heads=1)
LLAMA, QWEN3_30B_A3B = in_process.LLAMA, in_process.QWEN3_30B_A3B
#: name -> (config, LLM arguments, points)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Points]] = {
    "llama8b": (LLAMA, {}, FAST),
    "llama8b-fp8": (LLAMA, dict(quantization="fp8"), FAST),
    "llama8b-eager": (LLAMA, dict(enforce_eager=True), Points([(256, (1, 16, 64, 256))], (512, 8192), (4,))),
    "llama8b-fp8kv": (LLAMA, dict(kv_cache_dtype="fp8"), Points([(2048, (1, 32, 128))], (2048,), ())),
    "qwen14b": (in_process.QWEN3_14B, {}, SLOW),
    "qwen32b": (in_process.QWEN3_32B, {}, SLOW),
    "qwen30b": (QWEN3_30B_A3B, {}, FAST),
    "qwen30b-fp8": (QWEN3_30B_A3B, dict(quantization="fp8"), FAST),
    "gptoss20b": (in_process.GPT_OSS_20B, {}, FAST),
    "qwen30b-routed": (QWEN3_30B_A3B, {}, ROUTED),
    "qwen30b-fp8-routed": (QWEN3_30B_A3B, dict(quantization="fp8"), ROUTED),
    "gptoss20b-routed": (in_process.GPT_OSS_20B, {}, ROUTED),
    "llama8b-tp2": (LLAMA, TP2, FAST),
    "qwen32b-tp2": (in_process.QWEN3_32B, TP2, FAST),
    "qwen30b-tp2": (QWEN3_30B_A3B, TP2, ROUTED),
    "qwen30b-ep2": (QWEN3_30B_A3B, EP2, ROUTED),
    "qwen30b-uneven-tp2": (QWEN3_30B_A3B, TP2, UNEVEN),
    "qwen30b-uneven-ep2": (QWEN3_30B_A3B, EP2, UNEVEN),
    "llama8b-pp2": (LLAMA, dict(pipeline_parallel_size=2), FAST),
    "deepseek-lite-tp2": (in_process.DEEPSEEK_V2_LITE, TP2, replace(CONTEXT, route_by_token=True)),
    "deepseek-lite-dcp2": (in_process.DEEPSEEK_V2_LITE, DCP2, replace(CONTEXT, route_by_token=True)),
    "llama8b-mqa-tp2": (LLAMA_MQA, TP2, CONTEXT),
    "llama8b-mqa-dcp2": (LLAMA_MQA, DCP2, CONTEXT),
    # A trial on vLLM's CPU build.
    "tiny": (in_process.TINY["qwen3"], in_process.ON_CPU, TRIAL),
    "tiny-uneven": (in_process.TINY["qwen3_moe"], in_process.ON_CPU, replace(TRIAL, route_by_token=True, uneven=True)),
    "tiny-routed": (in_process.TINY["qwen3_moe"], in_process.ON_CPU, replace(TRIAL, route_by_token=True)),
}


class Recording:
    """One engine, its recorder and its meter; the methods are the kinds of point."""

    def __init__(self, name: str, out: pathlib.Path, window_s: float) -> None:
        config, arguments, self._points = CASES[name]
        self._out, self._name, self._window_s = out, name, window_s
        # First: without NVML there is no need to wait for an engine.
        self._meter = Meters(arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1))
        if self._points.uneven:
            setting = {"learn_expert_routing": True, "report_interval_s": 1}
            arguments = arguments | dict(additional_config={"energylens": setting}, disable_log_stats=False)
        self.engine = Engine(config, max_model_len=16384, **in_process.ON_GPU | arguments)
        if self._points.route_by_token:
            self.engine.route_by_token(self._points.uneven)
        self.engine.log(f"ready, {self.engine.kv_tokens} KV tokens")
        self._recorder = Recorder(self.engine)
        self._recorder.attach()
        self._meter.start()
        self._rows: list[dict[str, Any]] = []
        self.engine.log(str(self._meter.device()))

    def run(self) -> None:
        points = self._points
        self._idle(points.idle_s)
        for length in points.prompts:
            self._prefill(length)
        for context, batches in points.decodes:
            self._decode(context, batches)
        self._save()
        for rate in points.rates:
            self._mixed(rate, points.mix_s)
        self._idle(points.idle_s)
        self._meter.stop()
        self._save()
        if self._points.uneven:
            self._save_counts()
        self.engine.log("done")

    def _save_counts(self) -> None:
        """What the plugin has counted, as `--expert-routing` takes it, and the tokens that went through the layers."""
        from energylens_vllm.hooks.vllm.expert_counts import PUBLISH_S
        from energylens_vllm.serving.expert_counts import Reader, folder

        time.sleep(PUBLISH_S + 1.0)  # the last are published
        counts = Reader(folder(self.engine.llm_engine.vllm_config.instance_id, 0))()
        assert counts is not None, "nothing was counted: log.txt says why"
        np.save(self._out / f"{self._name}_counts.npy", counts.selections)
        tokens = int(self._recorder.arrays()["n"].sum())
        chosen = counts.selections.sum(axis=1) / counts.selected
        self.engine.log(f"{tokens} tokens, counted in each layer {sorted(set(chosen.tolist()))}")

    def _idle(self, seconds: float) -> None:
        self._recorder.phase = "idle"
        start_s = time.perf_counter()
        time.sleep(seconds)
        self._mark(start_s)

    def _decode(self, context: int, batches: Sequence[int]) -> None:
        """Batches of growing size, each made of the one before and new sequences of `context` tokens."""
        engine, scheduler, sequences = self.engine, self.engine.scheduler, 0
        for batch in batches:
            if batch * (context + GROWTH) > engine.kv_tokens * 0.95:
                break
            self._recorder.phase = "fill"
            for _ in range(batch - sequences):
                engine.add(context, LONGEST_OUTPUT)
            sequences = batch
            while len(scheduler.running) < batch or any(r.num_computed_tokens < context for r in scheduler.running):
                engine.step()
            self._recorder.phase = f"decode_b{batch}_c{context}"
            self._steady(lambda: None)
        engine.drop_all()
        self._save()

    def _prefill(self, length: int) -> None:
        """Prompts of `length` tokens and one token of output each, back to back, two steps' worth of them waiting."""
        engine, scheduler = self.engine, self.engine.scheduler
        waiting = max(4, 2 * 8192 // length)

        def feed() -> None:
            while len(scheduler.waiting) + len(scheduler.running) < waiting:
                engine.add(length, 1)

        self._recorder.phase = f"prefill_l{length}"
        self._steady(feed)
        engine.drop_all()

    def _steady(self, feed: Callable[[], None]) -> None:
        """Step until the load has settled, then for one window."""
        for seconds in (SETTLE_S, self._window_s):
            start_s = time.perf_counter()
            while time.perf_counter() - start_s < seconds:
                feed()
                self.engine.step()
        self._mark(start_s)

    def _mixed(self, rate: float, seconds: float) -> None:
        """A Poisson stream of requests with lognormal lengths."""
        self._recorder.phase = f"mix_r{rate:g}"
        draw = random.Random(int(rate))
        start_s = arrival_s = time.perf_counter()
        while (now_s := time.perf_counter()) - start_s < seconds:
            while arrival_s <= now_s:
                prompt = int(min(8000, max(16, draw.lognormvariate(6.397, 0.8))))  # median 600
                output = int(min(2000, max(4, draw.lognormvariate(5.298, 0.6))))  # median 200
                self.engine.add(prompt, output)
                arrival_s += draw.expovariate(rate)
            if self.engine.busy:
                self.engine.step()
            else:
                time.sleep(0.001)
        self._mark(start_s)
        self.engine.drop_all()

    def _mark(self, start_s: float) -> None:
        """One CSV row for the window from `start_s` to now."""
        end_s = time.perf_counter()
        phase, rows = self._recorder.phase, self._recorder.between(start_s, end_s)
        self._recorder.phase = "drain"
        nan = float("nan")
        measured = self._meter.window(start_s, end_s) or dict(power_w=nan, sm_clock_mhz=nan, temperature_c=nan)
        seconds, steps = end_s - start_s, max(1, len(rows))
        self._rows.append(dict(
            point=phase, window_s=round(seconds, 4), steps=len(rows), tokens=sum(int(row[4].sum()) for row in rows),
            prefill_tokens=sum(int(row[4][row[4] > 1].sum()) for row in rows), power_w=round(measured["power_w"], 2),
            energy_j=round(measured["power_w"] * seconds, 2), mean_step_s=seconds / steps,
            energy_per_step_j=measured["power_w"] * seconds / steps, mean_sm_clock_mhz=measured["sm_clock_mhz"],
            gpu_temp_c=measured["temperature_c"],
        ))  # fmt: skip
        self.engine.log(f"{phase:22s} {measured['power_w']:6.1f} W {seconds / steps * 1e3:8.3f} ms "
                        f"{measured['sm_clock_mhz']:.0f} MHz")  # fmt: skip

    def _save(self) -> None:
        in_process.save(self._out / f"{self._name}.npz", self._recorder, self._meter, self.engine)
        with open(self._out / f"{self._name}_points.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(self._rows[0]))
            writer.writeheader()
            writer.writerows(self._rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the folder to write to")
    parser.add_argument("cases", nargs="+", metavar="CASE", choices=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--window", type=float, default=1.3, help="seconds of each steady window (default: 1.3)")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds after which a case is stopped")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        wait_for_turn(CASES[args.cases[0]][0]["architectures"][0])
        Recording(args.cases[0], out, args.window).run()
        sys.stdout.flush()
        os._exit(0)  # the engine's own shutdown takes seconds of GPU time
    script = [sys.executable, str(pathlib.Path(__file__).resolve()), str(out)]
    flags = ["--inside", f"--window={args.window}"]
    passed = run_in_turn({name: [*script, name, *flags] for name in args.cases}, out / "log.txt", args.timeout)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
