"""`vllm serve` with the plugin on a real GPU and a profile that is off by 20 %: what learning makes of it.

    source benchmarks/gpu_setup.sh                 # where this checkout is not installed
    python benchmarks/learn_gpu.py out/            # 6 minutes; --tp 2 on two GPUs
    python benchmarks/learn_gpu.py out/ --replay   # runs nothing: what was recorded, served again with every profile

One server with the shape of Llama-3.1-8B (or another --model) and random weights, the plugin found as users have it,
its engine in a process of its own, attribution and request log on. Load is mixed: Poisson streams of changing rate,
closed queues, pauses; a fifth of the prompts was seen before. After 3 minutes, wMAPE over windows of 5 s of the profile
alone and of what the plugin exported, with what it had learnt until then. Checked in the same run:

- meter: joules on /metrics against this script's own readings of the energy counter and against power integrated here;
- pairing: windows compared, and their measured joules against the counter;
- attribution: all accounts against the predicted total, the log against /metrics, responses against the log.

Writes result.json, table.md, scrapes of /metrics once a second, requests, own NVML readings, the plugin's request log,
the server's log, what was learnt, and every step, reading and window of the engine (engine_recorder.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import engine_recorder
import learn_recorded
import numpy as np
from in_process import CAPTURE_SIZES, LLAMA, QWEN3_30B_A3B, TINY

LEARNING_S = 180.0
PORT = 8820
MODELS = {"llama8b": LLAMA, "qwen30b": QWEN3_30B_A3B}
WRITTEN = ("engine", "learnt", "request_log.jsonl")  #: by the engine


@dataclass(frozen=True)
class Plan:
    """Loads of one round, (kind, how many, seconds): requests a second, requests kept running, or nothing."""

    loads: tuple[tuple[str, float, float], ...]
    total_s: float
    learning_s: float
    prompt_tokens: tuple[float, float, int]  #: median, sigma of the log, largest
    output_tokens: tuple[float, float, int]


MIXED = Plan(
    (
        ("rate", 2, 14), ("rate", 12, 16), ("closed", 48, 12), ("idle", 0, 6), ("rate", 6, 14), ("rate", 24, 14),
        ("closed", 160, 12), ("rate", 1, 10),
    ),
    300.0, LEARNING_S, (500, 0.8, 6000), (150, 0.6, 1000),
)  # fmt: skip
TRIAL = Plan((("rate", 2, 5), ("closed", 4, 5), ("idle", 0, 3)), 20.0, 8.0, (40, 0.8, 200), (10, 0.6, 30))


# -- the server ---------------------------------------------------------------------------------------------------


class Server:
    """`vllm serve` of random weights, until the end of a `with`."""

    def __init__(self, out: pathlib.Path, config: Mapping[str, Any], tp: int, tiny: bool, environment: dict[str, str]):
        self.url = f"http://127.0.0.1:{PORT}"
        self._folder = tempfile.TemporaryDirectory()
        pathlib.Path(self._folder.name, "config.json").write_text(json.dumps(config))
        engine_recorder.install(pathlib.Path(self._folder.name, "site"))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self._folder.name]
        command += ["--served-model-name=random", "--load-format=dummy", "--dtype=bfloat16", "--skip-tokenizer-init"]
        command += ["--host=127.0.0.1", f"--port={PORT}", f"--tensor-parallel-size={tp}", "--max-num-seqs=256"]
        command += ["--plugin=energylens", "--max-model-len=8192", "--middleware"]
        command += ["energylens_vllm.hooks.vllm.middleware.EnergyMiddleware"]
        if tiny:
            command += ["--gpu-memory-utilization=0.08", "--enforce-eager"]
        else:
            graphs = json.dumps({"cudagraph_capture_sizes": [size for size in CAPTURE_SIZES if size <= 256]})
            command += ["--max-num-batched-tokens=8192", f"--compilation-config={graphs}"]
        python_path = [str(pathlib.Path(self._folder.name, "site")), os.environ.get("PYTHONPATH", "")]
        inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        quiet = dict(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0",
                     VLLM_ALLREDUCE_USE_SYMM_MEM="0")  # fmt: skip
        self._log = open(out / "server.log", "wb")  # noqa: SIM115 - for as long as the server
        self._process = subprocess.Popen(
            command, cwd=self._folder.name, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**inherited, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, python_path)), **environment},
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()
        self._folder.cleanup()

    async def ready(self, session: Any, timeout_s: float) -> None:
        """Return when it answers. Raises SystemExit if it ends before, or takes longer."""
        end_s = time.perf_counter() + timeout_s
        while time.perf_counter() < end_s and self._process.poll() is None:
            with contextlib.suppress(Exception):
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.3)
        said = pathlib.Path(self._log.name).read_text(errors="replace")[-6000:]
        raise SystemExit(f"{said}\nthe server does not answer; its exit status is {self._process.poll()}")


# -- the load -----------------------------------------------------------------------------------------------------


class Load:
    """Sends requests, and notes what came of each."""

    def __init__(self, session: Any, url: str, plan: Plan, vocabulary: int) -> None:
        self._session, self._url, self._plan = session, url, plan
        self._draw, self._vocabulary = random.Random(0), vocabulary
        self._open: set[asyncio.Task[None]] = set()
        self._seen: list[list[int]] = []
        self.requests: list[dict[str, Any]] = []
        self.phases: list[tuple[str, float, float]] = []

    async def run(self) -> None:
        """All of the plan; then wait for the requests that are still running."""
        start_s = time.perf_counter()
        while True:
            for kind, number, seconds in self._plan.loads:
                left_s = start_s + self._plan.total_s - time.perf_counter()
                if left_s <= 0.0:
                    await asyncio.gather(*self._open)
                    return
                begin_s = time.perf_counter()
                await getattr(self, f"_{kind}")(number, min(seconds, left_s))
                self.phases.append((f"{kind}_{number:g}", begin_s, time.perf_counter()))
                log(f"{kind} {number:g}: {len(self._open)} requests are open, {len(self.requests)} have finished")

    async def _rate(self, rate: float, seconds: float) -> None:
        end_s = time.perf_counter() + seconds
        next_s = time.perf_counter() + self._draw.expovariate(rate)
        while next_s < end_s:
            await asyncio.sleep(max(next_s - time.perf_counter(), 0.0))
            self._start()
            next_s += self._draw.expovariate(rate)
        await asyncio.sleep(max(end_s - time.perf_counter(), 0.0))

    async def _closed(self, number: float, seconds: float) -> None:
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            while len(self._open) < number:
                self._start()
            await asyncio.wait(self._open, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)

    async def _idle(self, _: float, seconds: float) -> None:
        if self._open:
            await asyncio.gather(*self._open)
        await asyncio.sleep(seconds)

    def _start(self) -> None:
        task = asyncio.create_task(self._send())
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _send(self) -> None:
        prompt_tokens, output_tokens = (
            int(min(largest, max(4, self._draw.lognormvariate(math.log(median), sigma))))
            for median, sigma, largest in (self._plan.prompt_tokens, self._plan.output_tokens)
        )
        if self._seen and self._draw.random() < 0.2:
            prompt = self._draw.choice(self._seen)
        else:
            prompt = [self._draw.randrange(10, self._vocabulary - 10) for _ in range(prompt_tokens)]
            self._seen = [*self._seen[-7:], prompt]
        body = dict(model="random", prompt=prompt, max_tokens=output_tokens, ignore_eos=True, temperature=0.0,
                    detokenize=False, vllm_xargs={"energylens": 1})  # fmt: skip
        begin_s = time.perf_counter()
        row: dict[str, Any] = dict(begin_s=begin_s, prompt_tokens=len(prompt), output_tokens=output_tokens)
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                answer = await response.json()
                row |= dict(id=answer.get("id"), usage=answer.get("usage"), status=response.status)
                row["joules_header"] = response.headers.get("x-energylens-joules")
        except Exception as error:
            row["error"] = repr(error)
        self.requests.append(row | dict(end_s=time.perf_counter()))


# -- what is measured here, beside the plugin ---------------------------------------------------------------------


class Gauge(threading.Thread):
    """Counter and power of the first `count` GPUs, each counter at its advances."""

    def __init__(self, count: int) -> None:
        super().__init__(name="gauge", daemon=True)
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._gpus = pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        self.names = [_text(pynvml.nvmlDeviceGetName(gpu)) for gpu in self._gpus]
        self.limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._gpus[0]) / 1e3
        self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
        self.counters: list[list[tuple[float, float]]] = [[] for _ in self._gpus]  #: (s, J)
        self.powers: list[list[tuple[float, float]]] = [[] for _ in self._gpus]  #: (s, W)
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.1):
            for gpu, counter, power in zip(self._gpus, self.counters, self.powers, strict=True):
                power.append((time.perf_counter(), self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3))
                if not counter or time.perf_counter() - counter[-1][0] >= 1.0:
                    counter.append(self._at_advance(gpu))

    def _at_advance(self, gpu: Any) -> tuple[float, float]:
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        first, end_s = read(gpu), time.perf_counter() + 0.3
        while (value := read(gpu)) == first and time.perf_counter() < end_s:
            pass
        return time.perf_counter(), value / 1e3

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def counted_j(self, start_s: float, end_s: float) -> float:
        """By the counters, over all GPUs; between advances by straight lines."""
        return sum(float(np.diff(np.interp([start_s, end_s], *np.array(rows).T))[0]) for rows in self.counters)

    def integrated_j(self, start_s: float, end_s: float) -> float:
        """By power, over all GPUs. It is the mean of the last second, so that of half a second ago."""
        total = 0.0
        for rows in self.powers:
            at_s, watts = np.array(rows).T
            grid = np.arange(start_s, end_s, 0.02)
            total += float(np.interp(grid + 0.5, at_s, watts).mean()) * (end_s - start_s)
        return total


class Scraper:
    """Our samples on /metrics once a second: (s, name{labels} -> value)."""

    def __init__(self, session: Any, url: str) -> None:
        self._session, self._url = session, url
        self.rows: list[tuple[float, dict[str, float]]] = []

    async def run(self) -> None:
        while True:
            await self.scrape()
            await asyncio.sleep(1.0)

    async def scrape(self) -> dict[str, float]:
        async with self._session.get(f"{self._url}/metrics") as response:
            text = await response.text()
        found = {}
        for line in text.splitlines():
            if line.startswith("energylens_") and "_created{" not in line and "_bucket{" not in line:
                name, value = line.rsplit(" ", 1)
                labels = re.findall(r'(\w+)="([^"]*)"', name)
                kept = ",".join(f"{key}={text}" for key, text in labels if key not in ("model_name", "engine"))
                found[name.partition("{")[0] + (f" {kept}" if kept else "")] = float(value)
        self.rows.append((time.perf_counter(), found))
        return found


# -- the run ------------------------------------------------------------------------------------------------------


async def run(
    out: pathlib.Path, config: Mapping[str, Any], tp: int, tiny: bool, factors: Mapping[str, float], total_s: float
) -> None:
    import aiohttp

    from energylens_vllm.hardware import load_profile
    from energylens_vllm.serving.start import REFERENCE_GPU, gpu_of

    for name in WRITTEN:  # the engine adds to what is there
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    plan = TRIAL if tiny else Plan(MIXED.loads, total_s, min(LEARNING_S, 0.6 * total_s), *_lengths(MIXED))
    gauge = Gauge(tp)
    gpu = gpu_of(gauge.names[0]) or REFERENCE_GPU
    profile = out / "off.json"
    profile.write_text(json.dumps(learn_recorded.off(load_profile(gpu), factors).to_json()))
    environment = dict(
        ENERGYLENS_GPU=str(profile), ENERGYLENS_ATTRIBUTION="1", ENERGYLENS_REQUEST_LOG=str(out / "request_log.jsonl"),
        ENERGYLENS_LEARNING_FOLDER=str(out / "learnt"), ENERGYLENS_REPORT_INTERVAL_S="1",
    )  # fmt: skip
    environment[engine_recorder.FOLDER] = str(out / "engine")
    if tiny:
        environment |= {engine_recorder.FAKE_GPUS: str(tp), "VLLM_CPU_KVCACHE_SPACE": "1"}
    result: dict[str, Any] = dict(
        gpus=gauge.names, driver=gauge.driver, power_limit_w=gauge.limit_w, gpu=gpu, tp=tp, off=dict(factors),
        config=config, learning_s=plan.learning_s,
    )  # fmt: skip
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # sooner than the server closes idle connections
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        with Server(out, config, tp, tiny, environment) as server:
            began_s = time.perf_counter()
            await server.ready(session, 480.0 if tiny else 240.0)
            log(f"the server answers after {time.perf_counter() - began_s:.1f} s")
            gauge.start()
            scraper, load = Scraper(session, server.url), Load(session, server.url, plan, config["vocab_size"])
            await scraper.scrape()
            scraping = asyncio.create_task(scraper.run())
            result["start_s"] = time.perf_counter()
            try:
                await load.run()
                await asyncio.sleep(4.0)  # the last accounts are closed and reported
            finally:
                scraping.cancel()
                await scraper.scrape()
                result["end_s"] = time.perf_counter()
                await asyncio.sleep(1.5)  # power of half a second later
                gauge.stop()
                _write(out, result, gauge, scraper, load)
    result["checks"] = check(out, result, gauge, scraper, load.requests)
    (out / "result.json").write_text(json.dumps(result, indent=1, default=str))


def _lengths(plan: Plan) -> tuple[tuple[float, float, int], tuple[float, float, int]]:
    return plan.prompt_tokens, plan.output_tokens


def _write(out: pathlib.Path, result: dict[str, Any], gauge: Gauge, scraper: Scraper, load: Load) -> None:
    result["phases"] = load.phases
    (out / "result.json").write_text(json.dumps(result, indent=1, default=str))
    (out / "nvml.json").write_text(json.dumps(dict(counters=gauge.counters, powers=gauge.powers)))
    for name, rows in (("scrapes", scraper.rows), ("requests", load.requests)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(
    out: pathlib.Path, result: Mapping[str, Any], gauge: Gauge, scraper: Scraper, requests: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each thing that has to hold: what, found, wanted, and whether it holds."""
    from energylens_vllm.serving.learning_listener import SAVED_EACH_WINDOWS

    checks: list[dict[str, Any]] = []

    def hold(what: str, found: Any, wanted: Any, holds: bool) -> None:
        checks.append(dict(what=what, found=found, wanted=wanted, holds=bool(holds)))

    def near(what: str, found: float, wanted: float, relative: float) -> None:
        hold(f"{what}, within {relative:.2%}", found, wanted, abs(found - wanted) <= relative * abs(wanted))

    metrics = scraper.rows[-1][1]

    def total(name: str) -> float:
        return sum(value for key, value in metrics.items() if key.split(" ")[0] == name)

    # Meter. What /metrics shows lags by a report and a reading, so compare over what the engine's readings span.
    _, readings, windows = engine_recorder.load(out / "engine")
    begin_s = max(min(r.end_s for r in readings if r.gpu == gpu) for gpu in {r.gpu for r in readings})
    begin_s = max(begin_s, gauge.counters[0][0][0])
    inside = [r for r in readings if r.start_s >= begin_s and r.end_s <= gauge.counters[0][-1][0]]
    by_gpu = {gpu: [r for r in inside if r.gpu == gpu] for gpu in {r.gpu for r in inside}}
    measured_j = sum(r.energy_j for r in inside)
    watched_j = sum(r.integrated_j or math.nan for r in inside)
    spans = [(rows[0].start_s, rows[-1].end_s) for rows in by_gpu.values()]
    start_s, end_s = spans[0]
    seconds = end_s - start_s
    near("meter: joules by the plugin against the counter read here", measured_j, gauge.counted_j(start_s, end_s), 0.01)
    near("meter: power integrated by the plugin against its counter", watched_j, measured_j, 0.02)
    near("meter: power integrated here against the counter", gauge.integrated_j(start_s, end_s), measured_j, 0.02)
    hold("meter: GPUs", len(by_gpu), result["tp"], len(by_gpu) == result["tp"])
    untrusted = sum(not r.trusted for r in readings)
    hold("meter: readings not trusted", untrusted, 0, untrusted == 0)
    hold("meter: readings", len(inside), f"one a second of {seconds:.0f} s", len(inside) > 0.9 * seconds * len(by_gpu))
    exported_s = scraper.rows[-1][0]  # a report and a reading may still be on their way
    near("meter: exported joules against all readings", total("energylens_gpu_energy_joules_total"),
         sum(r.energy_j for r in readings if r.end_s <= exported_s), max(0.02, 3.0 / seconds))  # fmt: skip
    hold("meter: nvml_up", total("energylens_nvml_up"), 1, total("energylens_nvml_up") == 1.0)
    faults = {key: value for key, value in metrics.items() if "meter_faults" in key and value}
    hold("meter: faults", faults, {}, not faults)
    # Pairing.
    uncompared = total("energylens_uncompared_windows_total")
    hold("pairing: windows not compared", uncompared, "0", uncompared == 0)
    near("pairing: joules of the windows against all readings", sum(w["measured_j"] for w in windows),
         sum(r.energy_j for r in readings), max(0.08, 6.0 / seconds))  # fmt: skip  # the last may be under way
    # Of whole readings, which are a second apart: five of them may fall short of 5 s by microseconds.
    hold("pairing: windows", len(windows), f"one each 5 to 6 s of {seconds:.0f} s", len(windows) > 0.85 * seconds / 6)
    # Attribution.
    ok = [row for row in requests if row.get("status") == 200]
    hold("requests that succeeded", len(ok), len(requests), len(ok) == len(requests) > 0)
    predicted_j = total("energylens_predicted_energy_joules_total")
    attributed_j = total("energylens_attributed_energy_joules_total")
    near("attribution: charged to requests against predicted", attributed_j, predicted_j, 1e-9)
    accounts = [json.loads(line) for line in (out / "request_log.jsonl").read_text().splitlines()]
    hold("attribution: lines in the log", len(accounts), len(ok), len(accounts) == len(ok))
    near("attribution: joules in the log", math.fsum(a["joules"] for a in accounts), attributed_j, 1e-9)
    told = [row for row in ok if "energy" in (row.get("usage") or {})]
    hold("attribution: responses that say their energy", len(told), len(ok), len(told) == len(ok))
    logged = {a["request_id"]: a["joules"] for a in accounts}
    ratios = [
        row["usage"]["energy"]["joules"] / joules
        for row in told
        for request_id, joules in [next(((k, v) for k, v in logged.items() if str(row["id"]) in k), ("", math.nan))]
    ]
    worst = min(ratios, default=math.nan)
    hold("attribution: response over log, least", worst, "0.8 to 1: a step was under way", 0.8 <= worst <= 1.0 + 1e-9)
    saved_j, cached = total("energylens_saved_energy_joules_total"), total("energylens_cached_tokens_total")
    hold("attribution: joules saved by the prefix cache", saved_j, f"> 0, {cached:.0f} tokens", saved_j > 0)
    # Learning, and the plugin as a whole.
    files = sorted((out / "learnt").glob("*.json"))
    learnt = sum(value for key, value in metrics.items() if "learning_windows" in key and "rejected" not in key)
    wanted = int(learnt >= SAVED_EACH_WINDOWS)
    hold("learning: files kept", len(files), wanted, len(files) == wanted)
    failures = {key: value for key, value in metrics.items() if "plugin_failures" in key and value}
    hold("plugin: failures", failures, {}, not failures)
    return checks


# -- results ------------------------------------------------------------------------------------------------------


def table(out: pathlib.Path, with_replay: bool) -> str:
    """What was found, as Markdown."""
    result = json.loads((out / "result.json").read_text())
    steps, readings, windows = engine_recorder.load(out / "engine")
    start_s, learning_s = result["start_s"], result["learning_s"]
    lines = [
        f"{result['tp']} x {result['gpus'][0]}, {result['power_limit_w']:.0f} W limit, driver {result['driver']}; "
        f"profile {result['gpu']} off by {result['off']}; {len(steps)} steps, {len(windows)} windows",
        "",
        "| time | windows | profile alone | as exported | bias | inside 90 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, begin_s, end_s in (
        ("first minute", -math.inf, 60.0), (f"until {learning_s:.0f} s", 60.0, learning_s),
        ("after", learning_s, math.inf),
    ):  # fmt: skip
        if chosen := [w for w in windows if begin_s <= w["start_s"] - start_s < end_s]:
            lines.append(f"| {name} " + _row(chosen))
    scrapes = [json.loads(line) for line in (out / "scrapes.jsonl").read_text().splitlines()]
    if live := _live_wmape(scrapes, start_s + learning_s):
        lines += ["", f"From /metrics alone, after {learning_s:.0f} s: {live}"]
    lines += ["", "| factor | learnt | std |", "| --- | --- | --- |"]
    last = scrapes[-1][1]
    for key, value in last.items():
        if key.startswith("energylens_learning_factor coefficient="):
            name = key.partition("=")[2]
            std = last[f"energylens_learning_factor_std coefficient={name}"]
            lines.append(f"| {name} | {value:.3f} | {std:.3f} |")
    states = [key.partition("=")[2] for key, value in last.items() if "learning_state" in key and value]
    outcomes = {key.partition("=")[2]: value for key, value in last.items() if "learning_windows" in key}
    lines += ["", f"State {states}, windows {outcomes}"]
    if checks := result.get("checks"):
        lines += ["", "| check | found | wanted | holds |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {each['what']} | {_short(each['found'])} | {_short(each['wanted'])} | {_yes(each['holds'])} |"
            for each in checks
        ]
    if with_replay:
        lines += ["", *_replayed(result, steps, readings)]
    return "\n".join(lines)


def _row(windows: Sequence[Mapping[str, Any]]) -> str:
    measured = sum(w["measured_j"] for w in windows)

    def wmape(key: str) -> float:
        return sum(abs(w[key] - w["measured_j"]) for w in windows) / measured

    bias = sum(w["predicted_j"] for w in windows) / measured - 1
    inside = sum(w["low_j"] <= w["measured_j"] <= w["high_j"] for w in windows) / len(windows)
    return (
        f"| {len(windows)} | {wmape('uncorrected_j'):.2%} | {wmape('predicted_j'):.2%} | {bias:+.2%} | {inside:.0%} |"
    )


def _live_wmape(scrapes: Sequence[Any], since_s: float) -> str:
    """From counters alone, as a dashboard has it."""
    before = next((metrics for at_s, metrics in scrapes if at_s >= since_s), None)
    if before is None:
        return ""
    after = scrapes[-1][1]

    def grown(name: str) -> float:
        return float(after.get(name, 0.0) - before.get(name, 0.0))

    measured_j = grown("energylens_compared_energy_joules_total side=measured")
    if not measured_j:
        return ""
    return (
        f"wMAPE {grown('energylens_absolute_error_joules_total') / measured_j:.2%}, "
        f"{grown('energylens_uncorrected_absolute_error_joules_total') / measured_j:.2%} by the profile alone"
    )


def _replayed(result: Mapping[str, Any], steps: Sequence[Any], readings: Sequence[Any]) -> Iterator[str]:
    """The recorded steps and readings served again, with every profile of learn_recorded.py."""
    from energylens_vllm import Deployment, EnergyModel
    from energylens_vllm.calibrate.live import live, wmape
    from energylens_vllm.hardware import load_profile

    yield "| replayed: profile is off | profile alone | learnt | inside | interval +- | factors at the end |"
    yield "| --- | --- | --- | --- | --- | --- |"
    deployment = Deployment(
        gpu=result["gpu"], tensor_parallel_size=result["tp"], vllm_release=learn_recorded.RELEASE,
        cudagraph_capture_sizes=[size for size in CAPTURE_SIZES if size <= 256],
    )  # fmt: skip
    since_s = result["start_s"] + result["learning_s"]
    for name, factors in learn_recorded.OFF.items():
        model = EnergyModel(result["config"], deployment, learn_recorded.off(load_profile(result["gpu"]), factors))
        lived = live(steps, readings, model)
        assert lived.learner is not None
        if after := [window for window in lived.windows if window.start_s >= since_s]:
            yield (
                f"| {name} | {wmape(after, corrected=False):.2%} | {wmape(after):.2%} "
                f"| {learn_recorded.inside(after):.0%} of {len(after)} | {learn_recorded.half_width(after):.1%} "
                f"| {learn_recorded.learnt_factors(lived.learner.estimates())} |"
            )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _yes(holds: bool) -> str:
    return "yes" if holds else "**NO**"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


_started_s = time.perf_counter()


def log(text: str) -> None:
    print(f"[{time.perf_counter() - _started_s:6.1f} s] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the folder to write to")
    parser.add_argument("--model", default="llama8b", choices=MODELS, help="whose shape (default: llama8b)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs (default: 1)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of load (default: 300)")
    parser.add_argument(
        "--off", default="all +20 %", choices=learn_recorded.OFF, help="how the profile is off (default: all +20 %%)"
    )
    parser.add_argument("--tiny", action="store_true", help="a trial: a small shape and half a minute, on a CPU")
    parser.add_argument("--replay", action="store_true", help="run nothing: serve what `out` has recorded again")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not args.replay:
        config = TINY["llama"] if args.tiny else MODELS[args.model]
        asyncio.run(run(out, config, args.tp, args.tiny, learn_recorded.OFF[args.off], args.seconds))
    text = table(out, args.replay)
    if not args.replay:
        (out / "table.md").write_text(text + "\n")
    print(text)
    checks = json.loads((out / "result.json").read_text()).get("checks", [])
    return 0 if args.replay or all(found["holds"] for found in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
