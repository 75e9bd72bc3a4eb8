"""What the plugin adds to a scheduler step, against what vLLM's own --enable-mfu-metrics adds:

    python benchmarks/overhead.py [MODEL ...] [--requests 256] [--steps 3000] [--steps-per-report 256] [--json]

A real vLLM scheduler with a fake executor, so no GPU and no weights, full of requests that decode. Blocks of its steps
take turns: plain, with vLLM's MFU metrics, with energylens, all of one scheduler in one process. Two ways of measuring,
both medians of CPU time over the steps:

- what is added, timed where it is added: schedule() and update_from_output() of the plugin's subclass less the same
  calls of vLLM's class inside them; and for the MFU metrics the call that update_from_output() makes. The ratio is
  made of these.
- whole steps, less the plain ones. A scheduler's step takes milliseconds, so on a machine that does anything else this
  says little; it is there to show that nothing is hidden.

energylens predicts in a thread, one report for the steps of five seconds. That thread needs Python's lock too, so its
CPU time counts: `thread` is that of a report, divided by the steps in it. An H200 makes some 80 steps a second with 256
requests of an 8B model; with fewer steps a report each costs more. At most a third of what the MFU metrics add is
allowed, the thread included; exit status 1 if it is more.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hooks"))

from energylens_vllm.architectures import load_config

LIMIT = 1 / 3
BLOCK = 8  #: steps of one kind in a row


class Engine:
    """A real scheduler over a fake executor, full of requests that decode."""

    def __init__(self, folder: str, num_requests: int, num_steps: int) -> None:
        from fake_executor import FakeExecutor
        from vllm import LLM, SamplingParams

        os.environ["FAKE_BLOCKS"] = str(num_requests * (1500 + num_steps) // 16 + 1000)
        engine = LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            gpu_memory_utilization=0.08,
            max_model_len=2000 + num_steps,
            max_num_seqs=num_requests,
            max_num_batched_tokens=8192,
            disable_log_stats=False,
            async_scheduling=False,
            enable_prefix_caching=False,
            enable_mfu_metrics=True,
            additional_config={"energylens": {"gpu": "H200-SXM"}},
            distributed_executor_backend=FakeExecutor,
        ).llm_engine
        forever = SamplingParams(max_tokens=num_steps + 500, ignore_eos=True, detokenize=False)
        for i in range(num_requests):
            engine.add_request(str(i), {"prompt_token_ids": [1] * (200 + 37 * i % 1200)}, forever)
        core = engine.engine_core.engine_core
        self.scheduler, self.executor = core.scheduler, core.model_executor
        self.mfu_metrics, self.observer = self.scheduler.perf_metrics, self.scheduler.energylens_observer
        if not self.mfu_metrics.is_enabled():
            sys.exit("vLLM has no MFU metrics for this model")
        if self.observer is None or self.observer.predictor is None:
            sys.exit("energylens cannot predict this model")
        self.observer.has_reporter = True  # as in a server: `report` is what its thread does
        self.inside_s = 0.0  # CPU time of vLLM's own part of a step
        self.mfu_s = 0.0
        base = type(self.scheduler).__base__
        for name in ("schedule", "update_from_output"):
            setattr(base, name, self.timed(getattr(base, name), "inside_s"))
        self.classes = {"plain": base, "mfu": base, "energylens": type(self.scheduler)}
        self.mfu_metrics.get_step_perf_stats_per_gpu = self.timed(self.mfu_metrics.get_step_perf_stats_per_gpu, "mfu_s")
        while self.step("plain")[2] != num_requests:
            pass

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, whose CPU time is added to the attribute `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            result = function(*args, **kwargs)
            setattr(self, name, getattr(self, name) + time.thread_time() - begin)
            return result

        return call

    def step(self, kind: str) -> tuple[float, float, int]:
        """(CPU seconds of schedule and update, of what was added to them, tokens) of one step."""
        scheduler_class = self.classes[kind]
        self.scheduler.perf_metrics = self.mfu_metrics if kind == "mfu" else None
        self.inside_s = self.mfu_s = 0.0
        begin = time.thread_time()
        scheduled = scheduler_class.schedule(self.scheduler)
        middle = time.thread_time()
        self.executor.execute_model(scheduled)
        answer = self.executor.sample_tokens(None)
        self.executor.executed.clear()
        resumed = time.thread_time()
        scheduler_class.update_from_output(self.scheduler, scheduled, answer)
        end = time.thread_time()
        whole_s = middle - begin + end - resumed
        added_s = self.mfu_s if kind == "mfu" else whole_s - self.inside_s
        return whole_s, added_s, scheduled.total_num_scheduled_tokens

    def report(self) -> float:
        """CPU seconds of a report."""
        begin = time.thread_time()
        self.observer.report()
        return time.thread_time() - begin


def measure(model: str, requests: int, steps: int, steps_per_report: int) -> dict[str, float]:
    """Microseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(load_config(model)))
        engine = Engine(folder, requests, 3 * steps)
    kinds = ["plain", "mfu", "energylens"]
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    added: dict[str, list[float]] = {kind: [] for kind in kinds}
    thread, reported = [], 0
    for number in range(steps // BLOCK):
        for kind in kinds[number % 3 :] + kinds[: number % 3]:
            for step in range(BLOCK):
                whole_s, added_s, tokens = engine.step(kind)
                assert tokens == requests, "a step of other than decodes only"
                if step:  # the first of a block finds the caches as another kind has left them
                    whole[kind].append(whole_s)
                    added[kind].append(added_s)
        if (number + 1) * BLOCK - reported >= steps_per_report:
            thread.append(engine.report() / ((number + 1) * BLOCK - reported))
            reported = (number + 1) * BLOCK
    plain = statistics.median(whole["plain"])
    clocks, mfu, path, report = map(statistics.median, (added["plain"], added["mfu"], added["energylens"], thread))
    path -= clocks  # reading the clock is what is added to plain steps
    return {
        "plain_us": 1e6 * plain,
        "mfu_us": 1e6 * mfu,
        "path_us": 1e6 * path,
        "thread_us": 1e6 * report,
        "ratio": (path + report) / mfu,
        "mfu_whole_us": 1e6 * (statistics.median(whole["mfu"]) - plain),
        "path_whole_us": 1e6 * (statistics.median(whole["energylens"]) - plain),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Llama-3.1-8B", "Qwen3-30B-A3B"], help="known models")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--steps-per-report", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {model: measure(model, args.requests, args.steps, args.steps_per_report) for model in args.models}
    if args.json:
        print(json.dumps(results))
    else:
        print(f"{args.requests} requests decoding; microseconds a step, a report each {args.steps_per_report} steps\n")
        print("| model | scheduler | mfu metrics | energylens: path | thread | ratio | whole steps: mfu | energylens |")
        print("| --- " + "| ---: " * 7 + "|")
        for name, r in results.items():
            print(
                f"| {name} | {r['plain_us']:.0f} | {r['mfu_us']:.1f} | {r['path_us']:.1f} | {r['thread_us']:.1f} "
                f"| {r['ratio']:.3f} | {r['mfu_whole_us']:.0f} | {r['path_whole_us']:.0f} |"
            )
    return 0 if all(result["ratio"] <= LIMIT for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
