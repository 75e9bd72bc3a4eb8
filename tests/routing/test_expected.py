"""Expected output lengths: learnt by prompt length, cut at max_tokens, forgotten slowly, in bounded memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from energylens_vllm.routing.expected import FIRST_GUESS, ExpectedOutput


def test_before_anything_has_ended() -> None:
    assert ExpectedOutput().tokens(100) == FIRST_GUESS
    assert ExpectedOutput().tokens(100, 16) == 16


def test_lengths_by_prompt() -> None:
    expected = ExpectedOutput()
    for _ in range(1000):
        expected.learn(100, 50)
        expected.learn(4000, 500)
    assert expected.tokens(100) == pytest.approx(50, rel=0.2)
    assert expected.tokens(4000) == pytest.approx(500, rel=0.05)
    assert expected.tokens(30) == pytest.approx(275, rel=0.05)  # never seen: the mean of all
    assert expected.tokens(4000, 64) == pytest.approx(64, rel=0.02)
    assert expected.tokens(4000, 1) == 1


def test_a_distribution_is_cut_not_its_mean() -> None:
    draw, expected = random.Random(0), ExpectedOutput()
    lengths = [max(1, int(draw.lognormvariate(4.5, 1.0))) for _ in range(4000)]
    for length in lengths:
        expected.learn(500, length)
    for most in (20, 100, 400):
        true = sum(min(length, most) for length in lengths) / len(lengths)
        assert expected.tokens(500, most) == pytest.approx(true, rel=0.12)


def test_what_is_long_ago_is_forgotten() -> None:
    expected = ExpectedOutput()
    for _ in range(20_000):
        expected.learn(500, 1000)
    for _ in range(10_000):
        expected.learn(500, 100)
    assert expected.tokens(500) == pytest.approx(100, rel=0.1)


def test_memory_does_not_grow_and_numbers_do_not_overflow() -> None:
    expected, draw = ExpectedOutput(), random.Random(1)

    def learn(count: int) -> None:
        for _ in range(count):
            expected.learn(draw.randrange(10**7), draw.randrange(10**7))

    learn(2_000)
    tracemalloc.start()
    learn(100_000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 120_000  # the floats of 23 histograms, each an object once its bin is not empty
    assert 10**5 < expected.tokens(10**6) < 10**7


def test_no_output_says_nothing() -> None:
    expected = ExpectedOutput()
    expected.learn(100, 0)
    assert expected.tokens(100) == FIRST_GUESS


def test_how_short_answers_may_be() -> None:
    expected, draw = ExpectedOutput(), random.Random(0)
    assert expected.short == (0.0, FIRST_GUESS)
    lengths = [40 + int(draw.expovariate(1 / 300)) for _ in range(3000)]
    for tokens in lengths:
        expected.learn(500, tokens)
    least, spread = expected.short
    assert 20 < least <= 45  # next to none is shorter
    for limit in (50, 60, 80):  # the law holds up to a quarter of the mean, and is not far off
        share = sum(tokens < limit for tokens in lengths) / len(lengths)
        law = (limit - least) / (spread + limit - least)
        assert share <= law + 0.02 < share + 0.12


def test_some_answers_of_a_few_tokens_show() -> None:
    expected, draw = ExpectedOutput(), random.Random(1)
    for _ in range(3000):
        expected.learn(500, draw.choice([4, 400, 400, 400]))
    least, spread = expected.short
    assert least <= 4
    assert spread < 100  # a quarter is shorter than 19 tokens, a sixteenth of the mean
