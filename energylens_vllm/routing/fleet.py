"""A router's live view of its replicas: what they last reported, what was sent there since, and who suits a request.

`rank` needs snapshots; reports come once a second. Between two reports a replica's state is its last report, plus the
requests that this router has placed there since it was taken, less those that it has seen end. That also holds where a
host does not tell routers of endings: the next report does. What is not known is left unknown: a replica that has not
reported yet, whose model is not known, or whose last report is older than `Targets.max_age_s`.

No host is imported here; hosts call from any of their threads.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.routing.decisions import cause_of
from energylens_vllm.routing.expected import ExpectedOutput
from energylens_vllm.routing.policy import UNKNOWN, Config, Ranking, Request, Snapshots, rank
from energylens_vllm.routing.prefixes import Prefixes
from energylens_vllm.routing.prompts import CHARS_PER_TOKEN, Prompt
from energylens_vllm.routing.report import Report
from energylens_vllm.routing.table import StepTable

#: Weight of a request in the mean prompt, and of a report in the mean of characters a token.
LEARNING = 0.02
#: Reports whose time by the replica's clock seems to be further off than this are dated by when they came: wall clocks
#: of two machines may disagree.
MOST_DELAY_S, CLOCKS_AGREE_S = 3.0, 0.1
#: Requests that are remembered as under way; more at once are counted by the replicas' reports alone.
MOST_UNDER_WAY = 100_000


@dataclass(frozen=True, slots=True)
class Targets:
    """What a router is told to hold. Raises EnergyLensError for a value out of range."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05
    max_age_s: float = 3.0  #: reports come each second: three in a row are missing

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "max_age_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise EnergyLensError(f"{name}: {value!r}; accepted: seconds > 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Targets:
        """From settings. Raises EnergyLensError for a name that is none, too."""
        for name in values:
            if name not in (names := [item.name for item in fields(cls)]):
                raise unknown("routing setting", name, names)
        return cls(**values)


@dataclass(slots=True, eq=False)
class _Replica:
    deployment: str
    table: StepTable | None = None
    report: Report | None = None
    received_s: float = 0.0  #: monotonic
    sampled_s: float = 0.0  #: wall clock of this machine
    under_way: int = 0  #: requests placed here whose end this router has not seen
    ended: int = 0  #: placed before the last report, ended since


@dataclass(frozen=True, slots=True)
class _Placed:
    replica: str
    at_s: float  #: wall clock
    ends: bool  #: whether its end will be told


@dataclass(frozen=True, slots=True)
class Choice:
    """A ranking of the replicas `keys`, and the request that it is for."""

    keys: tuple[str, ...]
    ranking: Ranking
    prompt: Prompt | None
    uncached: tuple[float, ...]  #: tokens to compute on each replica

    @property
    def fallback(self) -> str | None:
        """Why the host decides; None if the ranking does."""
        return cause_of(self.ranking) if self.ranking.fallback or self.ranking.best is None else None

    @property
    def order(self) -> list[str]:
        """All replicas, best first."""
        return [self.keys[i] for i in self.ranking.order]

    @property
    def silent(self) -> list[str]:
        """Those of which nothing is known now."""
        return [key for key, state in zip(self.keys, self.ranking.state, strict=True) if state == UNKNOWN]


class LiveFleet:
    """The replicas of one model that requests are chosen among."""

    def __init__(
        self,
        targets: Targets | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.targets = targets or Targets()
        self._config = Config(max_age_s=self.targets.max_age_s)
        self._monotonic, self._wall = monotonic, wall
        self._lock = threading.RLock()
        self._replicas: dict[str, _Replica] = {}
        self._placed: OrderedDict[str, _Placed] = OrderedDict()
        self._since: dict[str, OrderedDict[str, float]] = {}  # replica -> request -> tokens, not in its report yet
        self._prefixes, self._expected = Prefixes(), ExpectedOutput()
        self._chars_per_token = CHARS_PER_TOKEN
        self._typical_prompt: float | None = None
        self._snapshots: Snapshots | None = None
        self._keys: tuple[str, ...] = ()
        self._previous: str | None = None
        self._turn = 0

    def __len__(self) -> int:
        return len(self._replicas)

    # -- what is known ---------------------------------------------------------------------------------------------

    def update(self, deployment: str, keys: Collection[str]) -> None:
        """Take `keys` as the replicas that `deployment` has now."""
        with self._lock:
            gone = [k for k, r in self._replicas.items() if r.deployment == deployment and k not in keys]
            for key in gone:
                self.remove(key)
            for key in keys:
                if key not in self._replicas:
                    self._replicas[key] = _Replica(deployment)
                    self._since[key] = OrderedDict()
                    self._snapshots = None

    def remove(self, key: str) -> None:
        """The replica has gone."""
        with self._lock:
            if self._replicas.pop(key, None) is not None:
                for request in self._since.pop(key):
                    del self._placed[request]
                self._prefixes.forget(key)
                self._snapshots = None

    def silence(self, key: str) -> None:
        """The replica cannot be reached: unknown until it reports again."""
        with self._lock:
            if (replica := self._replicas.get(key)) is not None:
                replica.report = None

    def has_table(self, key: str) -> bool:
        """Whether the replica's model is known."""
        replica = self._replicas.get(key)
        return replica is not None and replica.table is not None

    def know(self, key: str, table: StepTable) -> None:
        """Say which model the replica runs."""
        with self._lock:
            self._replicas[key].table = table
            self._snapshots = None

    def hear(self, key: str, report: Report) -> None:
        """A report that may be new; one heard before, which a host repeats, makes its replica no younger."""
        with self._lock:
            replica = self._replicas[key]
            last = replica.report
            if last is not None and report.sampled_s == last.sampled_s:
                return
            now = self._wall()
            delay = now - report.sampled_s
            in_time = -CLOCKS_AGREE_S <= delay <= MOST_DELAY_S
            sampled = min(report.sampled_s, now) if in_time else now - MOST_DELAY_S / 2
            if last is not None:
                new = min(report.num_ended - last.num_ended, len(report.ended))
                for prompt, output in report.ended[len(report.ended) - new :] if new > 0 else ():
                    self._expected.learn(prompt, output)
            replica.report, replica.received_s, replica.sampled_s = report, self._monotonic(), sampled
            replica.ended = 0
            since = self._since[key]
            for request in [r for r in since if self._placed[r].at_s < sampled - CLOCKS_AGREE_S]:
                del since[request]
                if not self._placed[request].ends:
                    del self._placed[request]
            if report.chars_per_token is not None:
                self._chars_per_token += LEARNING * (report.chars_per_token - self._chars_per_token)

    # -- requests --------------------------------------------------------------------------------------------------

    def rank(self, prompt: Prompt | None) -> Choice:
        """The replicas for a request; a `prompt` that is not known is taken for a typical one."""
        with self._lock:
            snapshots = self._current()
            ratio = self._chars_per_token
            tokens = prompt.length(ratio) if prompt is not None else self._typical_prompt or 1.0
            cached = np.zeros(len(self._keys))
            if prompt is not None and prompt.blocks:
                block = prompt.block_length(ratio)
                for i, key in enumerate(self._keys):
                    cached[i] = block * self._prefixes.matched(key, prompt.blocks)
            uncached = np.maximum(tokens - cached, 1.0)
            previous = self._keys.index(self._previous) if self._previous in self._keys else -1
            request = Request(
                max(round(tokens), 1),
                self._expected.tokens(round(tokens), None if prompt is None else prompt.max_tokens),
                cached,
                self.targets.ttft_s,
                self.targets.tpot_s,
                typical_prompt_tokens=self._typical_prompt,
                short_output=self._expected.short,
                previous=previous,
                turn=self._turn,
            )
            ranking = rank(snapshots, request, self._config)
            self._turn += 1
            return Choice(self._keys, ranking, prompt, tuple(uncached.tolist()))

    def place(self, choice: Choice, request: str, key: str, ends: bool = True) -> None:
        """The request goes to `key`; if it was placed before, it has moved. `ends`: whether `end` will be called."""
        with self._lock:
            self._take_back(request)
            replica = self._replicas.get(key)
            if replica is None or key not in choice.keys:
                return
            tokens = choice.uncached[choice.keys.index(key)]
            self._placed[request] = _Placed(key, self._wall(), ends)
            self._since[key][request] = tokens
            replica.under_way += ends
            while len(self._placed) > MOST_UNDER_WAY:
                self._take_back(next(iter(self._placed)))
            if choice.prompt is not None:
                most = int(replica.table.kv_tokens / choice.prompt.block_length(self._chars_per_token)) if (
                    replica.table is not None
                ) else 0  # fmt: skip
                self._prefixes.add(key, choice.prompt.blocks, most)
                last = self._typical_prompt
                self._typical_prompt = tokens if last is None else last + LEARNING * (tokens - last)
            self._previous = key

    def end(self, request: str) -> None:
        """The request has ended, well or not."""
        with self._lock:
            placed = self._placed.get(request)
            if placed is not None and not self._take_back(request):
                self._replicas[placed.replica].ended += 1

    def _take_back(self, request: str) -> bool:
        """Forget where it was placed; whether that is all, as no report has counted it (or its replica has gone)."""
        placed = self._placed.pop(request, None)
        replica = None if placed is None else self._replicas.get(placed.replica)
        if placed is None or replica is None:
            return True
        replica.under_way -= placed.ends
        return self._since[placed.replica].pop(request, None) is not None

    def power_of_two(self, deployments: Sequence[str], draw: random.Random) -> str | None:
        """The host's default over several deployments, of which it has none: of two replicas drawn at random that which
        has fewer requests of this router; its deployment."""
        with self._lock:
            replicas = [replica for replica in self._replicas.values() if replica.deployment in deployments]
            if not replicas:
                return None
            two = draw.sample(replicas, min(2, len(replicas)))
            return min(two, key=lambda replica: replica.under_way).deployment

    def deployment_of(self, key: str) -> str | None:
        """The deployment that a replica belongs to."""
        replica = self._replicas.get(key)
        return None if replica is None else replica.deployment

    # -- snapshots -------------------------------------------------------------------------------------------------

    def _current(self) -> Snapshots:
        """Written into the same arrays each time; the tables are stacked anew only when replicas change."""
        if self._snapshots is None:
            self._keys = tuple(self._replicas)
            self._snapshots = Snapshots.empty([replica.table for replica in self._replicas.values()])
        snapshots, now = self._snapshots, self._monotonic()
        for i, (key, replica) in enumerate(self._replicas.items()):
            report = replica.report
            if report is None:
                snapshots.running[i] = np.nan
                snapshots.age_s[i] = np.inf
                continue
            since = self._since[key]
            snapshots.running[i] = max(report.running + len(since) - replica.ended, 0.0)
            snapshots.waiting_tokens[i] = report.waiting_tokens + (sum(since.values()) if since else 0.0)
            snapshots.kv_tokens_used[i] = report.kv_tokens_used
            snapshots.mean_context[i] = report.mean_context
            snapshots.prefill_tokens_per_s[i] = report.prefill_tokens_per_s
            snapshots.time_factor[i] = report.time_factor
            snapshots.age_s[i] = now - replica.received_s + report.silent_s
        # A ranking is looked at later, when these are others already.
        return replace(snapshots, running=snapshots.running.copy(), age_s=snapshots.age_s.copy())
