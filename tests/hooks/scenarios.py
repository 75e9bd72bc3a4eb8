"""Drives a real vLLM's scheduler through a fake executor, in this process:  python scenarios.py MODEL NAME...

Prints one JSON object a scenario: the steps as the executor saw them, what /metrics shows of them, and what the
requests got. Run apart because an engine leaves much behind in its process, and to run other releases of vLLM.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_TARGET_DEVICE="cpu",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)
sys.path.insert(0, str(Path(__file__).parent))

import vllm
from fake_executor import FakeExecutor
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler

from energylens_vllm.hooks.vllm import start as hook_start
from energylens_vllm.hooks.vllm import transport
from energylens_vllm.hooks.vllm.batch import Reader, Recorder
from energylens_vllm.hooks.vllm.deployment import describe
from energylens_vllm.serving import start as serving_start
from energylens_vllm.serving.observer import StepObserver

SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {}
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


def scenario(run: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    SCENARIOS[run.__name__] = run
    return run


def allow_asynchronous_scheduling() -> None:
    """vLLM's CPU platform switches it off, having nothing to overlap; the fake executor has."""
    platform = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    platform.check_and_update_config = classmethod(check_and_update_config)


class UserScheduler(Scheduler):
    """Somebody's own."""


def start(model: str, name: str, blocks: int = 4096, step_s: float = 0.0, **arguments: Any) -> LLM:
    os.environ.update(FAKE_BLOCKS=str(blocks), FAKE_STEP_S=str(step_s))
    defaults: dict[str, Any] = {
        "disable_log_stats": False,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "max_model_len": 1024,
    }
    return LLM(
        model,
        served_model_name=name,
        load_format="dummy",
        gpu_memory_utilization=0.08,
        distributed_executor_backend=FakeExecutor,
        **(defaults | arguments),
    )


def finish(llm: LLM, name: str, outputs: Sequence[Any]) -> dict[str, Any]:
    core = llm.llm_engine.engine_core.engine_core
    observer = getattr(core.scheduler, "energylens_observer", None)
    samples = [
        sample
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("energylens_")
        and not sample.name.endswith("_created")
        and sample.labels["model_name"] == name
    ]
    return {
        "scheduler": [cls.__name__ for cls in type(core.scheduler).__mro__[:3]],
        "executed": [[list(step.requests.values()), step.num_drafts] for step in core.model_executor.executed],
        "deployment": dict(describe(llm.llm_engine.vllm_config).deployment),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "waiting": None if observer is None else [len(observer.outbox), len(observer._ended), len(observer._in_flight)],
        "failures": None if observer is None else dict(observer.guard.failures),
        "metrics": {
            " ".join((s.name, *(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")))): s.value
            for s in samples
        },
    }


def prompts(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [(i + j) % 200 for j in range(length)]} for i, length in enumerate(lengths)]


def simple(model: str, name: str, lengths: Sequence[int] = (12, 40, 7), **arguments: Any) -> dict[str, Any]:
    llm = start(model, name, **arguments)
    return finish(llm, name, llm.generate(prompts(*lengths), SHORT, use_tqdm=False))


@scenario
def plain(model: str) -> dict[str, Any]:
    return simple(model, "plain")


@scenario
def asynchronous(model: str) -> dict[str, Any]:
    llm = start(model, "asynchronous", step_s=0.01, async_scheduling=True)
    begin = time.perf_counter()
    outputs = llm.generate(prompts(12, 40, 7), SHORT, use_tqdm=False)
    wall_s = time.perf_counter() - begin
    time.sleep(0.3)  # idle time, which is in no step
    outputs += llm.generate(prompts(12), SHORT, use_tqdm=False)
    return finish(llm, "asynchronous", outputs) | {"wall_s": time.perf_counter() - begin - 0.3, "first_s": wall_s}


@scenario
def chunked(model: str) -> dict[str, Any]:
    return simple(model, "chunked", (300, 40, 7), max_num_batched_tokens=64, max_num_seqs=8)


@scenario
def prefix_caching(model: str) -> dict[str, Any]:
    llm = start(model, "prefix_caching", enable_prefix_caching=True)
    outputs = llm.generate(prompts(100), SHORT, use_tqdm=False)
    outputs += llm.generate(prompts(100), SHORT, use_tqdm=False)
    return finish(llm, "prefix_caching", outputs)


@scenario
def preemption(model: str) -> dict[str, Any]:
    llm = start(model, "preemption", blocks=14, max_model_len=192)
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    return finish(llm, "preemption", llm.generate(prompts(60, 61, 62), long, use_tqdm=False))


@scenario
def abort(model: str) -> dict[str, Any]:
    llm = start(model, "abort", async_scheduling=True)
    engine = llm.llm_engine
    names = [engine.add_request(str(i), prompt, SHORT) for i, prompt in enumerate(prompts(12, 40, 7))]
    outputs = []
    for step in range(100):
        outputs += [output for output in engine.step() if output.finished]
        if step == 3:
            engine.abort_request([str(names[1] or 1), "1"])
        if not engine.has_unfinished_requests():
            break
    return finish(llm, "abort", outputs)


@scenario
def speculative(model: str) -> dict[str, Any]:
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    return simple(model, "speculative", speculative_config=drafts)


@scenario
def lora(model: str) -> dict[str, Any]:
    llm = start(model, "lora", enable_lora=True)
    outputs = llm.generate(prompts(12), SHORT, use_tqdm=False)
    outputs += llm.generate(prompts(12), SHORT, use_tqdm=False, lora_request=LoRARequest("a", 1, "/nowhere"))
    return finish(llm, "lora", outputs)


@scenario
def users_scheduler(model: str) -> dict[str, Any]:
    return simple(model, "users_scheduler", scheduler_cls=UserScheduler)


@scenario
def pipeline(model: str) -> dict[str, Any]:
    return simple(model, "pipeline", step_s=0.002, pipeline_parallel_size=2)


@scenario
def without_statistics(model: str) -> dict[str, Any]:
    return simple(model, "without_statistics", disable_log_stats=True)


@scenario
def switched_off(model: str) -> dict[str, Any]:
    return simple(model, "switched_off", additional_config={"energylens": {"enabled": False}})


@scenario
def bad_settings(model: str) -> dict[str, Any]:
    return simple(model, "bad_settings", additional_config={"energylens": {"gpus": 1}})


@scenario
def unknown_gpu(model: str) -> dict[str, Any]:
    return simple(model, "unknown_gpu", additional_config={"energylens": {"gpu": "H2000-SXM"}})


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("on purpose")


def with_broken(model: str, scenario_name: str, holder: Any, name: str, broken: Any = _broken) -> dict[str, Any]:
    """The plain requests while `holder.name` fails."""
    original = getattr(holder, name)
    setattr(holder, name, broken)
    try:
        return simple(model, scenario_name)
    finally:
        setattr(holder, name, original)


@scenario
def broken_predict(model: str) -> dict[str, Any]:
    llm = start(model, "broken_predict")
    llm.llm_engine.engine_core.engine_core.scheduler.energylens_observer.predictor = SimpleNamespace(predict=_broken)
    return finish(llm, "broken_predict", llm.generate(prompts(12, 40, 7), SHORT, use_tqdm=False))


@scenario
def broken_model(model: str) -> dict[str, Any]:
    return with_broken(model, "broken_model", serving_start, "make_predictor")


@scenario
def broken_config(model: str) -> dict[str, Any]:
    return with_broken(model, "broken_config", hook_start, "describe")


@scenario
def malformed_batches(model: str) -> dict[str, Any]:
    """SchedulerOutputs that lack what is read of them."""
    return with_broken(model, "malformed_batches", Recorder, "__call__", lambda self, output: output.no_such_field)


@scenario
def unreadable_batches(model: str) -> dict[str, Any]:
    return with_broken(model, "unreadable_batches", Reader, "__call__")


@scenario
def broken_report(model: str) -> dict[str, Any]:
    return with_broken(model, "broken_report", StepObserver, "report")


@scenario
def no_stats_field(model: str) -> dict[str, Any]:
    """Statistics that take no report."""
    return with_broken(model, "no_stats_field", transport, "attach")


@scenario
def registry_reset(model: str) -> dict[str, Any]:
    llm = start(model, "registry_reset")
    for collector in list(REGISTRY._collector_to_names):
        REGISTRY.unregister(collector)
    return finish(llm, "registry_reset", llm.generate(prompts(12, 40, 7), SHORT, use_tqdm=False))


class Log(logging.Handler):
    """What energylens says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    model, *names = sys.argv[1:]
    allow_asynchronous_scheduling()
    log = Log()
    logging.getLogger("energylens_vllm").addHandler(log)
    for name in names or SCENARIOS:
        log.lines.clear()
        result = SCENARIOS[name](model)
        print(json.dumps({"name": name, "vllm": vllm.__version__, "log": log.lines} | result), flush=True)


if __name__ == "__main__":
    main()
