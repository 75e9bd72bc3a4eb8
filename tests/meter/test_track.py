"""What one GPU's counter and power are made into, fault by fault."""

from __future__ import annotations

import pytest

from energylens_vllm.meter.gpu import State
from energylens_vllm.meter.track import WRAP_J, Reading, Track

WATTS = 400.0


def run(track: Track, counter: list[float | None], start_s: float = 0.0) -> list[Reading]:
    """Power of 400 W each 0.1 s and a counter reading each second (None: no reading that second)."""
    readings = []
    for second, joules in enumerate(counter):
        for tenth in range(10):
            track.add_power(start_s + second + tenth / 10, WATTS)
        if joules is not None and (reading := track.add_counter(start_s + second + 0.95, joules)) is not None:
            readings.append(reading)
    return readings


def even(count: int, first_j: float = 1000.0, scale: float = 1.0) -> list[float | None]:
    return [first_j + scale * WATTS * i for i in range(count)]


def test_a_counter_that_agrees_is_taken() -> None:
    track = Track("0", "gpu")
    readings = run(track, even(21))
    assert len(readings) == 20
    assert all(r.energy_j == WATTS and r.source == "counter" and r.trusted for r in readings)
    assert all(r.integrated_j == pytest.approx(WATTS) for r in readings)
    assert [r.start_s for r in readings[1:]] == [r.end_s for r in readings[:-1]]
    assert readings[0].power_w == pytest.approx(WATTS)
    assert not track.faults


@pytest.mark.parametrize("scale", [2.0, 1.12, 0.88, 0.5])
def test_a_counter_that_lies_is_noticed_after_ten_seconds(scale: float) -> None:
    track = Track("0", "gpu")
    readings = run(track, even(21, scale=scale))
    assert [r.trusted for r in readings] == [True] * 10 + [False] * 10
    assert track.faults == {"disagreement": 1}
    readings = run(track, even(15, first_j=1000 + 20 * WATTS * scale + WATTS), start_s=21.0)
    assert readings[-1].trusted  # it is believed again when it has agreed for as long


@pytest.mark.parametrize("scale", [1.08, 0.92])
def test_a_small_difference_is_no_disagreement(scale: float) -> None:
    assert all(r.trusted for r in run(Track("0", "gpu"), even(31, scale=scale)))


def test_that_power_lags_is_no_disagreement() -> None:
    """100 W, then 700 W for the last 2 of 12 s: power, the mean of the last second, misses 300 J of 2.4 kJ."""
    track = Track("0", "gpu")

    def spent_j(time_s: float) -> float:
        return 100.0 * time_s + 600.0 * max(time_s - 10.0, 0.0)

    for i in range(1, 141):
        time_s = i / 10
        track.add_power(time_s, spent_j(time_s) - spent_j(time_s - 1.0))
        if i % 10 == 0:
            track.add_counter(time_s, spent_j(time_s))
    assert not track.faults


def test_a_counter_of_32_bits_wraps() -> None:
    track = Track("0", "gpu")
    counter = [joules % WRAP_J for joules in even(9, first_j=WRAP_J - 3.5 * WATTS)]
    readings = run(track, counter)
    assert [r.energy_j for r in readings] == pytest.approx([WATTS] * 8)
    assert all(r.trusted for r in readings)
    assert track.faults == {"wrap": 1}


def test_a_counter_that_starts_anew_is_bridged_by_power() -> None:
    track = Track("0", "gpu")
    readings = run(track, [*even(5, first_j=5e6), *even(5, first_j=12.0)])
    assert [r.source for r in readings] == ["counter"] * 4 + ["power"] + ["counter"] * 4
    assert [r.energy_j for r in readings] == pytest.approx([WATTS] * 9)
    assert [r.trusted for r in readings] == [True] * 4 + [False] + [True] * 4
    assert track.faults == {"reset": 1}


def test_a_counter_that_jumps_does_not_spoil_the_sum() -> None:
    track = Track("0", "gpu")
    readings = run(track, [*even(5), *even(5, first_j=1e9)])
    assert sum(r.energy_j for r in readings) == pytest.approx(9 * WATTS)
    assert track.faults == {"jump": 1}


def test_a_counter_that_stands_still_is_replaced_by_power() -> None:
    track = Track("0", "gpu")
    readings = run(track, [*even(4), *[1000 + 3 * WATTS] * 8, *even(4, first_j=9000.0)])
    assert sum(r.energy_j for r in readings) == pytest.approx(15 * WATTS)
    assert [r.source for r in readings].count("counter") == 6
    assert not any(r.trusted for r in readings if r.source == "power")
    assert track.faults == {"stuck": 1}
    assert not track.is_stuck


def test_a_time_without_sight_is_counted_but_not_trusted() -> None:
    track = Track("0", "gpu")
    before = run(track, even(5))
    track.lost()
    after = run(track, even(3, first_j=1000 + WATTS * 64), start_s=64.0)
    assert [r.energy_j for r in after] == pytest.approx([60 * WATTS, WATTS, WATTS])
    assert [r.trusted for r in after] == [False, True, True]
    assert after[0].start_s == before[-1].end_s
    assert track.faults == {"lost": 1}


def test_a_reload_without_sight_leaves_a_gap() -> None:
    track = Track("0", "gpu")
    run(track, even(5, first_j=1e5))
    track.lost()
    after = run(track, even(3, first_j=3.0), start_s=64.0)
    assert [r.start_s for r in after] == pytest.approx([64.95, 65.95])
    assert track.faults == {"lost": 1, "reset": 1}


def test_without_a_counter_power_is_all_there_is() -> None:
    track = Track("0", "nothing")
    readings = []
    for i in range(50):
        track.add_power(i / 10, WATTS)
        if i % 10 == 0 and (reading := track.add_time(i / 10)) is not None:
            readings.append(reading)
    assert [r.energy_j for r in readings] == pytest.approx([WATTS] * 4)
    assert all(r.source == "power" and r.trusted for r in readings)


def test_on_a_superchip_the_counter_is_the_modules() -> None:
    readings = run(Track("0", "module"), even(6, scale=1.5))
    assert [r.energy_j for r in readings] == pytest.approx([WATTS] * 5)
    assert [r.module_j for r in readings] == [1.5 * WATTS] * 5
    assert all(r.trusted and r.source == "power" for r in readings)


def test_throttling_is_timed() -> None:
    track = Track("0", "gpu")
    track.add_counter(0.0, 0.0)
    for i in range(10):
        track.add_power(0.2 * i, WATTS)
        track.add_state(0.2 * i, State(limit_w=700.0, throttled=frozenset({"power_cap"} if i >= 5 else ())))
    reading = track.add_counter(1.9, 760.0)
    assert reading is not None
    assert reading.throttled_s == pytest.approx({"power_cap": 1.0})
    assert reading.state.limit_w == 700.0
