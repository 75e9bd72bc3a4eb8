"""Which replica a request adds the fewest joules to while latency targets hold: a pure function, no clock, no I/O.

    marginal joules = prefill of what is not cached + expected output x what one more sequence adds to a step

both above the power that the replica burns idle, from its step table, never an average joule per token; if it is off,
its start is added. A replica is feasible when, with the request, time to first token, time per output token (both with
the room that `headroom` keeps), sequences and KV cache hold, and when few answers are expected to miss their time per
token for prompts that come between (`risk`). Order of the verdicts:

1. feasible, by joules. Within `hysteresis` of the least, less than is known, come first the replica chosen before, so
   that requests do not flap, and then the fastest kinds: where idle replicas cost the same, the one that can take more
2. unknown: a snapshot that is too old or incomplete. It may be idle or drowning, so it is never taken for idle
3. infeasible, by damage: how far targets are missed, for the request and for those that run there, and the risk
4. out: unhealthy, draining or stopped; listed so that a caller sees why

With nothing known of any replica the ranking says `fallback`: the host's own policy should decide.

**Risk** is how many answers are expected to miss their time per token because the request goes there. While a prompt is
prefilled those beside it get one token a chunk. An answer of t tokens endures t x (target - time per token) seconds of
that. Its length is not known, only how short answers may be: with (least, spread) of `Request.short_output` a share
t / (spread + t) is taken for shorter than least + t. So X seconds of prompts ruin a share F(X) of the answers that have
not begun: (X - Z) / (E + X - Z), or none up to Z, E and Z being what `spread` and a part of `least` endure. A prompt of
P seconds that waits for others of W seconds, in prompts of T seconds typically,

- adds min(P, W) / T x F(max(P, W)) of those who wait before it: one large prompt hits all of them, of many small ones
  each but the last has been hit by the others already
- ruins F(P) squared of each that decodes: mostly long answers, as these take longest
- is itself hit by prompts that come while it waits and is prefilled, at the rate lately: F(rate x T x (W + P))
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
_INNER_LIST = _INNER.tolist()
_WIDTH = len(CONTEXTS) - 1
_NAN, _LAST = math.nan, math.inf
#: Requests that a cached prefix spares its time where the queue is as long as the target: such queues outlast
#: themselves, and those who come meet them, too.
LATER = 30.0
#: Replicas up to which plain Python is quicker than numpy.
FEW = 24
#: Of what all answers endure, the part that is counted on; the rest is kept for prompts that come in bursts.
SPARED = 0.25


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
    start_s: float = float("inf")  #: until a replica that is not powered serves; infinite: it may not be started
    start_j: float = 0.0  #: what its start costs


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
    #: (least, spread): a share t / (spread + t) of answers is taken for shorter than least + t tokens, none for shorter
    #: than `least`; None: 0 and the expected output
    short_output: tuple[float, float] | None = None
    previous: int = -1  #: replica chosen last (hysteresis), -1 none
    turn: int = 0  #: a counter, so that replicas of which nothing is known take turns


@dataclass(frozen=True, slots=True)
class Config:
    """Raises EnergyLensError for a value out of range."""

    headroom: float = 0.25  #: part of each latency target that is kept free for what is not predicted
    risk: float = 0.005  #: answers expected to miss their time per token by a placement, at most
    kv_headroom: float = 0.10
    hysteresis: float = 0.03
    max_age_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("headroom", "risk", "kv_headroom", "hysteresis"):
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


@lru_cache(maxsize=256)
def _cells(table: StepTable) -> tuple[Array, list[list[float]]]:
    """Of (n, context) in one row: intercepts of marginal joules beside n and of seconds of a step of n + 1, and their
    slopes in the context, so that one look-up and one multiplication interpolate. As an array and as lists."""
    cells: Array = np.empty((table.max_num_seqs + 1, len(CONTEXTS) - 1, 4))
    # Never faster with more: padding and kernels' choices may say so for a few sizes.
    slower = np.maximum.accumulate(table.decode_s, axis=0)
    after = np.minimum(np.arange(table.max_num_seqs + 1) + 1, table.max_num_seqs)
    for k, values in enumerate((table.marginal_j, slower[after])):
        slope = np.diff(values, axis=1) / np.diff(_CONTEXTS)
        cells[..., k] = values[:, :-1] - slope * _CONTEXTS[:-1]
        cells[..., k + 2] = slope
    rows: Array = cells.reshape(-1, 4)
    return rows, rows.tolist()


class Fleet:
    """The tables of some replicas, stacked once so that all are read together."""

    def __init__(self, tables: Sequence[StepTable | None]) -> None:
        unique = list({id(table): table for table in tables if table is not None}.values())
        first, count = {}, 0
        for table in unique:
            first[id(table)] = count
            count += len(_cells(table)[0])
        self.known = np.array([table is not None for table in tables], dtype=bool)
        self.all_known = bool(self.known.all())
        self.cells = np.concatenate([_cells(table)[0] for table in unique]) if unique else np.zeros((_WIDTH, 4))
        self.first_cell = np.array([first.get(id(table), 0) for table in tables], dtype=np.int64)
        self.most = np.array([1 if table is None else table.max_num_seqs for table in tables], dtype=np.int64)

        def column(name: str) -> Array:
            return np.array([np.nan if table is None else getattr(table, name) for table in tables], dtype=np.float64)

        self.prefill_s, self.prefill_j = column("prefill_s_per_token"), column("prefill_j_per_token")
        self.pair_s = column("pair_s")
        self.pair_j = column("pair_j") - column("idle_w") * self.pair_s
        self.kv_tokens = column("kv_tokens")
        #: a step of one sequence: which kind is faster
        self.alone_s = np.array([np.nan if table is None else table.decode_s[1, 0] for table in tables])
        self.alone_list: list[float] = self.alone_s.tolist()
        #: the same for one replica at a time
        self.rows = [
            None if table is None else (_cells(table)[1], table.max_num_seqs, table.kv_tokens, *coefficients)
            for table, *coefficients in zip(
                tables, *(each.tolist() for each in (self.prefill_s, self.pair_s, self.prefill_j, self.pair_j)),
                strict=True,
            )
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)


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
    usable: npt.NDArray[np.bool_]  #: healthy, not draining, powered or to be started
    role: npt.NDArray[np.str_] | None = None  #: None: all do both
    start_s: Array | None = None  #: until each serves: 0 for those that are powered. None: none is to be started
    start_j: Array | None = None

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
        powered = np.array([each.powered for each in snapshots], dtype=bool)
        start_s = np.where(powered, 0.0, column("start_s"))
        return cls(
            Fleet([each.table for each in snapshots]), running, column("waiting_tokens"), used,
            np.where(np.isnan(context), derived, context), column("prefill_tokens_per_s"), column("time_factor"),
            column("age_s"),
            np.array([each.healthy for each in snapshots], dtype=bool) & np.isfinite(start_s),
            np.array([each.role for each in snapshots]) if any(each.role != "both" for each in snapshots) else None,
            *((None, None) if powered.all() else (np.nan_to_num(start_s, posinf=0.0),
                                                  np.where(powered, 0.0, column("start_j")))),
        )  # fmt: skip


class Ranking(Sequence[Verdict]):
    """Verdicts, best first; each is made when it is looked at, so ranking many replicas costs arrays only."""

    __slots__ = ("_request", "_snapshots", "fallback", "joules", "order", "risk", "state", "tpot_s", "ttft_s")

    def __init__(
        self, order: Sequence[int] | npt.NDArray[np.int64], state: Sequence[int] | npt.NDArray[np.int64],
        joules: Sequence[float] | Array, ttft_s: Sequence[float] | Array, tpot_s: Sequence[float] | Array,
        risk: Sequence[float] | Array, fallback: bool, snapshots: Snapshots, request: Request,
    ) -> None:  # fmt: skip
        self.order, self.state, self.joules = order, state, joules
        self.ttft_s, self.tpot_s, self.risk = ttft_s, tpot_s, risk
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
        if missed:
            return "misses " + ", ".join(missed)
        late = f", or {self.risk[i]:.1%} of an answer more would be late for prompts that come between"
        return "misses the room kept free in latency, sequences or KV cache" + late


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
    return (_rank_few if len(snapshots.fleet) <= FEW else _rank_many)(snapshots, request, config)


def _constants(request: Request) -> tuple[float, float, float, float, float, float]:
    """Expected output on the replica, what answers endure at least and how that spreads (in output tokens), a typical
    prompt, the request's own mean context, time per token at most."""
    output = float(request.expected_output_tokens) if request.phase != "prefill" else 0.0
    least, spread = request.short_output or (0.0, float(request.expected_output_tokens))
    typical = request.prompt_tokens if request.typical_prompt_tokens is None else request.typical_prompt_tokens
    own = max(request.prompt_tokens + output / 2, 1.0)
    return output, SPARED * least, max(spread, 1e-3), max(float(typical), 1.0), own, min(request.tpot_s, 1e6)


def _rank_few(s: Snapshots, request: Request, config: Config) -> Ranking:
    """One replica after another in plain Python: quicker than numpy up to `FEW` replicas. The same arithmetic as in
    `_rank_many`, where it is explained."""
    output, least, spread, typical, own, target_s = _constants(request)
    prompt, previous = float(request.prompt_tokens), request.previous
    # Of the prompt at least one token is computed, and none where another replica has prefilled it.
    least_new, prefills = (0.0, 0.0) if request.phase == "decode" else (1.0, 1.0)
    held, half_prompt, per_token = prompt + output, 0.5 * typical, typical / output if output else 0.0
    kept, kv_kept, most_risk, most_age_s = 1 - config.headroom, 1 - config.kv_headroom, config.risk, config.max_age_s
    most_ttft_s, most_tpot_s = request.ttft_s * kept, request.tpot_s * kept
    rows, state, key = s.fleet.rows, [], []
    joules, ttft_s, tpot_s, risks = [], [], [], []
    count, fallback, least_j = len(rows), True, math.inf
    cached = request.cached_tokens
    have = np.asarray(cached, dtype=np.float64).tolist() if not isinstance(cached, float) else cached
    usable = s.usable.tolist()
    if s.role is not None and request.phase != "both":
        usable = [a and b in ("both", request.phase) for a, b in zip(usable, s.role.tolist(), strict=True)]
    for i, (row, may, running, waiting, used, mean_context, rate, factor, age_s, hit) in enumerate(zip(
        rows, usable, s.running.tolist(), s.waiting_tokens.tolist(), s.kv_tokens_used.tolist(),
        s.mean_context.tolist(), s.prefill_tokens_per_s.tolist(), s.time_factor.tolist(), s.age_s.tolist(),
        have if isinstance(have, list) else [have] * count, strict=True,
    )):  # fmt: skip
        # NaN compares false, so what is not known is not taken for known.
        known = row is not None and age_s <= most_age_s and running + waiting + used + mean_context + rate * factor >= 0
        if row is None or not known:
            state.append(UNKNOWN if may else OUT)
            key.append((i - request.turn) % count if may else 0.0)
            joules.append(_NAN)
            ttft_s.append(_NAN)
            tpot_s.append(_NAN)
            risks.append(_NAN)
            continue
        cells, most, kv_tokens, prefill_s, pair_s, prefill_j, pair_j = row
        after = running + 1.0
        context = (running * mean_context + own) / after
        n = int(running) if running < most else most
        marginal_0, step_0, marginal_1, step_1 = cells[n * _WIDTH + bisect_right(_INNER_LIST, context)]
        uncached = least_new if prompt - hit < least_new else (prompt - hit) * prefills
        pairs = uncached * (prompt - 0.5 * uncached)
        added_j = uncached * prefill_j + pairs * pair_j + output * (marginal_0 + context * marginal_1)
        step_s = (step_0 + context * step_1) * factor
        token_s = (prefill_s + half_prompt * pair_s) * factor
        own_s = (uncached * prefill_s + pairs * pair_s) * factor
        queue_s = waiting * token_s
        before_s = queue_s + own_s
        share = rate * token_s
        left = 1.0 - share if share < 0.95 else 0.05
        first_s = before_s / left + 2.0 * step_s
        each_s, risk = step_s / left, 0.0
        if output:
            full_s = step_s + after * per_token * token_s
            each_s = full_s if full_s > each_s else each_s
            slack_s = target_s - each_s if target_s - each_s > 1e-6 else 1e-6
            endured_s, spared_s = spread * slack_s, least * slack_s
            longer_s, shorter_s = (own_s, queue_s) if own_s > queue_s else (queue_s, own_s)
            if longer_s > spared_s:
                ahead_s = longer_s - spared_s
                risk = shorter_s / (typical * token_s) * ahead_s / (endured_s + ahead_s)
            if own_s > spared_s:
                hit_s = own_s - spared_s
                ruined = hit_s / (endured_s + hit_s)
                risk += running * ruined * ruined
            if share * before_s > spared_s:
                behind_s = share * before_s - spared_s
                risk += behind_s / (endured_s + behind_s)
        if s.start_s is not None and s.start_j is not None:
            added_j += float(s.start_j[i])
            first_s += float(s.start_s[i])
        joules.append(added_j)
        ttft_s.append(first_s)
        tpot_s.append(each_s)
        risks.append(risk)
        if not may:
            state.append(OUT)
            key.append(0.0)
            continue
        fallback = False
        over_kv = used + waiting + held - kv_tokens * kv_kept
        if first_s <= most_ttft_s and each_s <= most_tpot_s and over_kv <= 0 and after <= most and risk <= most_risk:
            state.append(FEASIBLE)
            key.append(added_j)
            least_j = added_j if added_j < least_j else least_j
        else:
            damage = max(first_s / most_ttft_s - 1, 0.0) + after * max(each_s / most_tpot_s - 1, 0.0)
            late = before_s / most_ttft_s
            damage += share * own_s / (typical * token_s) * late / (1 + late)
            saved_s = (hit if hit < prompt else prompt) * prefill_s * factor
            damage -= LATER * share * saved_s / (typical * token_s) * late / (1 + late * late * late)
            state.append(INFEASIBLE)
            key.append(damage + max(over_kv / (kv_tokens * kv_kept), 0.0) + max(after / most - 1, 0.0) + risk)
    near_j, alone_s = least_j / (1 - config.hysteresis), s.fleet.alone_list
    places = [
        (here, (-1.0 if i == previous else alone_s[i]) if here == FEASIBLE and value <= near_j else _LAST, value)
        for i, (here, value) in enumerate(zip(state, key, strict=True))
    ]
    order = sorted(range(count), key=places.__getitem__)
    return Ranking(order, state, joules, ttft_s, tpot_s, risks, fallback, s, request)


def _rank_many(s: Snapshots, request: Request, config: Config) -> Ranking:
    """All replicas at once in numpy."""
    fleet = s.fleet
    output, least, spread, typical, own, target_s = _constants(request)
    cached = np.asarray(request.cached_tokens, dtype=np.float64)
    uncached = np.maximum(request.prompt_tokens - cached, 1.0)
    if request.phase == "decode":
        uncached = np.zeros(len(fleet))
    # NaN compares false, so what is not known is not taken for known.
    total = s.running + s.waiting_tokens + s.kv_tokens_used + s.mean_context + s.prefill_tokens_per_s * s.time_factor
    known = (s.age_s <= config.max_age_s) & (total >= 0) & fleet.known
    running, mean_context = np.where(known, s.running, 0.0), np.where(known, s.mean_context, 0.0)
    after = running + 1.0
    context = (running * mean_context + own) / after
    n = np.minimum(running, fleet.most).astype(np.int64)
    cell = fleet.cells.take(fleet.first_cell + n * _WIDTH + _INNER.searchsorted(context, "right"), axis=0).T
    pairs = uncached * (request.prompt_tokens - 0.5 * uncached)
    joules = uncached * fleet.prefill_j + pairs * fleet.pair_j + output * (cell[0] + context * cell[2])
    step_s = (cell[1] + context * cell[3]) * s.time_factor
    token_s = (fleet.prefill_s + 0.5 * typical * fleet.pair_s) * s.time_factor
    own_s = (uncached * fleet.prefill_s + pairs * fleet.pair_s) * s.time_factor
    queue_s = s.waiting_tokens * token_s
    before_s = queue_s + own_s
    # A step in which prompts are prefilled takes their time besides; the share of time that goes there delays decodes.
    share = s.prefill_tokens_per_s * token_s
    left = np.maximum(1.0 - share, 0.05)
    ttft_s = before_s / left + 2.0 * step_s
    tpot_s, risk = step_s / left, np.zeros(len(fleet))
    if output:
        # A batch that stays as large gets a prompt for each request that ends. Lately it may have been small.
        tpot_s = np.maximum(tpot_s, step_s + after * (typical / output) * token_s)
        slack_s = np.maximum(target_s - tpot_s, 1e-6)
        endured_s, spared_s = spread * slack_s, least * slack_s
        longer_s = np.maximum(own_s, queue_s)
        ahead_s = np.maximum(longer_s - spared_s, 0.0)
        hit_s = np.maximum(own_s - spared_s, 0.0)
        behind_s = np.maximum(share * before_s - spared_s, 0.0)
        risk = (before_s - longer_s) / (typical * token_s) * ahead_s / (endured_s + ahead_s)
        risk += running * (hit_s / (endured_s + hit_s)) ** 2 + behind_s / (endured_s + behind_s)
    if s.start_s is not None and s.start_j is not None:
        joules, ttft_s = joules + s.start_j, ttft_s + s.start_s
    kept = 1 - config.headroom
    over_ttft, over_tpot = ttft_s / (request.ttft_s * kept), tpot_s / (request.tpot_s * kept)
    over_seqs = after / fleet.most
    held = s.kv_tokens_used + s.waiting_tokens + (request.prompt_tokens + output)
    over_kv = held / (fleet.kv_tokens * (1 - config.kv_headroom))
    worst = np.maximum(np.maximum(over_ttft, over_tpot), np.maximum(over_kv, over_seqs))
    state = np.where((worst <= 1) & (risk <= config.risk), FEASIBLE, INFEASIBLE)
    usable = s.usable
    if s.role is not None and request.phase != "both":
        usable = usable & ((s.role == request.phase) | (s.role == "both"))
    state = np.where(usable, np.where(known, state, UNKNOWN), OUT)
    key = joules.copy()
    if state.any():
        # Damage counts each who misses: the request itself, and by time per token those that run there; and, against a
        # typical prompt, those that come while it waits and are delayed by its own, less what a cached prefix spares
        # them. That is most where the queue is about as long as the target: far beyond it they are late anyway.
        damage = np.maximum(over_ttft - 1, 0) + after * np.maximum(over_tpot - 1, 0) + np.maximum(over_kv - 1, 0)
        late = before_s / (request.ttft_s * kept)
        damage += share * own_s / (typical * token_s) * late / (1 + late)
        saved_s = np.minimum(cached, request.prompt_tokens) * fleet.prefill_s * s.time_factor
        damage -= LATER * share * saved_s / (typical * token_s) * late / (1 + late * late * late)
        damage += np.maximum(over_seqs - 1, 0) + risk
        turns = (np.arange(len(key)) - request.turn) % max(len(key), 1)
        key = np.select([state == FEASIBLE, state == INFEASIBLE, state == UNKNOWN], [joules, damage, turns], 0.0)
    feasible = state == FEASIBLE
    near = feasible & (joules <= np.where(feasible, joules, np.inf).min(initial=np.inf) / (1 - config.hysteresis))
    place = np.where(near, fleet.alone_s, _LAST)
    if 0 <= request.previous < len(key) and near[request.previous]:
        place[request.previous] = -1.0
    fallback = not bool((known & usable).any())
    return Ranking(np.lexsort((key, place, state)), state, joules, ttft_s, tpot_s, risk, fallback, s, request)
