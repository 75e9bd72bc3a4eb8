"""One replica in the simulator: vLLM's scheduler on a step table.

Scheduling is vLLM's: decodes first, one token each, then prompts in order of arrival in chunks of what the token budget
leaves, up to `max_num_seqs` and to the blocks of the KV cache; when a decode finds no block, the request that came last
is preempted and computes all of its tokens again. A full prompt's prefix blocks come from the cache where an earlier
request left them; the cache keeps the most recent blocks that fit beside what runs.

With asynchronous scheduling two steps are in flight: as soon as the output of step k - 1 is taken, step k + 1 is
scheduled and launched while the GPU runs step k. So an arrival waits for the step that runs and for the one that is
scheduled already. The host launches one step at a time, and takes an output only when it has launched the next step.
Requests end by length, which the scheduler foresees: no step is scheduled for them past their last.

Steps that only decode are alike until a request ends, a block is missing or one arrives, so they are run as one event:
`k` steps whose contexts grow by one token each take k times the step at the mean context.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from energylens_vllm.routing.table import StepTable
from energylens_vllm.routing.trace import PREFIX_BLOCK_TOKENS, Arrival

BLOCK = 16  #: tokens of a KV block
#: Decode steps run as one event at most: beyond, the mean context would hide that steps grow.
MOST_STEPS = 256
#: Seconds over which the rate of prefill tokens is remembered.
RATE_MEMORY_S = 10.0


@dataclass(slots=True, eq=False)
class Job:
    """A request in an engine."""

    arrival: Arrival
    order: int
    prompt: int  #: tokens to compute before the next output token: the prompt, after a preemption its outputs, too
    left: int  #: output tokens still to come
    cached: int = 0
    done: int = 0  #: of `prompt`
    base: int = 0  #: context minus the engine's step count, while it decodes
    ends: int = 0  #: the engine's step count at which it ends
    first_s: float = math.nan
    end_s: float = math.nan
    alive: int = 0  #: entry in the engine's heap that is valid
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class Event:
    """One step, or several alike that only decode."""

    decodes: int
    chunks: list[tuple[Job, int]]
    steps: int
    step_s: float  #: of each; the first may take longer
    step_j: float
    launched_s: float  #: when the host has launched the first
    end_s: float  #: when the GPU has run the last
    firsts: list[Job] = field(default_factory=list)  #: those that get their first token
    ending: list[Job] = field(default_factory=list)  #: those that get their last
    held: int = 0  #: blocks that are free once the last output is taken

    def cut(self, steps: int) -> None:
        """Leave only the first `steps`."""
        if steps < self.steps:
            self.end_s -= (self.steps - steps) * self.step_s
            self.steps = steps


class Engine:
    """Advances lazily: `advance(t)` runs all events that end by t; `submit` adds a request at t."""

    def __init__(
        self, table: StepTable, noise: Callable[[], tuple[float, float]] | None = None, asynchronous: bool = True
    ) -> None:
        self.table, self.read = table, table.reader()
        self.noise, self.asynchronous = noise, asynchronous
        self.blocks = int(table.kv_tokens // BLOCK)
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.decoding: list[tuple[int, int, int, Job]] = []  #: heap by the step count at which each ends
        self.members: dict[int, Job] = {}  #: decoding jobs by order, in order of start
        self.count = 0  #: decode steps so far: each decoding job grows by one token a step
        self.context = 0  #: tokens of all decoding jobs, less count x their number
        self.residues = [0] * BLOCK
        self.whole = 0
        self.prefill_blocks = 0
        self.waiting_tokens = 0
        self.event: Event | None = None  #: runs
        self.following: Event | None = None  #: scheduled while `event` runs
        self.plan_s = math.inf  #: when the event after `event` is scheduled
        self.taken_s = 0.0  #: when the last output was taken, or the engine left idling
        self.busy_s = self.energy_j = 0.0
        self.modelled_s = 0.0  #: what `energy_j` has idle power for
        self.preemptions = self.hit_tokens = 0
        self.prefix: OrderedDict[int, None] = OrderedDict()
        self.rate, self.rate_at = 0.0, 0.0
        self.finished: list[Job] = []

    # -- what a router sees ---------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self.members) + len(self.prefilling) + (len(self.event.ending) if self.event else 0)

    @property
    def kv_tokens_used(self) -> int:
        held = self.event.held if self.event else 0
        return self.context + len(self.members) * self.count + (self.prefill_blocks + held) * BLOCK

    def prefill_rate(self, now: float) -> float:
        """Prompt tokens a second that came lately (exponentially weighted)."""
        return self.rate * math.exp(-(now - self.rate_at) / RATE_MEMORY_S)

    def cached_tokens(self, arrival: Arrival) -> int:
        """Of a prompt: its leading blocks that are in the prefix cache."""
        hits = 0
        for block in arrival.prefix:
            if block not in self.prefix:
                break
            hits += 1
        return min(hits * PREFIX_BLOCK_TOKENS, arrival.prompt_tokens - 1)

    def energy_until(self, now: float) -> float:
        """Joules from time 0 to `now`, to which the engine has advanced: idle power included, and of what runs the part
        of its time that has passed."""
        idle_w, event = self.table.idle_w, self.event
        energy_j = self.energy_j + idle_w * (now - self.modelled_s)
        if event is not None:
            part = (now - self.taken_s) / (event.end_s - self.taken_s) if now < event.end_s else 1.0
            energy_j += part * event.steps * (event.step_j - idle_w * event.step_s)
        return energy_j

    # -- time -----------------------------------------------------------------------------------------------------

    def advance(self, until: float) -> None:
        """Take all outputs, and schedule all events, that are due by `until`."""
        while (event := self.event) is not None:
            if self.plan_s <= event.end_s:
                if self.plan_s > until:
                    return
                self._commit(event)
                self.following, self.plan_s = self._plan(self.plan_s), math.inf
                continue
            following = self.following
            taken_s = event.end_s if following is None else max(event.end_s, following.launched_s)
            if taken_s > until:
                return
            self._take(event, taken_s)
            self._begin(following if following is not None else self._plan(taken_s), taken_s)

    def submit(self, arrival: Arrival, order: int, now: float) -> Job:
        """A request arrives; the engine must have advanced to `now`."""
        job = Job(arrival, order, arrival.prompt_tokens, arrival.output_tokens)
        tokens = arrival.prompt_tokens - self.cached_tokens(arrival)
        self.rate = self.prefill_rate(now) + tokens / RATE_MEMORY_S
        self.rate_at = now
        self.waiting.append(job)
        self.waiting_tokens += tokens
        job.cached = arrival.prompt_tokens - tokens
        if self.event is None:
            self.taken_s = now
            self._begin(self._plan(now), now)
            self.advance(now)
        elif self.following is not None:
            self.following.cut(1)
        elif self.plan_s < math.inf:  # it has not been scheduled what follows: that is brought forward
            event = self.event
            start_s = event.end_s - event.steps * event.step_s
            event.cut(max(int((now - start_s) / event.step_s), 0) + 1 + self.asynchronous)
            self.plan_s = event.end_s - event.step_s
        elif self.event.steps > 1:  # synchronous: the step that runs is the last
            event = self.event
            event.cut(max(int((now - (event.end_s - event.steps * event.step_s)) / event.step_s), 0) + 1)
        return job

    def _begin(self, event: Event | None, now: float) -> None:
        """The output of what ran before is taken: `event` runs, and with asynchronous scheduling the next is due."""
        self.event, self.following, self.plan_s = event, None, math.inf
        if event is not None and self.asynchronous:
            self.plan_s = now if event.steps == 1 else event.end_s - event.step_s

    def _commit(self, event: Event) -> None:
        """The scheduler's view once `event` has run: it schedules what follows before the output is there."""
        if event.decodes:
            self.count += event.steps
            while self.decoding and self.decoding[0][0] <= self.count:
                _, _, alive, job = heapq.heappop(self.decoding)
                if alive == job.alive:
                    self._leave(job)
                    event.ending.append(job)
                    event.held += _blocks(job.base + self.count)
        for job, new in event.chunks:
            job.done += new
            if job.done == job.prompt:
                self.prefilling.remove(job)
                self.prefill_blocks -= _blocks(job.prompt)
                self._remember(job)
                event.firsts.append(job)
                job.left -= 1
                if job.left == 0:
                    event.ending.append(job)
                    event.held += _blocks(job.prompt)
                else:
                    self._join(job)

    def _take(self, event: Event, now: float) -> None:
        """Take the output of `event`."""
        if not self.asynchronous:
            self._commit(event)
        self.event = None
        self.busy_s += now - self.taken_s
        self.taken_s = now
        self.modelled_s += event.steps * event.step_s
        self.energy_j += event.steps * event.step_j
        self.waiting_tokens -= sum(new for _, new in event.chunks)
        for job in event.firsts:
            if math.isnan(job.first_s):
                job.first_s = now
        for job in event.ending:
            job.end_s = now
            self.finished.append(job)

    def _plan(self, now: float) -> Event | None:
        """Schedule the next event, if there is work; what runs is committed."""
        preempted = False
        held = self.event.held if self.event is not None and self.asynchronous else 0
        while self.members and self._used(self.count + 1) + self.prefill_blocks + held > self.blocks:
            if not self._preempt(alone=held > 0):
                break
            preempted = True
        n = len(self.members)
        budget = self.table.max_num_batched_tokens - n
        chunks: list[tuple[Job, int]] = []
        for job in self.prefilling:
            new = min(budget, job.prompt - job.done)
            if new > 0:
                chunks.append((job, new))
                budget -= new
        while self.waiting and budget > 0 and not preempted and self.running < self.table.max_num_seqs:
            job = self.waiting[0]
            needed = _blocks(job.prompt)
            taken = (self._used(self.count + 1) if n else 0) + self.prefill_blocks + held
            # The first request of an empty engine is always let in: vLLM refuses longer ones when they arrive.
            if taken + needed > self.blocks and self.running:
                break
            self.waiting.popleft()
            hit = self.cached_tokens(job.arrival) if job.preemptions == 0 else 0
            self.waiting_tokens += job.cached - hit  # what was cached when it came may be gone, or more is there now
            job.cached = job.done = hit
            self.hit_tokens += hit
            self.prefilling.append(job)
            self.prefill_blocks += needed
            new = min(budget, job.prompt - job.done)
            chunks.append((job, new))
            budget -= new
        if not chunks and not n:
            return None
        if chunks:
            steps = 1
            new = sum(each for _, each in chunks)
            pairs = sum(each * job.done + each * (each + 1) / 2 for job, each in chunks)
            context = self.context / n + self.count + 1 if n else 1.0
            gpu_s, step_j, host_s = self.read.mixed(n, context, new, pairs)
        else:
            steps = self._steps(held)
            context = self.context / n + self.count + 1 + (steps - 1) / 2
            gpu_s, step_j = self.read.decode(n, context)
            host_s = min(self.read.decode_host_s[n], gpu_s)
        if self.noise is not None:
            slower, hotter = self.noise()
            gpu_s, host_s, step_j = gpu_s * slower, host_s * slower, step_j * hotter
        free_s = max(now, self.event.end_s) if self.event is not None else now
        first_s = max(free_s + gpu_s, now + host_s)
        step_s = max(gpu_s, host_s)
        return Event(n, chunks, steps, step_s, step_j, now + host_s, first_s + (steps - 1) * step_s)

    def _steps(self, held: int) -> int:
        """Decode steps until a request ends or the KV cache is full."""
        while self.decoding[0][2] != self.decoding[0][3].alive:
            heapq.heappop(self.decoding)
        steps = min(self.decoding[0][0] - self.count, MOST_STEPS)
        if self._used(self.count + steps) + held > self.blocks and steps > 1:
            low, high = 1, steps
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._used(self.count + middle) + held <= self.blocks else (low, middle)
            steps = low
        return steps

    # -- KV cache -------------------------------------------------------------------------------------------------

    def _used(self, count: int) -> int:
        """Blocks of decoding jobs when the step count is `count`: the sum of ceil(context / block) over them."""
        return self.whole + sum(have * ((count + rest) // BLOCK) for rest, have in enumerate(self.residues) if have)

    def _join(self, job: Job) -> None:
        job.base = job.prompt - self.count
        job.ends = self.count + job.left
        job.alive += 1
        self.members[job.order] = job
        heapq.heappush(self.decoding, (job.ends, job.order, job.alive, job))
        self.context += job.base
        self._blocks_of(job, 1)

    def _leave(self, job: Job) -> None:
        del self.members[job.order]
        self.context -= job.base
        self._blocks_of(job, -1)

    def _blocks_of(self, job: Job, sign: int) -> None:
        whole, rest = divmod(job.base + BLOCK - 1, BLOCK)
        self.whole += sign * whole
        self.residues[rest] += sign

    def _preempt(self, alone: bool) -> bool:
        """Take the request that came last out of the batch; it computes its tokens again. False if it is the only one,
        unless `alone` says that even then it must."""
        if len(self.members) + len(self.prefilling) <= (0 if alone else 1):
            return False
        self.preemptions += 1
        if self.prefilling:
            job = self.prefilling.pop()
            self.prefill_blocks -= _blocks(job.prompt)
            self.waiting_tokens += job.done
        else:
            job = self.members[next(reversed(self.members))]
            self._leave(job)
            left = job.ends - self.count
            job.prompt += job.left - left
            job.left = left
            self.waiting_tokens += job.prompt
        job.alive += 1
        job.done = job.cached = 0
        job.preemptions += 1
        self.waiting.appendleft(job)
        return True

    def _remember(self, job: Job) -> None:
        for block in job.arrival.prefix:
            self.prefix[block] = None
            self.prefix.move_to_end(block)
        keep = max(int((self.table.kv_tokens - self.kv_tokens_used) // PREFIX_BLOCK_TOKENS), 0)
        while len(self.prefix) > keep:
            self.prefix.popitem(last=False)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def calibrated_noise(table: StepTable, seed: int) -> Callable[[], tuple[float, float]]:
    """Factors on each event's seconds and joules: a bias for the whole run of the size that the model states for
    itself (its intervals), and jitter of 2 % from event to event."""
    draw = random.Random(seed)
    bias_s, bias_j = math.exp(draw.gauss(0, table.time_std)), math.exp(draw.gauss(0, table.energy_std))

    def noise() -> tuple[float, float]:
        jitter = math.exp(draw.gauss(0, 0.02))
        return bias_s * jitter, bias_j * jitter

    return noise
