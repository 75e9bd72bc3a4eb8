"""The plugin on a real GPU: predicted against measured energy under load, and tokens/s with and without the plugin.

    source benchmarks/gpu_setup.sh            # where this checkout is not installed
    python benchmarks/serve_gpu.py out/       # each case is 2 to 4 minutes

Each case is an engine in a process of its own, with random weights and the plugin loaded as vLLM loads it. Requests
arrive as a Poisson stream at two rates, then 256 (or what fits) are kept running. Predicted are the plugin's own
predictions of the steps, and idle power between steps; measured is the GPU's energy counter over the same time.
Then rounds of one fixed batch, alternately with and without the plugin's observer in the same engine.

Writes CASE.json (what is measured), CASE.npz (all steps, for `energylens replay`, format in docs/formats.md), log.txt
and table.md as it goes, and prints the table. What a case has measured is kept if it is stopped or fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import in_process
import numpy as np
from in_process import Engine, Meter, Recorder
from in_turn import run_in_turn, wait_for_turn


@dataclass(frozen=True)
class Plan:
    """How long and how much; times in seconds."""

    rates: tuple[float, float]  #: requests a second
    idle_s: float = 2.0
    warm_s: float = 3.0
    mix_s: float = 20.0
    closed_s: float = 15.0
    closed_requests: int = 256
    pairs: int = 6  #: of rounds with and without
    round_requests: int = 256
    round_tokens: int = 256
    prompt_tokens: tuple[float, float, int] = (600, 0.8, 8000)  #: median, sigma of the log, largest
    output_tokens: tuple[float, float, int] = (200, 0.6, 2000)


TINY_PLAN = Plan(
    (4, 16), idle_s=1.0, warm_s=1.0, mix_s=3.0, closed_s=3.0, closed_requests=8, pairs=2, round_requests=8,
    round_tokens=8, prompt_tokens=(60, 0.8, 400), output_tokens=(20, 0.6, 40),
)  # fmt: skip
#: case -> (title, config, plan, (config, plan) of a trial on vLLM's CPU build)
CASES = {
    "llama8b": ("Llama-3.1-8B, bf16", in_process.LLAMA, Plan((1, 12)), in_process.TINY["llama"]),
    "qwen30b": ("Qwen3-30B-A3B, bf16", in_process.QWEN3_30B_A3B, Plan((1, 12)), in_process.TINY["qwen3_moe"]),
}
#: Share of the KV cache that the closed load may fill, and the tokens that its requests then hold on average.
CLOSED_FILL, CLOSED_MEAN_TOKENS = 0.8, 1300


# -- one case, in a process of its own ----------------------------------------------------------------------------


class Case:
    """One engine under its loads. `result` is what CASE.json holds."""

    def __init__(self, name: str, out: pathlib.Path, tiny: bool) -> None:
        title, config, plan, small = CASES[name]
        self.plan = TINY_PLAN if tiny else plan
        self._out, self._name = out, name
        self.meter = Meter()  # first: without NVML there is no need to wait for an engine
        arguments = in_process.ON_CPU if tiny else in_process.ON_GPU
        largest = self.plan.prompt_tokens[2] + self.plan.output_tokens[2]
        self.engine = Engine(
            small if tiny else config, max_model_len=math.ceil(largest / 256) * 256, disable_log_stats=False,
            **arguments,
        )  # fmt: skip
        engine = self.engine
        engine.log(f"ready, {engine.kv_tokens} KV tokens")
        self.observer = getattr(engine.scheduler, "energylens_observer", None)
        self.predicts = self.observer is not None and self.observer.predictor is not None
        self.predicted = Predicted()
        if self.predicts:
            self.observer.listeners.append(self.predicted.listen)
        else:
            engine.log("the plugin does not predict this engine (log.txt says why): it is measured only")
        self.recorder = Recorder(engine)
        self.recorder.attach()
        self.meter.start()
        self._loads: dict[str, dict[str, Any]] = {}
        self._draw = random.Random(0)
        self.result: dict[str, Any] = dict(
            case=name, title=title, device=self.meter.device(), versions=_versions(), plan=asdict(self.plan),
            start_s=engine.start_s, kv_tokens=engine.kv_tokens, loads=[],
            scheduler=type(engine.scheduler).__name__,
            async_scheduling=bool(engine.llm_engine.vllm_config.scheduler_config.async_scheduling),
        )  # fmt: skip
        self.result["engine"] = described = _described(engine)
        if self.predicts:
            self.result["predicted_idle_power_w"] = _energy_model(described).idle_power_w

    def run(self) -> None:
        plan = self.plan
        self.load("idle", lambda: self._poisson(0.0, plan.idle_s))
        self.recorder.phase = "warm"
        self._closed(min(32, plan.closed_requests), plan.warm_s)
        self.engine.drop_all()
        for rate in plan.rates:
            self.load(f"mix_r{rate:g}", lambda rate=rate: self._poisson(rate, plan.mix_s))
        fits = int(self.engine.kv_tokens * CLOSED_FILL / CLOSED_MEAN_TOKENS)
        running = max(1, min(plan.closed_requests, fits))
        self.load(f"closed_{running}", lambda: self._closed(running, plan.closed_s))
        if self.predicts:
            self.check_export()
            self.observer.listeners.remove(self.predicted.listen)
        self.recorder.detach()
        if self.predicts:
            self.rounds()
        self.meter.stop()

    def load(self, phase: str, drive: Callable[[], Any]) -> None:
        """Run one load, score it, and write what there is so far."""
        self.recorder.phase = phase
        start_s = time.perf_counter()
        requests = drive()
        self._loads[phase] = dict(start_s=start_s, end_s=time.perf_counter(), requests=requests)
        self.recorder.phase = "drain"
        self.engine.drop_all()
        if self.predicts:
            self.observer.report()  # so that the listener has all steps
        score = self._score(phase)
        self.result["loads"].append(score)
        self.write()
        self.engine.log(
            f"{phase}: {score['power_w']:.1f} W measured, {_watts(score)} predicted, "
            f"{score['steps']} steps, {score['sm_clock_mhz']:.0f} MHz{self._failures()}"
        )

    def _failures(self) -> str:
        """What of the plugin has failed so far; the log has the first of each."""
        failed = dict(self.observer.guard.failures) if self.predicts else {}
        return f"; THE PLUGIN FAILED {failed}" if failed else ""

    def _score(self, phase: str) -> dict[str, Any]:
        """Predicted against measured from the first to the last change of the energy counter in a load."""
        load = self._loads[phase]
        window = self.meter.window(load["start_s"], load["end_s"])
        if window is None:
            raise SystemExit(f"{phase}: the energy counter advanced less than twice")
        rows = self.recorder.between(load["start_s"], load["end_s"])
        score = dict(
            load=phase, requests=load["requests"], steps=len(rows), tokens=int(sum(row[4].sum() for row in rows)),
            max_running=max((len(row[4]) for row in rows), default=0), **window,
        )  # fmt: skip
        return score | self._predicted_over(window)

    def _predicted_over(self, window: dict[str, float]) -> dict[str, Any]:
        if not self.predicts:
            return {}
        return self.predicted.over(window["start_s"], window["end_s"], self.result["predicted_idle_power_w"])

    def check_export(self) -> None:
        """What /metrics would show against the sum of the predictions it comes from, over all steps so far."""
        from prometheus_client import REGISTRY

        self.recorder.phase = "flush"
        self.engine.add(8, 2)
        while self.engine.busy:
            self.engine.step()
        exported = sum(
            sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "energylens_predicted_energy_joules_total"
        )
        summed = self.predicted.energy_j
        self.result["exported"] = dict(joules=exported, summed_joules=summed, steps=len(self.predicted),
                                       recorded_steps=len(self.recorder),
                                       failures=dict(self.observer.guard.failures))  # fmt: skip
        self.write()
        self.engine.log(f"exported {exported:.6f} J, the predictions of {len(self.predicted)} of "
                        f"{len(self.recorder)} steps sum to {summed:.6f} J{self._failures()}")  # fmt: skip

    def rounds(self) -> None:
        """Tokens/s of a fixed batch, alternately without and with the plugin: off on, on off, off on, ..."""
        self._round()  # as all after it: caches, clock and temperature
        order = [plugin for pair in range(self.plan.pairs) for plugin in ((False, True), (True, False))[pair % 2]]
        rates: dict[bool, list[float]] = {False: [], True: []}
        for plugin in order:
            self.engine.scheduler.energylens_observer = self.observer if plugin else None
            rates[plugin].append(self._round())
        self.engine.scheduler.energylens_observer = self.observer
        ratios = [on / off for off, on in zip(rates[False], rates[True], strict=True)]
        self.result["throughput"] = dict(
            requests=self.plan.round_requests, output_tokens=self.plan.round_tokens,
            without_tokens_per_s=rates[False], with_tokens_per_s=rates[True], ratios=ratios,
            median_ratio=statistics.median(ratios), failures=dict(self.observer.guard.failures),
            without_spread=(max(rates[False]) - min(rates[False])) / statistics.median(rates[False]),
        )  # fmt: skip
        self.write()
        self.engine.log(f"with over without the plugin: {statistics.median(ratios):.4f} "
                        f"({min(ratios):.4f} to {max(ratios):.4f})")  # fmt: skip

    def _round(self) -> float:
        plan = self.plan
        for _ in range(plan.round_requests):
            self.engine.add(32, plan.round_tokens)
        start_s = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return plan.round_requests * plan.round_tokens / (time.perf_counter() - start_s)

    def _request(self) -> None:
        tokens = [
            int(min(largest, max(4, self._draw.lognormvariate(math.log(median), sigma))))
            for median, sigma, largest in (self.plan.prompt_tokens, self.plan.output_tokens)
        ]
        self.engine.add(*tokens)

    def _poisson(self, rate: float, seconds: float) -> int:
        """Requests as they arrive, for so long; how many."""
        requests = 0
        start_s = time.perf_counter()
        arrival_s = start_s if rate else math.inf
        while (now_s := time.perf_counter()) - start_s < seconds:
            while arrival_s <= now_s:
                self._request()
                requests += 1
                arrival_s += self._draw.expovariate(rate)
            if self.engine.busy:
                self.engine.step()
            else:
                time.sleep(0.001)
        return requests

    def _closed(self, running: int, seconds: float) -> int:
        """So many requests at any time, a new one for each that finishes; how many in all."""
        for _ in range(running):
            self._request()
        requests, start_s = running, time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            for _ in range(self.engine.step()):
                self._request()
                requests += 1
        return requests

    def write(self) -> None:
        in_process.save(self._out / f"{self._name}.npz", self.recorder, self.meter, self.engine)
        (self._out / f"{self._name}.json").write_text(json.dumps(self.result, indent=1, default=str))


class Predicted:
    """Predictions of steps, in the order in which they ended."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self._columns: list[list[Any]] = [[] for _ in range(6)]

    def add(self, *columns: Any) -> None:
        """Steps' start, end, predicted time, predicted energy and its bounds; an array each."""
        for found, column in zip(self._columns, columns, strict=True):
            found.extend(column)

    def listen(self, steps: Sequence[Any], predictions: Any, _: Any) -> None:
        """What the plugin's observer calls with the steps of each report, without predictions if they failed."""
        if predictions is None:
            return
        self.add(
            [step.start_s for step in steps], [step.end_s for step in steps], predictions.time_s, predictions.energy_j,
            predictions.low_j, predictions.high_j,
        )  # fmt: skip
        self.flags.update(predictions.flags, *(step.batch.flags for step in steps))

    def replay(self, recording: pathlib.Path, model: Any) -> None:
        """Predict recorded steps by `model`; a step's measured duration is taken as the plugin takes it."""
        from energylens_vllm.energy.batch import steps_from_arrays

        with np.load(recording) as arrays:
            ended = arrays["t2"] > 0
            steps = steps_from_arrays(arrays["n"], arrays["c"], arrays["off"], model.masks)
            begun_s, end_s = arrays["t0"][ended], arrays["t2"][ended]
        found = model.predict(steps)
        start_s = np.maximum(begun_s, np.concatenate([[-np.inf], end_s[:-1]]))
        self.add(start_s, end_s, *(v[ended] for v in (found.time_s, found.energy_j, found.low_j, found.high_j)))
        self.flags.update(found.flags)

    def __len__(self) -> int:
        return len(self._columns[0])

    @property
    def energy_j(self) -> float:
        """Of all steps."""
        return math.fsum(self._columns[3])

    def over(self, start_s: float, end_s: float, idle_power_w: float) -> dict[str, Any]:
        """Sums over a window: a step counts by the part of it that lies inside, time without steps by idle power."""
        starts, ends, time_s, energy_j, low_j, high_j = (np.array(column, dtype=float) for column in self._columns)
        inside_s = (np.minimum(ends, end_s) - np.maximum(starts, start_s)).clip(min=0.0)
        shares = np.divide(inside_s, ends - starts, out=np.zeros(len(starts)), where=ends > starts)
        duration_s, busy_s = end_s - start_s, float(inside_s.sum())
        idle_j = (duration_s - busy_s) * idle_power_w
        predicted_j = float(shares @ energy_j) + idle_j
        return dict(
            predicted_energy_j=predicted_j, predicted_low_j=float(shares @ low_j) + idle_j,
            predicted_high_j=float(shares @ high_j) + idle_j, predicted_power_w=predicted_j / duration_s, busy_s=busy_s,
            predicted_busy_s=float(shares @ time_s), window_steps=float(shares.sum()), flags=sorted(self.flags),
        )  # fmt: skip


def _described(engine: Engine) -> dict[str, Any]:
    """The engine as the plugin sees it: its Hugging Face config and the arguments of `Deployment`."""
    from energylens_vllm.hooks.vllm.deployment import describe
    from energylens_vllm.serving.start import REFERENCE_GPU, gpu_of

    described = describe(engine.llm_engine.vllm_config)
    gpu = gpu_of(described.device_name) or REFERENCE_GPU
    return dict(config=dict(described.config), deployment={**described.deployment, "gpu": gpu})


def _energy_model(described: dict[str, Any]) -> Any:
    from energylens_vllm import Deployment, EnergyModel

    return EnergyModel(described["config"], Deployment(**described["deployment"]))


def _versions() -> dict[str, str]:
    import torch
    import vllm

    import energylens_vllm

    return dict(vllm=vllm.__version__, torch=torch.__version__, energylens_vllm=energylens_vllm.__version__)


def _watts(score: dict[str, Any]) -> str:
    return f"{score['predicted_power_w']:.1f} W" if "predicted_power_w" in score else "nothing"


# -- all cases, and their table -----------------------------------------------------------------------------------


def read_results(out: pathlib.Path) -> list[dict[str, Any]]:
    """What the cases have written to a folder."""
    return [json.loads((out / f"{name}.json").read_text()) for name in CASES if (out / f"{name}.json").is_file()]


def replay(out: pathlib.Path) -> list[dict[str, Any]]:
    """The same with the recorded steps predicted anew, by the model and the profiles of this checkout."""
    results = read_results(out)
    for result in results:
        model = _energy_model(result["engine"])
        predicted = Predicted()
        predicted.replay(out / f"{result['case']}.npz", model)
        for load in result["loads"]:
            load |= predicted.over(load["start_s"], load["end_s"], model.idle_power_w)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines: list[str] = []
    for device in dict.fromkeys(
        f"{r['device']['name']}, {r['device']['power_limit_w']:.0f} W limit, driver {r['device']['driver']}, "
        f"vLLM {r['versions']['vllm']}, torch {r['versions']['torch']}"
        for r in results
    ):
        lines += [device, ""]
    lines += [
        "| model | load | busy | measured W | predicted W | error | energy J | 90 % interval J | inside "
        "| step ms | predicted ms | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines += [_row(result["title"], load) for load in result["loads"]]
    lines += ["", "| model | tokens/s without | with the plugin | with / without | range | spread without |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for result in results:
        if rounds := result.get("throughput"):
            lines.append(
                f"| {result['title']} | {statistics.median(rounds['without_tokens_per_s']):.0f} "
                f"| {statistics.median(rounds['with_tokens_per_s']):.0f} | {rounds['median_ratio']:.4f} "
                f"| {min(rounds['ratios']):.4f} to {max(rounds['ratios']):.4f} | {rounds['without_spread']:.2%} |"
            )
    return "\n".join(lines)


def _row(title: str, load: dict[str, Any]) -> str:
    start = f"| {title} | {load['load']} "
    if "predicted_energy_j" not in load:
        return start + f"| - | {load['power_w']:.1f} | - | - | {load['energy_j']:.0f} | - | - | - | - | - |"
    measured_j, low_j, high_j = load["energy_j"], load["predicted_low_j"], load["predicted_high_j"]
    ending = "- | - | - | - | -"  # idle power alone has no interval
    if steps := load["window_steps"]:
        ending = (
            f"{low_j:.0f} to {high_j:.0f} | {'yes' if low_j <= measured_j <= high_j else 'no'} "
            f"| {load['busy_s'] / steps * 1e3:.2f} | {load['predicted_busy_s'] / steps * 1e3:.2f} "
            f"| {load['predicted_busy_s'] / load['busy_s'] - 1:+.1%}"
        )
    return start + (
        f"| {load['busy_s'] / load['duration_s']:.0%} | {load['power_w']:.1f} | {load['predicted_power_w']:.1f} "
        f"| {load['predicted_energy_j'] / measured_j - 1:+.1%} | {measured_j:.0f} | {ending} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the folder to write to")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds after which a case is stopped")
    parser.add_argument("--tiny", action="store_true", help="a trial: small shapes and short loads on vLLM's CPU build")
    parser.add_argument("--replay", action="store_true", help="run nothing: predict the steps recorded in `out` anew")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"case {unknown[0]!r}; accepted: {', '.join(CASES)}")
    if args.replay:
        print(table(replay(args.out)))
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        wait_for_turn(CASES[args.cases[0]][1]["architectures"][0])
        Case(args.cases[0], out, args.tiny).run()
        sys.stdout.flush()
        os._exit(0)  # the engine's own shutdown takes seconds of GPU time
    script = [sys.executable, str(pathlib.Path(__file__).resolve()), str(out)]
    flags = ["--inside", *["--tiny"] * args.tiny]
    passed = run_in_turn({name: [*script, name, *flags] for name in args.cases or CASES}, out / "log.txt", args.timeout)
    text = table(read_results(out))
    (out / "table.md").write_text(text + "\n")
    print(text)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
