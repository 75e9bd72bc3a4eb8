"""Two replicas' /metrics over time: the plugin's own observer, meter track, pairing, learning, attribution, expert
counts, snapshots and exporter, run over recorded steps of an H200 in simulated time, scraped each 5 s; and a router's,
which places requests by `routing.rank` on a replica loaded as the recording is or on one with a steady load.

The recording is played twice, at the same time on two days, so that what compares with yesterday has a yesterday.
vLLM's own metrics are made of the same steps (a token's latency is its step's duration).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from energylens_vllm.calibrate.recording import load
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.meter import Reading, State
from energylens_vllm.meter.track import Track
from energylens_vllm.routing import Request, Snapshot, StepTable, rank
from energylens_vllm.routing.decisions import Decisions, prometheus_count
from energylens_vllm.serving.attribution import Attribution
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.expert_counts import Counts, LearntRouting
from energylens_vllm.serving.exporter import Exporter
from energylens_vllm.serving.learning import Learner
from energylens_vllm.serving.learning_listener import Learning
from energylens_vllm.serving.measurement import Measurement
from energylens_vllm.serving.metrics import PREDICTOR_STATES
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.pairing import Pairing
from energylens_vllm.serving.predictor import ModelPredictor
from energylens_vllm.serving.replica import Live, Replica
from energylens_vllm.serving.settings import Settings
from energylens_vllm.serving.shares import Prices, Spared

DATA = Path(__file__).parents[1] / "data" / "h200_vllm"
REPLICAS = {"llama8b": ("llama-3.1-8b", "replica-0:8000"), "qwen30b": ("qwen3-30b-a3b", "replica-1:8000")}
JOB = "vllm"
ROUTER, ROUTER_JOB = "router-0:4000", "router"
KV_TOKENS = 700_000.0  #: room for them in the KV cache
#: when the recording ends: fixed, so that every query has one answer
NOW_S = 1_780_000_000
DAY_S = 86_400
SCRAPE_S = 5.0
REPORT_S = 2.0

Samples = dict[str, dict[str, list[tuple[float, float]]]]  #: family -> series as text -> (s, value)


@dataclass(frozen=True)
class Truth:
    """What the recording itself says, from the first to the last scrape."""

    duration_s: float
    measured_j: float
    output_tokens: int

    @property
    def joules_per_token(self) -> float:
        return self.measured_j / self.output_tokens


@dataclass(frozen=True)
class Simulated:
    """The replicas' samples and what they should say."""

    types: dict[str, str]
    samples: Samples
    truths: dict[str, Truth]  #: by instance

    def open_metrics(self) -> str:
        """OpenMetrics text with timestamps."""
        lines = []
        for family, series in self.samples.items():
            lines.append(f"# TYPE {family} {self.types[family]}")
            for day_s in (-DAY_S, 0):
                for name, values in series.items():
                    lines += [f"{name} {value!r} {time_s + day_s:.3f}" for time_s, value in values]
        return "\n".join([*lines, "# EOF", ""])


class _Meter:
    """Stands for the meter's thread: gives the readings that have ended by now."""

    is_up = True

    def __init__(self, readings: Sequence[Reading], observer: StepObserver) -> None:
        self._readings, self.clock = list(readings), observer.clock

    def take(self) -> list[Reading]:
        now_s = self.clock()
        ready = [reading for reading in self._readings if reading.end_s <= now_s]
        self._readings = self._readings[len(ready) :]
        return ready

    def take_faults(self) -> list[tuple[str, str, int]]:
        return []


def _readings(path: Path) -> list[Reading]:
    arrays = np.load(path)
    track, readings, state = Track("0", "gpu"), [], State()
    # The meter reads the counter each second, the recording has it each 0.2 s.
    events = [(row[0], 0, row[1:].tolist()) for row in arrays["pw"]]
    events += [(row[0], 1, row[1:].tolist()) for row in arrays["en"][::5]]
    for time_s, is_counter, values in sorted(events):
        if not is_counter:
            track.add_power(time_s, values[0] / 1e3)
            continue
        millijoules, sm_mhz, celsius, memory_mhz = values
        state = State(700.0, sm_mhz * 1e6, memory_mhz * 1e6, celsius)
        if (reading := track.add_counter(time_s, millijoules / 1e3)) is not None:
            capped_s = {"power_cap": reading.duration_s if reading.power_w > 0.97 * 700.0 else 0.0}
            readings.append(
                Reading(
                    "0", reading.start_s, reading.end_s, reading.energy_j, reading.source, reading.trusted,
                    reading.integrated_j, state=state, throttled_s=capped_s,
                )
            )  # fmt: skip
    return readings


def _batches(path: Path) -> Iterator[tuple[Batch, float, float]]:
    """Steps with requests that are told apart: one goes on where it had been computed to."""
    recorded = load(path)
    waiting: defaultdict[int, list[str]] = defaultdict(list)  # computed tokens -> requests that have so many
    number = 0
    for i in np.flatnonzero((np.diff(recorded.offsets) > 0) & np.isfinite(recorded.end_s)).tolist():
        new, computed = zip(*recorded.requests(i), strict=True)
        ids = []
        for c in computed:
            if waiting[c]:
                ids.append(waiting[c].pop())
            else:
                number += 1
                ids.append(f"r{number}")
        finished = frozenset(name for names in waiting.values() for name in names)
        waiting.clear()
        for name, n, c in zip(ids, new, computed, strict=True):
            waiting[c + n].append(name)
        decodes = [n == 1 and c > 0 for n, c in zip(new, computed, strict=True)]
        batch = Batch(ids, new, computed, decodes, sum(new), sum(decodes), finished_request_ids=finished)
        yield batch, float(recorded.start_s[i]), float(recorded.end_s[i])


class _Workers:
    """Stands for workers that count: tokens of Qwen3-30B-A3B choose its experts evenly, but for chance."""

    LAYERS, EXPERTS, SELECTED = 48, 128, 8

    def __init__(self) -> None:
        self.tokens = 0
        self._random = np.random.default_rng(0)
        self._selections = np.zeros((self.LAYERS, self.EXPERTS), dtype=np.int64)

    def __call__(self) -> Counts:
        new, self.tokens = self.tokens, 0
        even = np.full(self.EXPERTS, 1 / self.EXPERTS)
        self._selections = self._selections + self._random.multinomial(new * self.SELECTED, even, self.LAYERS)
        return Counts(np.arange(self.LAYERS), self._selections, self.SELECTED)


class _Router:
    """Places ten requests every 2 s among a replica that is loaded as the recording is and one with a steady load."""

    def __init__(self, model: EnergyModel) -> None:
        self.registry = CollectorRegistry()
        self._decisions = Decisions(prometheus_count(self.registry))
        self._table = StepTable.compile(model, KV_TOKENS)
        self._sizes = np.random.default_rng(0)
        self._placed = 0

    def place(self, live: Live) -> None:
        recorded = Snapshot(self._table, float(live.requests), float(live.waiting_tokens), live.kv_tokens_used)
        steady = Snapshot(self._table, 8.0, 0.0, 8.0 * 1000)
        for prompt in self._sizes.integers(100, 4000, 10).tolist():
            ranking = rank([recorded, steady], Request(prompt, 256.0, ttft_s=1.0, tpot_s=0.05))
            self._placed += 1
            if ranking.best is None or self._placed % 50 == 0:
                self._decisions.fell_back("stale")
            else:
                self._decisions.record(ranking, ranking.best)


class _Vllm:
    """vLLM's own metrics, as far as the dashboards use them."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        labels, bounds = (
            ("model_name", "engine"),
            [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0],
        )

        def child(kind: type, name: str, *more: str, **options: object) -> object:
            return kind(f"vllm:{name}", name, (*labels, *more), registry=registry, **options).labels(
                model_name, "0", *(["stop"] if more else [])
            )

        self.output = child(Counter, "generation_tokens")
        self.prompt = child(Counter, "prompt_tokens")
        self.success = child(Counter, "request_success", "finished_reason")
        self.running = child(Gauge, "num_requests_running")
        self.waiting = child(Gauge, "num_requests_waiting")
        self.first = child(Histogram, "time_to_first_token_seconds", buckets=bounds)
        self.between = child(Histogram, "inter_token_latency_seconds", buckets=bounds)
        self.whole = child(Histogram, "e2e_request_latency_seconds", buckets=bounds)
        self._begun: dict[str, float] = {}
        self.live = Live(0, 0, 0.0, KV_TOKENS)

    def step(self, batch: Batch, start_s: float, end_s: float) -> None:
        prompts = batch.num_tokens - batch.num_decode_tokens
        used = float(sum(batch.new_tokens) + sum(batch.computed_tokens))
        self.live = Live(len(batch.request_ids), prompts, used, KV_TOKENS)
        self.output.inc(batch.num_decode_tokens)
        self.prompt.inc(prompts)
        self.running.set(len(batch.request_ids))
        for name, decodes in zip(batch.request_ids, batch.is_decode, strict=True):
            if not decodes:
                self.first.observe(end_s - start_s)
            self._begun.setdefault(name, start_s)
        if batch.num_decode_tokens:
            self.between.observe(end_s - start_s)
        for name in batch.finished_request_ids:
            self.success.inc()
            self.whole.observe(start_s - self._begun.pop(name, start_s))


def simulate() -> Simulated:
    """Play both recordings."""
    samples: Samples = defaultdict(lambda: defaultdict(list))
    types: dict[str, str] = {}
    truths = {instance: _play(name, *REPLICAS[name], samples, types) for name, (_, instance) in REPLICAS.items()}
    return Simulated(types, samples, truths)


def _play(name: str, config: str, instance: str, samples: Samples, types: dict[str, str]) -> Truth:
    path, registry, now_s = DATA / f"{name}_steps.npz", CollectorRegistry(), [0.0]
    readings = _readings(path)
    end_s = readings[-1].end_s
    shift_s = NOW_S - end_s
    model = EnergyModel(config, Deployment(gpu="H200-SXM"))
    exporter, vllm = Exporter(config, [0], registry), _Vllm(config, registry)
    exporter.set_build_info("0.1.0", "0.25.1")

    predictor = ModelPredictor(model)
    predictor.learner = Learner(model)
    observer = StepObserver(lambda work: work, predictor, REPORT_S, clock=lambda: now_s[0])
    pairing = Pairing(1, model.idle_power_w, lambda: observer.settled_s, learner=predictor.learner)
    prices, workers = Prices.of(model), _Workers()
    experts = LearntRouting(workers, predictor, observer.guard, observer.clock)
    observer.listeners += [
        Measurement(_Meter(readings, observer), pairing),
        Learning(predictor.learner),
        Attribution(prices, Spared.of(model, prices), settled=lambda: observer.settled_s),
        Replica(model, lambda: vllm.live, Settings(), observer.clock, lambda: now_s[0] + shift_s),
    ]
    has_experts = any(kernel.experts is not None for kernel in model.kernels)
    router = None if has_experts else _Router(model)  # among replicas of one model
    if has_experts:
        observer.listeners.append(experts)
    for state in PREDICTOR_STATES:
        observer.increments.set("energylens_predictor_state", float(state == "ready"), state)
    observer.increments.set("energylens_profile_info", 1.0, "H200-SXM", "detected", "bfloat16", "None", "1", "1")

    def report() -> None:
        observer.report()
        experts.wait()
        exporter.export(0, observer.take_outbox())
        if router is not None:
            router.place(vllm.live)

    def scrape(time_s: float) -> None:
        _scrape(registry, JOB, instance, time_s, samples, types)
        if router is not None:
            _scrape(router.registry, ROUTER_JOB, ROUTER, time_s, samples, types)

    next_report_s, next_scrape_s = readings[0].start_s + REPORT_S, readings[0].start_s + SCRAPE_S
    tokens = 0
    for batch, start_s, step_end_s in _batches(path):
        while next_report_s <= step_end_s:
            while next_scrape_s < next_report_s:
                scrape(next_scrape_s + shift_s)
                next_scrape_s += SCRAPE_S
            now_s[0] = next_report_s
            report()
            next_report_s += REPORT_S
        now_s[0] = start_s
        observer.scheduled(batch, batch, start_s)
        now_s[0] = step_end_s
        observer.ended(batch)
        vllm.step(batch, start_s, step_end_s)
        workers.tokens += batch.num_tokens
        tokens += batch.num_decode_tokens
    while next_scrape_s < end_s:
        scrape(next_scrape_s + shift_s)
        next_scrape_s += SCRAPE_S
    now_s[0] = end_s
    report()
    scrape(float(NOW_S))
    assert not observer.guard.failures
    return Truth(end_s - readings[0].start_s, sum(reading.energy_j for reading in readings), tokens)


def _scrape(
    registry: CollectorRegistry, job: str, instance: str, time_s: float, samples: Samples, types: dict[str, str]
) -> None:
    for family in registry.collect():
        types[family.name] = family.type
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = ",".join(f'{k}="{v}"' for k, v in (sample.labels | {"job": job, "instance": instance}).items())
            samples[family.name][f"{sample.name}{{{labels}}}"].append((time_s, float(sample.value)))
