"""Requests with times and lengths of their own, from a trace file, and a simulation of every engine step they make.

Steps are scheduled as vLLM does: running requests first, one token each, then prompts in order of arrival, in chunks of
what the token budget leaves, up to `max_num_seqs` requests; with asynchronous scheduling one step ahead. The step model
gives each step's time and joules. Preemption for want of cache is not simulated.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import pathlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, Integers, steps_from_arrays
from energylens_vllm.energy.queueing import OpenServing, percentiles
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; arrays of shape (R,). `cached_tokens` of a prompt need no computation.

    Raises EnergyLensError for arrays of different lengths, or values that no request has.
    """

    arrival_s: Array
    prompt_tokens: Array
    output_tokens: Array
    cached_tokens: Array

    def __post_init__(self) -> None:
        arrays = (self.arrival_s, self.prompt_tokens, self.output_tokens, self.cached_tokens)
        if len({len(values) for values in arrays}) != 1 or not len(self.arrival_s):
            raise EnergyLensError("trace: needs as many arrivals as prompts and outputs, and one or more")
        if not all(np.all(np.isfinite(values)) for values in arrays):
            raise EnergyLensError("trace: a number is not finite")
        if np.any(np.diff(self.arrival_s) < 0):
            raise EnergyLensError("trace: arrivals are not in order")
        if min(self.prompt_tokens.min(), self.output_tokens.min()) < 1:
            raise EnergyLensError("trace: a request has no prompt or no output tokens; accepted: 1 or more")
        if np.any(self.cached_tokens < 0) or np.any(self.cached_tokens >= self.prompt_tokens):
            raise EnergyLensError("trace: cached_tokens; accepted: 0 up to one less than the prompt")

    def share(self, rank: int, ranks: int) -> Trace:
        """What one of `ranks` gets when they take turns."""
        return Trace(*(
            values[rank::ranks]
            for values in (self.arrival_s, self.prompt_tokens, self.output_tokens, self.cached_tokens)
        ))  # fmt: skip


def poisson_trace(
    rate_per_s: float, prompts: Array, outputs: Array, requests: int, seed: int = 0, hit_rate: float = 0.0
) -> Trace:
    """Random arrivals with lengths drawn from samples."""
    random = np.random.default_rng(seed)
    prompt = random.choice(prompts, requests)
    return Trace(
        np.cumsum(random.exponential(1 / rate_per_s, requests)), prompt, random.choice(outputs, requests),
        np.floor(prompt * hit_rate),
    )  # fmt: skip


def read_trace(path: str | os.PathLike[str], hit_rate: float = 0.0) -> Trace:
    """A trace from a file: CSV with TIMESTAMP, ContextTokens and GeneratedTokens (Azure's LLM inference traces), or
    JSON lines with timestamp (milliseconds), input_length and output_length (Mooncake's). Requests without a prompt or
    an output, which traces have, are left out. `hit_rate` of each prompt is taken to be cached. Raises EnergyLensError
    naming the file and the line."""
    file = pathlib.Path(path)
    rows: list[tuple[float, float, float]] = []
    line = 1
    try:
        with file.open(newline="") as text:
            if file.suffix == ".jsonl":
                for line, entry in enumerate(text, 1):  # noqa: B007
                    given = json.loads(entry)
                    rows.append(_finite(given["timestamp"] / 1e3, given["input_length"], given["output_length"]))
            else:
                for line, row in enumerate(csv.DictReader(text), 2):  # noqa: B007
                    at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                    rows.append(_finite(at, float(row["ContextTokens"]), float(row["GeneratedTokens"])))
    except OSError as error:
        raise EnergyLensError(f"trace: {file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise EnergyLensError(
            f"trace: {file} line {line}: {error!r}; accepted: CSV with TIMESTAMP, ContextTokens, GeneratedTokens, or "
            "JSON lines (.jsonl) with timestamp, input_length, output_length"
        ) from None
    kept = sorted((row for row in rows if min(row[1:]) >= 1), key=lambda row: row[0])
    if not kept:
        raise EnergyLensError(f"trace: {file} has no requests with a prompt and an output")
    arrival, prompt, output = (np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))
    return Trace(arrival - arrival[0], prompt, output, np.floor(prompt * hit_rate))


def _finite(at_s: float, prompt: float, output: float) -> tuple[float, float, float]:
    if not all(math.isfinite(value) for value in (at_s, prompt, output)):
        raise ValueError("a number is not finite")
    return at_s, prompt, output


def simulate(model: EnergyModel, trace: Trace) -> OpenServing:
    """Every step of a server under a trace, from its first arrival to its last completion; with data parallelism ranks
    take turns in getting requests. Raises EnergyLensError for pipeline stages, whose overlap it does not simulate."""
    if model.deployment.pipeline_parallel_size > 1:
        raise EnergyLensError("pipeline_parallel_size: the simulation of a trace accepts 1")
    servers = model.servers
    runs = [_Server(model, trace.share(i, servers)).run() for i in range(min(servers, len(trace.arrival_s)))]
    end_s = max(run.end_s for run in runs)
    idle_w = model.idle_power_w / servers
    busy_s = sum(run.busy_s for run in runs)
    energy_j = sum(run.energy_j for run in runs) + idle_w * (servers * end_s - busy_s)
    ttft_s, tpot_s = (np.concatenate([getattr(run, name) for run in runs]) for name in ("ttft_s", "tpot_s"))
    requests, tokens = len(trace.arrival_s), float(trace.output_tokens.sum())
    return OpenServing(
        rate_per_s=requests / end_s,
        energy_per_output_token_j=energy_j / tokens,
        energy_per_request_j=energy_j / requests,
        power_w=energy_j / end_s,
        idle_power_w=model.idle_power_w,
        utilisation=busy_s / (servers * end_s),
        running=sum(run.request_s for run in runs) / end_s,
        waiting_share=sum(run.waited for run in runs) / requests,
        mean_ttft_s=float(ttft_s.mean()),
        mean_tpot_s=float(tpot_s.mean()) if len(tpot_s) else float("nan"),
        ttft_s=percentiles(ttft_s),
        tpot_s=percentiles(tpot_s) if len(tpot_s) else {},
        flags=model.flags,
    )


#: Steps that are planned at a time; those scheduled after the next arrival are taken back.
PLANNED = 32


@dataclass(frozen=True, slots=True)
class _Planned:
    """One step: what each of its requests computes, and the server's state before it."""

    requests: Integers
    rank: Integers  #: of each
    new: Integers
    computed: Integers
    decodes: npt.NDArray[np.bool_]
    sampled: npt.NDArray[np.bool_]  #: requests that get a token
    running: Integers  #: before the step
    admitted: list[int]


class _Server:
    """What steps by itself: a data-parallel rank, or all that share experts and end each step together. `run` fills
    the sums and, for each request, its latencies.

    Without arrivals the steps to come are known, so several are predicted at once.
    """

    def __init__(self, model: EnergyModel, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.ahead, self.ranks = model.async_scheduling, model.lockstep_ranks
        self.rank = np.arange(len(trace.arrival_s)) % self.ranks  #: of each request
        self.rank_idle_w = model.idle_power_w / model.deployment.data_parallel_size
        self.left_prompt = (trace.prompt_tokens - trace.cached_tokens).astype(np.int64)
        self.left_output = trace.output_tokens.astype(np.int64)
        self.computed = trace.cached_tokens.astype(np.int64)
        self.running: Integers = np.zeros(0, dtype=np.int64)
        self.waiting: list[deque[int]] = [deque() for _ in range(self.ranks)]
        self.arrived = self.waited = 0
        self.busy_s = self.energy_j = self.request_s = self.end_s = 0.0
        self.first_s = np.full(len(trace.arrival_s), np.nan)
        self.done_s = np.full(len(trace.arrival_s), np.nan)

    @property
    def ttft_s(self) -> Array:
        return self.first_s - self.trace.arrival_s

    @property
    def tpot_s(self) -> Array:
        several = self.trace.output_tokens > 1
        each: Array = ((self.done_s - self.first_s) / np.maximum(self.trace.output_tokens - 1, 1))[several]
        return each

    def run(self) -> _Server:
        now = seen = 0.0  # `seen`: when the next step is scheduled, and what has arrived by then is in it
        while True:
            self._arrive(seen)
            steps = self._plan()
            if not steps:
                if self.arrived == len(self.trace.arrival_s):
                    break
                now = seen = max(now, float(self.trace.arrival_s[self.arrived]))  # idle until then
                continue
            time_s, energy_j = self._predict(steps)
            ends = now + np.cumsum(time_s)
            starts = np.concatenate([[now], ends[:-1]])
            scheduled = np.concatenate([[seen], starts[:-1]]) if self.ahead else starts
            coming = self.trace.arrival_s[self.arrived] if self.arrived < len(self.trace.arrival_s) else np.inf
            kept = max(int(np.searchsorted(scheduled, coming)), 1)
            for step in reversed(steps[kept:]):
                self._take_back(step)
            for step, start, end, joules in zip(steps[:kept], starts, ends, energy_j, strict=False):
                self._account(step, end - start, joules, end)
            now = float(ends[kept - 1])
            seen = float(starts[kept - 1]) if self.ahead else now
        self.end_s = now
        return self

    def _arrive(self, now: float) -> None:
        arrivals, limit = self.trace.arrival_s, self.model.deployment.max_num_seqs
        while self.arrived < len(arrivals) and arrivals[self.arrived] <= now:
            rank = self.rank[self.arrived]
            held = np.count_nonzero(self.rank[self.running] == rank) + len(self.waiting[rank])
            self.waited += bool(held >= limit)
            self.waiting[rank].append(self.arrived)
            self.arrived += 1

    def _plan(self) -> list[_Planned]:
        steps: list[_Planned] = []
        while len(steps) < PLANNED and (any(self.waiting) or len(self.running)):
            steps.append(self._schedule())
        return steps

    def _schedule(self) -> _Planned:
        """The next step, marked as done."""
        before, running = self.running, self.rank[self.running]
        parts = [self._schedule_rank(before[running == rank], waiting) for rank, waiting in enumerate(self.waiting)]
        requests, new, admitted = (np.concatenate(each) for each in zip(*parts, strict=True))
        computed, decodes = self.computed[requests], self.left_prompt[requests] == 0
        self.computed[requests] += new
        self.left_prompt[requests] -= np.where(decodes, 0, new)
        sampled = (self.left_prompt[requests] == 0) & (new > 0)
        self.left_output[requests] -= sampled
        self.running = requests[self.left_output[requests] > 0]
        return _Planned(requests, self.rank[requests], new, computed, decodes, sampled, before, admitted.tolist())

    def _schedule_rank(self, before: Integers, waiting: deque[int]) -> tuple[Integers, Integers, Integers]:
        """A rank's requests, new tokens of each, and those of them that it takes from its line."""
        budget, limit = self.model.deployment.max_num_batched_tokens, self.model.deployment.max_num_seqs
        wanted = np.maximum(self.left_prompt[before], 1)
        left = budget - int(wanted.sum())
        taken: list[int] = []
        while waiting and left > 0 and len(before) + len(taken) < limit:
            taken.append(waiting.popleft())
            left -= int(self.left_prompt[taken[-1]])
        admitted = np.array(taken, dtype=np.int64)
        requests = np.concatenate([before, admitted])
        wanted = np.maximum(self.left_prompt[requests], 1)
        return requests, np.clip(budget - (np.cumsum(wanted) - wanted), 0, wanted), admitted

    def _take_back(self, step: _Planned) -> None:
        self.computed[step.requests] -= step.new
        self.left_prompt[step.requests] += np.where(step.decodes, 0, step.new)
        self.left_output[step.requests] += step.sampled
        self.running = step.running
        for request in reversed(step.admitted):
            self.waiting[self.rank[request]].appendleft(request)

    def _predict(self, steps: list[_Planned]) -> tuple[Array, Array]:
        """Seconds and joules of each step: those of its longest rank, in which the others wait, and of all ranks."""
        new, computed, decodes, rank = (
            np.concatenate([getattr(step, name) for step in steps]) for name in ("new", "computed", "decodes", "rank")
        )
        batch = np.repeat(np.arange(len(steps)) * self.ranks, [len(step.new) for step in steps]) + rank
        batches = np.arange(len(steps) * self.ranks)
        here, without = new > 0, np.setdiff1d(batches, batch[new > 0])
        batch = np.concatenate([batch[here], without])
        order = np.argsort(batch, kind="stable")
        # A rank without requests runs a batch of one token beside the others (vLLM's `execute_dummy_batch`).
        new, computed, decodes = (
            np.concatenate([values[here], np.full(len(without), value)])[order]
            for values, value in ((new, 1), (computed, 0), (decodes, True))
        )
        offsets = np.searchsorted(batch[order], np.append(batches, len(batches)))
        predicted = self.model.predict(steps_from_arrays(new, computed, offsets, self.model.masks, decodes))
        time_s, energy_j = (values.reshape(-1, self.ranks) for values in (predicted.time_s, predicted.energy_j))
        longest_s = time_s.max(axis=1)
        waiting_j = self.rank_idle_w * (longest_s[:, None] - time_s)
        return longest_s, (energy_j + waiting_j).sum(axis=1)

    def _account(self, step: _Planned, seconds: float, joules: float, end: float) -> None:
        self.busy_s += seconds
        self.energy_j += joules
        self.request_s += seconds * len(step.requests)
        sampled = step.requests[step.sampled]
        first = sampled[np.isnan(self.first_s[sampled])]
        self.first_s[first] = end
        self.done_s[sampled] = end  # of the last token in the end
