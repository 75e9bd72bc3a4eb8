"""One GPU's readings over time: the energy counter, power integrated beside it, and whether the two agree.

Each is used for what it is good for. The counter is exact over any stretch that begins and ends at one of its advances
(each 100 ms on an H200), but slow to read, and a driver that is reloaded starts it anew. Power is cheap to read and
lags by up to a second: integrated it says where the counter went while that cannot be read, and whether it lies.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from energylens_vllm.meter.gpu import State

#: what can go wrong with a reading; each is counted
FAULTS = ("wrap", "reset", "jump", "stuck", "disagreement", "lost", "error")

#: Power samples further apart are not joined: what happened between them is not known.
LONGEST_GAP_S = 1.0
#: A counter that stands still for this long is not counting: it advances each 100 ms, also when the GPU is idle.
STUCK_AFTER_S = 3.0
#: Counter and integrated power are compared over this.
CHECKED_OVER_S = 10.0
#: By how much power lags: half of the second over which the driver averages it.
POWER_LAG_S = 0.5
MOST_DISAGREEMENT = 0.10
#: No GPU draws more. A counter that says so has jumped.
MOST_W = 5000.0
#: Some drivers count in 32 bits of millijoules.
WRAP_J = 2**32 * 1e-3


@dataclass(frozen=True, slots=True)
class Reading:
    """What one GPU spent between two times of `time.perf_counter()`. Readings of a GPU follow one another; there is a
    gap only where it could not be read."""

    gpu: str
    start_s: float
    end_s: float
    energy_j: float
    source: Literal["counter", "power"]  #: where `energy_j` is from
    trusted: bool = True  #: False while counter and power disagree, and over times that were not watched
    integrated_j: float | None = None  #: power integrated over the same time; None if it was not watched throughout
    module_j: float = 0.0  #: on a superchip, what its counter says of the whole module
    state: State = State()
    throttled_s: Mapping[str, float] = field(default_factory=dict)  #: reason -> seconds

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def power_w(self) -> float:
        """Mean power."""
        return self.energy_j / self.duration_s


class Agreement:
    """Whether counter and integrated power agree, over the last 10 s or a little more.

    What the driver calls power is the mean of the last second, so it is that of half a second ago. Over 1,000 stretches
    of 10 s of a recorded H200 under changing load the two differ by up to 13 % as they are, and by up to 4 % when power
    is taken half a second later (a median of 0.3 %); over all of it by 0.04 %.
    """

    def __init__(self) -> None:
        self.holds = True
        self._power: tuple[float, float] | None = None  # (s, W) of the latest sample
        self._integrated_j = 0.0
        self._waiting: deque[tuple[float, float]] = deque()  # (s, counter J), until power of half a second later
        self._marks: deque[tuple[float, float, float]] = deque()  # (s, counter J, integrated J), for 10 s

    def add_power(self, time_s: float, power_w: float) -> None:
        """Power at `time_s`, which is later than any before."""
        before_s, before_w = self._power or (time_s, power_w)
        self._power = (time_s, power_w)
        if time_s - before_s > LONGEST_GAP_S:
            self._waiting.clear()
            self._marks.clear()
            return
        while self._waiting and self._waiting[0][0] + POWER_LAG_S <= time_s:
            counter_s, counter_j = self._waiting.popleft()
            part_s = max(counter_s + POWER_LAG_S - before_s, 0.0)
            self._mark(counter_s, counter_j, self._integrated_j + part_s * (before_w + power_w) / 2)
        self._integrated_j += (time_s - before_s) * (before_w + power_w) / 2

    def add_counter(self, time_s: float, counter_j: float) -> None:
        """The counter at `time_s`."""
        self._waiting.append((time_s, counter_j))

    def forget(self) -> None:
        """The counter does not go on from where it was."""
        self._waiting.clear()
        self._marks.clear()

    def _mark(self, time_s: float, counter_j: float, integrated_j: float) -> None:
        marks = self._marks
        marks.append((time_s, counter_j, integrated_j))
        while len(marks) > 2 and time_s - marks[1][0] >= CHECKED_OVER_S:
            marks.popleft()
        since_s, since_counter_j, since_integrated_j = marks[0]
        if time_s - since_s >= CHECKED_OVER_S:
            spent_j = integrated_j - since_integrated_j
            self.holds = abs(counter_j - since_counter_j - spent_j) <= MOST_DISAGREEMENT * spent_j


class _Last(NamedTuple):
    """The counter as last read."""

    time_s: float
    raw_j: float


class Track:
    """Makes readings of one GPU. Give it power and state as often as you like, and the counter about each second."""

    def __init__(self, gpu: str, counts: Literal["gpu", "module", "nothing"]) -> None:
        self.gpu, self.counts = gpu, counts
        self.faults: Counter[str] = Counter()
        self.is_stuck = False
        self.agreement = Agreement()
        self._last: _Last | None = None  # where the next reading begins
        self._moved_s = 0.0  # when the counter last advanced
        self._counted_j = 0.0  # by how much in all
        self._power: tuple[float, float] | None = None
        self._integrated_j, self._is_watched = 0.0, True
        self._state, self._state_s = State(), 0.0
        self._throttled_s: defaultdict[str, float] = defaultdict(float)

    def add_power(self, time_s: float, power_w: float) -> None:
        """Integrate one more sample (trapezoids)."""
        if self._power is not None:
            before_s, before_w = self._power
            if time_s - before_s > LONGEST_GAP_S:
                self._is_watched = False
            else:
                self._integrated_j += (time_s - before_s) * (power_w + before_w) / 2
        self._power = (time_s, power_w)
        held = self.agreement.holds
        self.agreement.add_power(time_s, power_w)
        if held and not self.agreement.holds:
            self.faults["disagreement"] += 1

    def add_state(self, time_s: float, state: State) -> None:
        """Remember the state; what throttles now is taken to have throttled since the last call."""
        if 0.0 < time_s - self._state_s <= LONGEST_GAP_S:
            for reason in state.throttled:
                self._throttled_s[reason] += time_s - self._state_s
        self._state, self._state_s = state, time_s

    def lost(self) -> None:
        """The GPU could not be read: nothing is known until it is read again."""
        self.faults["lost"] += 1
        self._power, self._is_watched = None, False

    def add_counter(self, time_s: float, raw_j: float) -> Reading | None:
        """The counter stood at `raw_j` at `time_s`; the reading since it was last given, None if it is too early."""
        last = self._last
        if last is None:
            self._begin(time_s, raw_j)
            return None
        if raw_j == last.raw_j:
            if time_s - self._moved_s < STUCK_AFTER_S:
                return None
            if not self.is_stuck:
                self.faults["stuck"] += 1
            self.is_stuck = True
            return self._by_power(time_s, raw_j)
        self._moved_s = time_s
        if self.is_stuck:  # it counts again, from where we cannot tell
            self.is_stuck = False
            return self._by_power(time_s, raw_j)
        spent_j = self._spent_j(last, time_s, raw_j)
        if spent_j is None:
            return self._by_power(time_s, raw_j)
        if self.counts == "module":
            reading = self._by_power(time_s, raw_j, trusted=True)
            return None if reading is None else replace(reading, module_j=spent_j)
        integrated_j = self._watched_j(time_s)
        trusted = self.agreement.holds and integrated_j is not None
        reading = self._reading(time_s, spent_j, "counter", trusted, integrated_j)
        self._begin(time_s, raw_j, spent_j)
        return reading

    def add_time(self, time_s: float) -> Reading | None:
        """For a GPU without a counter: the reading since the last call, by power alone."""
        if self._last is None:
            self._begin(time_s, 0.0)
            return None
        return self._by_power(time_s, 0.0, trusted=True)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _begin(self, time_s: float, raw_j: float, spent_j: float = 0.0) -> None:
        if self._last is None:
            self._moved_s = time_s
        self._counted_j += spent_j
        self.agreement.add_counter(time_s, self._counted_j)
        self._last = _Last(time_s, raw_j)
        self._integrated_j, self._is_watched = 0.0, True
        if self._power is not None:  # up to here it is in the reading before
            self._power = (time_s, self._power[1])
        self._throttled_s.clear()

    def _spent_j(self, last: _Last, time_s: float, raw_j: float) -> float | None:
        """What the counter advanced by; None if it does not say."""
        most_j = MOST_W * (time_s - last.time_s)
        if raw_j < last.raw_j:
            spent_j = raw_j + WRAP_J - last.raw_j
            if 0.0 <= spent_j <= most_j and last.raw_j <= WRAP_J:
                self.faults["wrap"] += 1
                return spent_j
            self.faults["reset"] += 1
            return None
        if raw_j - last.raw_j > most_j:
            self.faults["jump"] += 1
            return None
        return raw_j - last.raw_j

    def _watched_j(self, time_s: float) -> float | None:
        """Integrated power up to `time_s`, None if it was not watched throughout."""
        if not self._is_watched or self._power is None or time_s - self._power[0] > LONGEST_GAP_S:
            return None
        before_s, before_w = self._power
        return self._integrated_j + (time_s - before_s) * before_w

    def _by_power(self, time_s: float, raw_j: float, trusted: bool = False) -> Reading | None:
        """The reading by power alone; None, and a gap, if that was not watched. A counter's stand-in is not trusted."""
        integrated_j = self._watched_j(time_s)
        reading = None
        if integrated_j is not None:
            reading = self._reading(time_s, integrated_j, "power", trusted, integrated_j)
        self.agreement.forget()
        self._begin(time_s, raw_j)
        return reading

    def _reading(
        self,
        time_s: float,
        energy_j: float,
        source: Literal["counter", "power"],
        trusted: bool,
        integrated_j: float | None,
    ) -> Reading:
        assert self._last is not None
        start_s, throttled_s = self._last.time_s, dict(self._throttled_s)
        return Reading(
            self.gpu,
            start_s,
            time_s,
            energy_j,
            source,
            trusted,
            integrated_j,
            state=self._state,
            throttled_s=throttled_s,
        )
