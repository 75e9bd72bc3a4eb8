"""Which replica a request adds the fewest joules to while latency targets hold: a pure function, no clock, no I/O.

    marginal joules = tokens to prefill x joules of one + expected output x what one more sequence adds to a step

both above the power that the replica burns idle, from its step table, never an average joule per token. A replica is
feasible when, with the request, time to first token, time per output token (with the room that `headroom` keeps) and KV
cache hold. Order of the verdicts:

1. feasible, by joules; within `hysteresis` of the least the replica chosen before stays, so small differences and noise
   do not make requests flap
2. unknown: a snapshot that is too old or incomplete. It may be idle or drowning, so it is never taken for idle
3. infeasible, by how far targets are missed, for the request and for those that run there
4. out: unhealthy, draining or stopped; listed so that a caller sees why

With nothing known of any replica the ranking says `fallback`: the host's own policy should decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing.table import CONTEXTS, StepTable

FEASIBLE, UNKNOWN, INFEASIBLE, OUT = range(4)
_STATES = ("feasible", "unknown", "infeasible", "out")
_CONTEXTS = np.array(CONTEXTS)
_INNER = _CONTEXTS[1:-1]  # the first and last cell also serve what lies outside


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of a replica. None, NaN, or an age beyond `Config.max_age_s` means unknown, not zero."""

    table: StepTable | None
    running: float | None  #: sequences in the batch
    waiting_tokens: float | None  #: prompt tokens not yet prefilled, of all requests there
    kv_tokens_used: float | None
    mean_context: float | None = None  #: of running sequences, tokens
    prefill_tokens_per_s: float = 0.0  #: lately: steps with prefill delay those that decode
    time_factor: float = 1.0  #: measured over predicted time of steps lately
    age_s: float = 0.0
    healthy: bool = True
    powered: bool = True
    role: str = "both"  #: "prefill", "decode" or "both"


@dataclass(frozen=True, slots=True)
class Request:
    """A request to place. `expected_output_tokens` is learnt from those before it, not known."""

    prompt_tokens: int
    expected_output_tokens: float
    cached_tokens: Sequence[float] | Array | float = 0.0  #: of the prompt, in each replica's prefix cache
    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    phase: str = "both"  #: "prefill", "decode" or "both"
    typical_prompt_tokens: float | None = None  #: mean of requests lately, not cached; None: as this one's
    previous: int = -1  #: replica chosen last (hysteresis), -1 none
    turn: int = 0  #: a counter, so that replicas of which nothing is known take turns


@dataclass(frozen=True, slots=True)
class Config:
    """Raises EnergyLensError for a value out of range."""

    headroom: float = 0.40  #: part of each latency target that is kept free for what is not predicted
    kv_headroom: float = 0.10
    hysteresis: float = 0.03
    max_age_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("headroom", "kv_headroom", "hysteresis"):
            if not 0 <= getattr(self, name) < 1:
                raise EnergyLensError(f"{name}: {getattr(self, name)!r}; accepted: 0 up to, not including, 1")
        if not self.max_age_s > 0:
            raise EnergyLensError(f"max_age_s: {self.max_age_s!r}; accepted: more than 0")


DEFAULT = Config()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a replica stands where it does. Joules and seconds are NaN where they are not known."""

    replica: int
    state: str
    joules: float
    ttft_s: float
    tpot_s: float
    reason: str


class Fleet:
    """The tables of some replicas, stacked once so that all are read together."""

    def __init__(self, tables: Sequence[StepTable | None]) -> None:
        unique = list({id(table): table for table in tables if table is not None}.values())
        index = {id(table): i for i, table in enumerate(unique)}
        most = max((table.max_num_seqs for table in unique), default=1)
        self.known = np.array([table is not None for table in tables], dtype=bool)
        self.table = np.array([index.get(id(table), 0) for table in tables], dtype=np.int64)
        # Of cell (table, n, context): intercepts of marginal joules beside n and of seconds of a step of n + 1, and
        # their slopes in the context, so that one look-up and one multiplication interpolate.
        cells = np.zeros((max(len(unique), 1), most + 1, len(CONTEXTS) - 1, 4))
        for i, table in enumerate(unique):
            n = np.minimum(np.arange(most + 1), table.max_num_seqs)
            # Never faster with more: padding and kernels' choices may say so for a few sizes.
            slower = np.maximum.accumulate(table.decode_s, axis=0)
            for k, values in enumerate((table.marginal_j[n], slower[np.minimum(n + 1, table.max_num_seqs)])):
                slope = np.diff(values, axis=1) / np.diff(_CONTEXTS)
                cells[i, ..., k] = values[:, :-1] - slope * _CONTEXTS[:-1]
                cells[i, ..., k + 2] = slope
        self.cells = cells.reshape(-1, 4)
        self.first_cell = self.table * ((most + 1) * (len(CONTEXTS) - 1))

        def column(name: str) -> Array:
            return np.array([np.nan if table is None else getattr(table, name) for table in tables], dtype=np.float64)

        self.max_num_seqs, self.kv_tokens = column("max_num_seqs"), column("kv_tokens")
        self.prefill_s, self.prefill_j = column("prefill_s_per_token"), column("prefill_j_per_token")
        self.most = most
        self.all_known = bool(self.known.all())

    def __len__(self) -> int:
        return len(self.table)


@dataclass(slots=True, eq=False)
class Snapshots:
    """Snapshots of a fleet in columns, each of shape (replicas,); NaN is unknown. Hosts that route often keep one and
    write into it."""

    fleet: Fleet
    running: Array
    waiting_tokens: Array
    kv_tokens_used: Array
    mean_context: Array
    prefill_tokens_per_s: Array
    time_factor: Array
    age_s: Array
    usable: npt.NDArray[np.bool_]  #: healthy, powered, not draining
    role: npt.NDArray[np.str_] | None = None  #: None: all do both

    @classmethod
    def empty(cls, tables: Sequence[StepTable | None]) -> Snapshots:
        """Replicas that run nothing, as of now."""
        count = len(tables)
        a, b, c, d, e, f = (np.zeros(count) for _ in range(6))
        return cls(Fleet(tables), a, b, c, d, e, np.ones(count), f, np.ones(count, dtype=bool))

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> Snapshots:
        """From single ones."""

        def column(name: str) -> Array:
            values = (getattr(each, name) for each in snapshots)
            return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

        running, used, context = column("running"), column("kv_tokens_used"), column("mean_context")
        derived = np.divide(used, running, out=np.zeros(len(running)), where=running > 0)
        return cls(
            Fleet([each.table for each in snapshots]), running, column("waiting_tokens"), used,
            np.where(np.isnan(context), derived, context), column("prefill_tokens_per_s"), column("time_factor"),
            column("age_s"),
            np.array([each.healthy and each.powered for each in snapshots], dtype=bool),
            np.array([each.role for each in snapshots]) if any(each.role != "both" for each in snapshots) else None,
        )  # fmt: skip


class Ranking(Sequence[Verdict]):
    """Verdicts, best first; each is made when it is looked at, so ranking many replicas costs arrays only."""

    __slots__ = ("_request", "_snapshots", "fallback", "joules", "order", "state", "tpot_s", "ttft_s")

    def __init__(
        self, order: npt.NDArray[np.int64], state: npt.NDArray[np.int64], joules: Array, ttft_s: Array, tpot_s: Array,
        fallback: bool, snapshots: Snapshots, request: Request,
    ) -> None:  # fmt: skip
        self.order, self.state, self.joules = order, state, joules
        self.ttft_s, self.tpot_s = ttft_s, tpot_s
        self.fallback = fallback  #: nothing is known of any replica that may be chosen
        self._snapshots, self._request = snapshots, request

    @property
    def snapshots(self) -> Snapshots:
        """What was ranked. Of a host that keeps one `Snapshots`, it changes with the next request."""
        return self._snapshots

    @property
    def best(self) -> int | None:
        """The replica to choose; None if all are out."""
        first = int(self.order[0]) if len(self.order) else None
        return None if first is None or self.state[first] == OUT else first

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> Verdict: ...

    @overload
    def __getitem__(self, place: slice) -> list[Verdict]: ...

    def __getitem__(self, place: int | slice) -> Verdict | list[Verdict]:
        if isinstance(place, slice):
            return [self._verdict(int(replica)) for replica in self.order[place]]
        return self._verdict(int(self.order[place]))

    def __iter__(self) -> Iterator[Verdict]:
        return (self._verdict(int(replica)) for replica in self.order)

    def _verdict(self, i: int) -> Verdict:
        state = int(self.state[i])
        known = state in (FEASIBLE, INFEASIBLE)
        joules, ttft_s, tpot_s = (
            (float(values[i]) if known else float("nan")) for values in (self.joules, self.ttft_s, self.tpot_s)
        )
        return Verdict(i, _STATES[state], joules, ttft_s, tpot_s, self._reason(i, state))

    def _reason(self, i: int, state: int) -> str:
        snapshots, request = self._snapshots, self._request
        if state == OUT:
            return "not healthy, powered and of the request's phase"
        if state == UNKNOWN:
            if not snapshots.fleet.known[i]:
                return "no step model"
            return f"snapshot of {snapshots.age_s[i]:.1f} s ago is stale or incomplete"
        if state == FEASIBLE:
            again = ", chosen before and within hysteresis" if i == request.previous and i == self.order[0] else ""
            return f"adds {self.joules[i]:.3g} J beside {snapshots.running[i]:.0f} running{again}"
        missed = [
            f"{what} {value * 1e3:.0f} ms of {target * 1e3:.0f} ms"
            for what, value, target in (
                ("time to first token", self.ttft_s[i], request.ttft_s),
                ("time per token", self.tpot_s[i], request.tpot_s),
            )
            if value > target
        ]
        return "misses " + (", ".join(missed) or "the room kept free in latency, sequences or KV cache")


def rank(snapshots: Snapshots | Sequence[Snapshot], request: Request, config: Config = DEFAULT) -> Ranking:
    """All replicas, best first. Pure: the same arguments give the same ranking, equal ones in order of replica.

    Raises EnergyLensError for counts that no request has.
    """
    if request.prompt_tokens < 0 or not request.expected_output_tokens > 0:
        raise EnergyLensError(
            f"request: {request.prompt_tokens!r} prompt and {request.expected_output_tokens!r} expected output tokens; "
            "accepted: 0 or more, and more than 0"
        )
    if not isinstance(snapshots, Snapshots):
        snapshots = Snapshots.of(snapshots)
    fleet, s = snapshots.fleet, snapshots
    output = request.expected_output_tokens if request.phase != "prefill" else 0.0
    uncached = np.maximum(request.prompt_tokens - np.asarray(request.cached_tokens, dtype=np.float64), 1.0)
    if request.phase == "decode":
        uncached = np.zeros(len(fleet))
    # NaN compares false, so what is not known is not taken for known.
    total = s.running + s.waiting_tokens + s.kv_tokens_used + s.mean_context + s.prefill_tokens_per_s * s.time_factor
    everything = fleet.all_known and len(fleet) > 0 and s.age_s.max() <= config.max_age_s and total.min() >= 0
    running, mean_context = s.running, s.mean_context
    if not everything:
        known = (s.age_s <= config.max_age_s) & (total >= 0) & fleet.known
        running, mean_context = np.where(known, running, 0.0), np.where(known, mean_context, 0.0)
    after = running + 1
    # The batch's mean context with the request in it, half way through its output.
    own = max(request.prompt_tokens + output / 2, 1.0)
    context = (running * mean_context + own) / after
    at = _INNER.searchsorted(context, "right")
    n = np.minimum(running, fleet.most).astype(np.int64)
    cell = fleet.cells.take(fleet.first_cell + n * (len(CONTEXTS) - 1) + at, axis=0).T
    marginal_j, step_s = cell[0] + context * cell[2], cell[1] + context * cell[3]
    joules = uncached * fleet.prefill_j + output * marginal_j
    # A step in which prompts are prefilled takes their time besides; the share of time that goes there delays decodes.
    left = np.maximum(1 - s.prefill_tokens_per_s * fleet.prefill_s, 0.05) / s.time_factor
    tpot_s = step_s / left
    if output > 0:
        # A batch that stays as large gets a prompt for each request that ends. Lately it may have been small.
        typical = request.prompt_tokens if request.typical_prompt_tokens is None else request.typical_prompt_tokens
        tpot_s = np.maximum(tpot_s, (step_s + after * (typical / output) * fleet.prefill_s) * s.time_factor)
    ttft_s = (s.waiting_tokens + uncached) * (fleet.prefill_s / left) + 2 * step_s
    kept = 1 - config.headroom
    over_ttft, over_tpot = ttft_s * (1 / (request.ttft_s * kept)), tpot_s * (1 / (request.tpot_s * kept))
    over_seqs = after / fleet.max_num_seqs
    held = s.kv_tokens_used + s.waiting_tokens + (request.prompt_tokens + output)
    over_kv = held / (fleet.kv_tokens * (1 - config.kv_headroom))
    worst = np.maximum(np.maximum(over_ttft, over_tpot), np.maximum(over_kv, over_seqs))
    all_usable = bool(s.usable.all())
    key, state = joules.copy(), np.where(worst <= 1, FEASIBLE, INFEASIBLE)
    easy = everything and all_usable and (s.role is None or request.phase == "both") and not state.any()
    if not easy:
        usable = s.usable
        if s.role is not None and request.phase != "both":
            usable = usable & ((s.role == request.phase) | (s.role == "both"))
        if not everything:
            state = np.where(known, state, UNKNOWN)
        state = np.where(usable, state, OUT)
        # Damage counts each who misses: the request itself, and by time per token those that run there.
        damage = np.maximum(over_ttft - 1, 0) + after * np.maximum(over_tpot - 1, 0)
        damage += np.maximum(over_kv - 1, 0) + np.maximum(over_seqs - 1, 0)
        turns = (np.arange(len(key)) - request.turn) % max(len(key), 1)
        key = np.where(state == FEASIBLE, joules, np.where(state == INFEASIBLE, damage, turns))
    previous = request.previous
    if 0 <= previous < len(key) and state[previous] == FEASIBLE:
        key[previous] *= 1 - config.hysteresis
    order = key.argsort(kind="stable") if easy else np.lexsort((key, state))
    fallback = not easy and not bool((usable if everything else known & usable).any())
    return Ranking(order, state, joules, ttft_s, tpot_s, fallback, snapshots, request)
