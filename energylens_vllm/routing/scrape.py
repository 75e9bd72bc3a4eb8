"""Replicas' /metrics, read each second by a thread of its own, for a `LiveFleet`.

What is read is what the vLLM plugin exports with the setting `routing`, and vLLM's own sums of the requests that have
ended. The model's configuration is not in metrics: it is found by the name under which the model is served, or given.
A replica with several data-parallel engines counts as its mean engine, as a step table is of one.

What cannot be read makes nothing known: a replica that refuses the connection is unknown at once, one that does not
answer once its last report is too old.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from energylens_vllm.architectures import load_config, quantization
from energylens_vllm.energy import Deployment
from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.routing.fleet import LiveFleet
from energylens_vllm.routing.report import MOST_ENDED, Report, Tables, describe

logger = logging.getLogger("energylens_vllm")

INTERVAL_S = 1.0
MOST_BYTES = 16 << 20  #: of a page; vLLM's has some hundred kilobytes
#: Pages that are read at once.
MOST_AT_ONCE = 32
#: Weight of a second in what is learnt of speed and of prompts that come.
LEARNING = 0.2

_OURS = (
    "held_requests", "waiting_tokens", "kv_used_tokens", "kv_capacity_tokens", "snapshot_timestamp_seconds",
    "tokens_total", "predicted_step_time_seconds_total", "measured_step_time_seconds_total",
)  # fmt: skip
_VLLM = tuple(
    f"vllm:request_{what}_tokens_{part}" for what in ("prompt", "generation") for part in ("sum", "count")
)  # fmt: skip
_INFOS = ("energylens_profile_info", "energylens_replica_info")
_WANTED = tuple(f"{name}{end}" for name in (*(f"energylens_{name}" for name in _OURS), *_VLLM, *_INFOS) for end in "{ ")

#: arguments of `Deployment` in the labels of the info metrics
_WORDS = ("gpu", "dtype", "kv_cache_dtype", "vllm_release")
_COUNTS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size",
    "decode_context_parallel_size", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip
_FLAGS = ("enable_expert_parallel", "enforce_eager")


@dataclass(frozen=True, slots=True)
class Page:
    """What a replica's /metrics says; counts are of its mean engine."""

    engines: int
    sampled_s: float  #: by its clock
    held: float
    waiting_tokens: float
    kv_tokens_used: float
    kv_tokens: float
    model_name: str
    labels: Mapping[str, str]  #: of both info metrics
    prefill_tokens: float  #: so far
    predicted_s: float
    measured_s: float
    ended: float  #: requests so far, with the sums of their tokens; 0 where vLLM does not tell
    ended_prompt_tokens: float
    ended_output_tokens: float


def read(text: str) -> Page | None:
    """What a page says; None if it lacks what a snapshot needs.

    Raises ValueError for text in no such format, and for numbers that cannot be.
    """
    wanted = "\n".join(line for line in text.splitlines() if line.startswith(_WANTED)) + "\n"
    sums: dict[str, float] = {}
    labels: dict[str, str] = {}
    sampled: dict[str, float] = {}
    model_name = ""
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            name = sample.name.removeprefix("energylens_")
            if sample.name in _INFOS:
                if sample.value == 1:
                    labels |= sample.labels
            elif name == "snapshot_timestamp_seconds":
                sampled[sample.labels.get("engine", "")] = sample.value
                model_name = sample.labels.get("model_name", "")
            elif name != "tokens_total" or sample.labels.get("phase") == "prefill":
                sums[name] = sums.get(name, 0.0) + sample.value
    if not sampled or any(name not in sums for name in _OURS if not name.startswith("snapshot")):
        return None
    if wrong := [name for name, value in [*sums.items(), *sampled.items()] if not 0 <= value < math.inf]:
        raise EnergyLensError(f"{wrong[0]}: {sums.get(wrong[0])} is not finite, or negative")
    engines = len(sampled)
    return Page(
        engines=engines,
        sampled_s=min(sampled.values()),
        held=sums["held_requests"] / engines,
        waiting_tokens=sums["waiting_tokens"] / engines,
        kv_tokens_used=sums["kv_used_tokens"] / engines,
        kv_tokens=sums["kv_capacity_tokens"] / engines,
        model_name=model_name,
        labels=labels,
        prefill_tokens=sums["tokens_total"] / engines,
        predicted_s=sums["predicted_step_time_seconds_total"],
        measured_s=sums["measured_step_time_seconds_total"],
        ended=sums.get("vllm:request_generation_tokens_count", 0.0),
        ended_prompt_tokens=sums.get("vllm:request_prompt_tokens_sum", 0.0),
        ended_output_tokens=sums.get("vllm:request_generation_tokens_sum", 0.0),
    )


class History:
    """Makes a report of each page of one replica: rates need the page before.

    `arrivals_per_s` is of all its engines; the means are of requests that have ended lately, None before any has.
    """

    def __init__(self) -> None:
        self.arrivals_per_s = 0.0
        self.mean_prompt: float | None = None
        self.mean_output: float | None = None
        self._last: Page | None = None
        self._report: Report | None = None
        self._time_factor, self._prefill_rate = 1.0, 0.0

    def report(self, page: Page) -> Report:
        """The report that `page` makes. The same again if the engine has not been seen to live since the last."""
        last = self._last
        if last is not None and self._report is not None and page.sampled_s == last.sampled_s:
            return self._report
        ended: tuple[tuple[int, int], ...] = ()
        if last is not None and page.sampled_s > last.sampled_s and page.measured_s >= last.measured_s:
            predicted_s, measured_s = page.predicted_s - last.predicted_s, page.measured_s - last.measured_s
            if predicted_s > 0 and measured_s > 0:
                self._time_factor += LEARNING * (measured_s / predicted_s - self._time_factor)
            rate = (page.prefill_tokens - last.prefill_tokens) / (page.sampled_s - last.sampled_s)
            self._prefill_rate += LEARNING * (max(rate, 0.0) - self._prefill_rate)
            came = page.ended - last.ended + (page.held - last.held) * page.engines
            self.arrivals_per_s += LEARNING * (
                max(came, 0.0) / (page.sampled_s - last.sampled_s) - self.arrivals_per_s
            )  # fmt: skip
            if (new := round(page.ended - last.ended)) > 0:
                # A histogram tells sums: all that ended in this second are taken for as long as their mean.
                prompt = round((page.ended_prompt_tokens - last.ended_prompt_tokens) / new)
                output = round((page.ended_output_tokens - last.ended_output_tokens) / new)
                ended = ((prompt, output),) * min(new, MOST_ENDED)
                self.mean_prompt = _learnt(self.mean_prompt, prompt)
                self.mean_output = _learnt(self.mean_output, output)
        self._last = page
        self._report = Report(
            sampled_s=page.sampled_s,
            running=page.held,
            waiting_tokens=page.waiting_tokens,
            kv_tokens_used=page.kv_tokens_used,
            mean_context=page.kv_tokens_used / page.held if page.held else 0.0,
            prefill_tokens_per_s=self._prefill_rate,
            time_factor=self._time_factor,
            num_ended=int(page.ended),
            ended=ended,
        )
        return self._report


def _learnt(before: float | None, now: float) -> float:
    return now if before is None else before + LEARNING * (now - before)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a replica is, and what is known of it beforehand. Raises EnergyLensError for what is no URL, no known model
    or no argument of `Deployment`."""

    url: str  #: of its /metrics
    model: str | None = None  #: name, hub id or path of a config; None: found by the name that it is served under
    deployment: Mapping[str, Any] = field(default_factory=dict)  #: over what the replica says

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EnergyLensError(f"url: {self.url!r}; accepted: http://HOST:PORT/metrics")
        if self.model is not None:
            load_config(self.model)
        for name in self.deployment:
            if name not in Deployment.accepted():
                raise unknown("deployment", name, Deployment.accepted())

    def described(self, page: Page) -> dict[str, Any]:
        """The replica in the values that `Tables` take. Raises EnergyLensError for a model that is not known."""
        config = load_config(self.model or page.model_name)
        labels, deployment = page.labels, dict[str, Any]()
        deployment |= {name: labels[name] for name in _WORDS if labels.get(name, "None") != "None"}
        deployment |= {name: int(labels[name]) for name in _COUNTS if labels.get(name, "").isdigit()}
        deployment |= {name: labels[name] == "true" for name in _FLAGS if name in labels}
        if labels.get("quantization", "None") != "None" and quantization(config) is None:
            deployment["quantization"] = labels["quantization"]
        return describe(config, deployment | dict(self.deployment), page.kv_tokens)


@dataclass(slots=True, eq=False)
class _Scraped:
    source: Source
    history: History = field(default_factory=History)
    known: tuple[Mapping[str, str], float] | None = None  #: what its table was made of
    complaint: str = ""
    busy: bool = False


class Scraper:
    """Reads the /metrics of replicas, and tells `fleet`. Call `start` once, `add` and `remove` at any time."""

    def __init__(
        self,
        fleet: LiveFleet,
        interval_s: float = INTERVAL_S,
        tables: Tables | None = None,
        fetch: Callable[[str, float], str] | None = None,
    ) -> None:
        self.fleet, self.interval_s = fleet, interval_s
        self._tables = tables or Tables()
        self._fetch = fetch or fetched
        self._replicas: dict[str, _Scraped] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(MOST_AT_ONCE, "energylens-scrape")
        self._stop = threading.Event()

    def add(self, key: str, source: Source) -> None:
        """Read this replica too, from now on; the same source again changes nothing."""
        with self._lock:
            known = self._replicas.get(key)
            if known is None or known.source != source:
                self._replicas[key] = _Scraped(source)
        self.fleet.update(key, [key])

    def remove(self, key: str) -> None:
        """Read it no more."""
        with self._lock:
            self._replicas.pop(key, None)
        self.fleet.remove(key)

    def start(self) -> None:
        """Read each second from now on, until the process ends or `stop`."""
        threading.Thread(target=self._run, name="energylens-scraper", daemon=True).start()

    def stop(self) -> None:
        """Read no more."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def once(self) -> None:
        """Read all replicas now, one after the other."""
        for key, scraped in self._copy():
            self._look(key, scraped)

    def histories(self) -> list[History]:
        """Those of all replicas."""
        return [scraped.history for _, scraped in self._copy()]

    def problem(self, key: str) -> str:
        """What is wrong with a replica; "" if nothing is."""
        scraped = self._replicas.get(key)
        return "" if scraped is None else scraped.complaint

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            for key, scraped in self._copy():
                if not scraped.busy:  # one that hangs keeps one thread, not one a second
                    scraped.busy = True
                    self._pool.submit(self._look, key, scraped)
            due = max(due + self.interval_s, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _copy(self) -> list[tuple[str, _Scraped]]:
        with self._lock:
            return list(self._replicas.items())

    def _look(self, key: str, scraped: _Scraped) -> None:
        try:
            page = read(self._fetch(scraped.source.url, max(self.interval_s, 1.0)))
            if page is None:
                raise EnergyLensError(f"{scraped.source.url} has no snapshot: vllm serve --energylens.routing true")
            if self._replicas.get(key) is not scraped:
                return
            self.fleet.hear(key, scraped.history.report(page))
            self._know(key, scraped, page)
            scraped.complaint = ""
        except Exception as error:
            reason = getattr(error, "reason", error)
            if isinstance(error, URLError) and isinstance(reason, ConnectionRefusedError):
                self.fleet.silence(key)
            self._complain(key, scraped, f"{type(reason).__name__}: {reason}")
        finally:
            scraped.busy = False

    def _know(self, key: str, scraped: _Scraped, page: Page) -> None:
        """Have the fleet know the model that a page describes, once its table is made."""
        if scraped.known == (page.labels, page.kv_tokens) and self.fleet.has_table(key):
            return
        described = scraped.source.described(page)
        table = self._tables.get(described)
        if table is not None:
            self.fleet.know(key, table)
            scraped.known = (page.labels, page.kv_tokens)
            logger.info("routing: replica %s is known: %s", key, page.labels.get("gpu"))
        elif (problem := self._tables.problem(described)) is not None:
            raise EnergyLensError(problem)

    def _complain(self, key: str, scraped: _Scraped, problem: str) -> None:
        """Log a problem once; a replica that is away is not worth a line a second."""
        if problem != scraped.complaint:
            scraped.complaint = problem
            logger.warning("routing: replica %s: %s", key, problem)


def fetched(url: str, timeout_s: float) -> str:
    """The page at `url`. Raises OSError if it cannot be read, also if it is too long to be a page of metrics."""
    with urlopen(url, timeout=timeout_s) as response:
        body: bytes = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise OSError(f"{url}: more than {MOST_BYTES} bytes")
    return body.decode("utf-8", "replace")


def metrics_url(base: str) -> str:
    """Of an OpenAI base URL such as http://HOST:PORT/v1."""
    base = base.rstrip("/")
    return base.removesuffix("/v1") + "/metrics"
