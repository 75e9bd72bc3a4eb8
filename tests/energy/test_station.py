"""Open arrivals against a simulation, and against queues whose solution is in every textbook."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.energy.station import Speed, arrivals, interpolated


def speed(completions: np.ndarray, idle_w: float = 100.0) -> Speed:
    n = np.arange(1, len(completions) + 1)
    return Speed(completions, 200.0 + 10.0 * n, n / completions / 50, np.full(len(n), 0.1), idle_w)


def test_one_place_is_the_m_m_1_queue() -> None:
    mu, rate = 4.0, 3.0
    found = arrivals(speed(np.array([mu])), np.array([rate]), np.array([1]))
    assert found.idle_share[0, 0] == pytest.approx(1 - rate / mu)
    assert found.running[0, 0] == pytest.approx(rate / mu)
    assert found.waiting_share[0, 0] == pytest.approx(rate / mu)
    assert found.ttft_s[0, 0] - 0.1 == pytest.approx(rate / mu / (mu - rate))  # waiting time
    assert found.power_w[0, 0] == pytest.approx(100 * (1 - rate / mu) + 210 * rate / mu)


def test_places_of_equal_speed_are_the_m_m_c_queue() -> None:
    places, mu, rate = 5, 1.0, 3.7
    found = arrivals(speed(mu * np.arange(1, places + 1)), np.array([rate]), np.array([places]))
    a = rate / mu
    terms = np.array([a**k / np.prod(np.arange(1, k + 1)) for k in range(places + 1)])
    waits = terms[-1] * places / (places - a)
    erlang_c = waits / (terms[:-1].sum() + waits)
    assert found.waiting_share[0, 0] == pytest.approx(erlang_c)
    assert found.ttft_s[0, 0] - 0.1 == pytest.approx(erlang_c / (places * mu - rate))
    assert found.running[0, 0] == pytest.approx(a)


def test_every_limit_and_rate_at_once() -> None:
    server = speed(6 * np.arange(1, 41) / (10 + np.arange(1, 41)))
    rates, limits = np.array([0.5, 2.0, 3.9]), np.array([1, 4, 20, 40])
    found = arrivals(server, rates, limits)
    for i, rate in enumerate(rates):
        for j, limit in enumerate(limits):
            one = Speed(*(getattr(server, name)[:limit] for name in Speed.__slots__[:-1]), server.idle_w)
            alone = arrivals(one, np.array([rate]), np.array([limit]))
            assert found.power_w[i, j] == pytest.approx(alone.power_w[0, 0], nan_ok=True)
            assert found.ttft_s[i, j] == pytest.approx(alone.ttft_s[0, 0], nan_ok=True)
    assert np.isnan(found.power_w[2, 0]), "faster than they complete"
    assert np.all(np.isfinite(found.power_w[:, 3]))


def test_a_simulated_server_agrees() -> None:
    """Processor sharing with exponential lengths, event by event."""
    places, rate = 8, 1.8
    completions = 4 * np.arange(1, places + 1) / (4 + np.arange(1, places + 1))
    server = speed(completions)
    rng = np.random.default_rng(1)
    now, held, joules, running, idle, count = 0.0, 0, 0.0, 0.0, 0.0, 0
    arrive = rng.exponential(1 / rate)
    while count < 200_000:
        mu = completions[min(held, places) - 1] if held else 0.0
        leave = now + rng.exponential(1 / mu) if held else np.inf
        then = min(arrive, leave)
        joules += (then - now) * (server.power_w[min(held, places) - 1] if held else server.idle_w)
        running += (then - now) * min(held, places)
        idle += (then - now) * (held == 0)
        now = then
        if leave < arrive:
            held, count = held - 1, count + 1
        else:
            held, arrive = held + 1, now + rng.exponential(1 / rate)
    found = arrivals(server, np.array([rate]), np.array([places]))
    assert found.power_w[0, 0] == pytest.approx(joules / now, rel=0.01)
    assert found.running[0, 0] == pytest.approx(running / now, rel=0.02)
    assert found.idle_share[0, 0] == pytest.approx(idle / now, rel=0.05)


def test_interpolation_meets_what_is_known() -> None:
    sizes = np.array([2.0, 8.0, 64.0])
    values = 3 * sizes**0.7
    found = interpolated(64, sizes, values)
    assert found[sizes.astype(int) - 1] == pytest.approx(values)
    assert found[15] == pytest.approx(3 * 16**0.7)
