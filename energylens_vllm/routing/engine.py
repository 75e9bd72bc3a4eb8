"""One replica in the simulator: vLLM's scheduler on a step table.

Scheduling is vLLM's: decodes first, one token each, then prompts in order of arrival in chunks of what the token budget
leaves, up to `max_num_seqs` and to the blocks of the KV cache; when a decode finds no block, the request that came last
is preempted and computes all of its tokens again. With asynchronous scheduling an arrival waits for one more step,
which is scheduled already. A full prompt's prefix blocks come from the cache where an earlier request left them; the
cache keeps the most recent blocks that fit beside what runs.

Steps that only decode are alike until a request ends, a block is missing or one arrives, so they are run as one event:
`k` steps whose contexts grow by one token each take k times the step at the mean context.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

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
        self.now = 0.0
        self.event: tuple[float, float, int, float, float] | None = None  #: start, end, steps, step seconds, joules
        self.chunks: list[tuple[Job, int]] = []
        self.busy_s = self.energy_j = 0.0
        self.preemptions = self.hit_tokens = 0
        self.prefix: OrderedDict[int, None] = OrderedDict()
        self.rate, self.rate_at = 0.0, 0.0
        self.finished: list[Job] = []

    # -- what a router sees ---------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self.members) + len(self.prefilling)

    @property
    def kv_tokens_used(self) -> int:
        return self.context + len(self.members) * self.count + self.prefill_blocks * BLOCK

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

    # -- time -----------------------------------------------------------------------------------------------------

    def advance(self, until: float) -> None:
        """Run all events that end by `until`."""
        while self.event is not None and self.event[1] <= until:
            self._finish()
            self._plan()

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
            self.now = now
            self._plan()
        elif self.event[2] > 1:  # several decode steps: end them at the step that is scheduled already
            start, _, steps, step_s, step_j = self.event
            keep = min(int((now - start) / step_s) + 1 + self.asynchronous, steps)
            self.event = (start, start + keep * step_s, keep, step_s, step_j)
        return job

    def _finish(self) -> None:
        assert self.event is not None
        start, end, steps, _, step_j = self.event
        self.busy_s += end - start
        self.energy_j += steps * step_j
        self.now = end
        self.event = None
        if self.members:
            self.count += steps
            while self.decoding and self.decoding[0][0] <= self.count:
                _, _, alive, job = heapq.heappop(self.decoding)
                if alive == job.alive:
                    self._leave(job)
                    self._end(job)
        for job, new in self.chunks:
            job.done += new
            self.waiting_tokens -= new
            if job.done == job.prompt:
                self.prefilling.remove(job)
                self.prefill_blocks -= _blocks(job.prompt)
                self._remember(job)
                if math.isnan(job.first_s):
                    job.first_s = end
                job.left -= 1
                if job.left == 0:
                    self._end(job)
                else:
                    self._join(job)
        self.chunks = []

    def _end(self, job: Job) -> None:
        job.end_s = self.now
        self.finished.append(job)

    def _plan(self) -> None:
        """Schedule the next event, if there is work."""
        while self.members and self._used(self.count + 1) + self.prefill_blocks > self.blocks and self._preempt():
            pass
        n = len(self.members)
        budget = self.table.max_num_batched_tokens - n
        for job in self.prefilling:
            new = min(budget, job.prompt - job.done)
            if new > 0:
                self.chunks.append((job, new))
                budget -= new
        while self.waiting and budget > 0 and self.running < self.table.max_num_seqs:
            job = self.waiting[0]
            needed = _blocks(job.prompt)
            taken = (self._used(self.count + 1) if n else 0) + self.prefill_blocks
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
            self.chunks.append((job, new))
            budget -= new
        if self.chunks:
            new = sum(each for _, each in self.chunks)
            pairs = sum(each * job.done + each * (each + 1) / 2 for job, each in self.chunks)
            context = self.context / n + self.count + 1 if n else 1.0
            self._begin(*self.read.mixed(n, context, new, pairs), 1)
        elif n:
            steps = self._steps()
            context = self.context / n + self.count + 1 + (steps - 1) / 2
            self._begin(*self.read.decode(n, context), steps)

    def _begin(self, step_s: float, step_j: float, steps: int) -> None:
        if self.noise is not None:
            slower, hotter = self.noise()
            step_s, step_j = step_s * slower, step_j * hotter
        self.event = (self.now, self.now + steps * step_s, steps, step_s, step_j)

    def _steps(self) -> int:
        """Decode steps until a request ends or the KV cache is full."""
        while self.decoding[0][2] != self.decoding[0][3].alive:
            heapq.heappop(self.decoding)
        steps = min(self.decoding[0][0] - self.count, MOST_STEPS)
        if self._used(self.count + steps) > self.blocks and steps > 1:
            low, high = 1, steps
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._used(self.count + middle) <= self.blocks else (low, middle)
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

    def _preempt(self) -> bool:
        """Take the request that came last out of the batch; it computes its tokens again. False if it is alone."""
        if self.running <= 1:
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
