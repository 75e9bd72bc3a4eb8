"""How long an answer is expected to be: learnt from those before it, by the length of the prompt, in bounded memory.

Lengths of answers are kept as weights of a histogram with two bins an octave, one histogram for each octave of prompt
lengths and one for all. Each answer makes those before it count less, so that the last `WINDOW` or so decide. A request
with `max_tokens` is expected to be cut there, which is why a distribution is kept and not a mean alone.
"""

from __future__ import annotations

import math

#: Output tokens that are expected before any request has ended.
FIRST_GUESS = 200.0
#: Answers that count: the weight of each is 1/e once as many more have come.
WINDOW = 2000.0
#: Answers that a prompt length needs of its own to count as much as all lengths together.
ENOUGH = 30.0
#: Answers that count for the guess that a share t / (mean + t) of them is shorter than t tokens.
GUESSED = 10.0
#: A share of answers that is taken for none.
NEGLIGIBLE = 0.01
_PROMPTS = 22  #: octaves of prompt tokens: up to 2 million
_BINS = 44  #: half octaves of output tokens: likewise


class _Histogram:
    """Weights and tokens of answers by length."""

    __slots__ = ("scale", "tokens", "total", "total_tokens", "weights")

    def __init__(self) -> None:
        self.weights, self.tokens = [0.0] * _BINS, [0.0] * _BINS
        self.total = self.total_tokens = 0.0
        self.scale = 1.0  #: what one answer weighs: grows, so that those before it need not be touched

    def add(self, tokens: int) -> None:
        at = min(int(2 * math.log2(tokens)), _BINS - 1)
        self.weights[at] += self.scale
        self.tokens[at] += self.scale * tokens
        self.total += self.scale
        self.total_tokens += self.scale * tokens
        self.scale *= 1 + 1 / WINDOW
        if self.scale > 1e12:
            self._shrink()

    def _shrink(self) -> None:
        self.weights = [each / self.scale for each in self.weights]
        self.tokens = [each / self.scale for each in self.tokens]
        self.total, self.total_tokens, self.scale = sum(self.weights), sum(self.tokens), 1.0

    @property
    def count(self) -> float:
        """Answers that still count."""
        return self.total / self.scale

    def mean(self, most: float) -> float:
        """Of answers that are cut after `most` tokens; 0 if there were none."""
        if not self.total:
            return 0.0
        if most == math.inf:
            return self.total_tokens / self.total
        tokens = sum(
            min(has, most * weight) for weight, has in zip(self.weights, self.tokens, strict=True) if weight
        )  # the mean of a bin is below `most`, or all of it is taken for longer
        return tokens / self.total

    def short(self) -> tuple[float, float]:
        """See `ExpectedOutput.short`."""
        mean, total = self.total_tokens / self.total, self.count + GUESSED
        least, spread, shorter = 0.0, math.inf, 0.0
        for at in range(_BINS):
            tokens = 2 ** (at / 2)  # from here on is bin `at`
            if tokens > mean / 4:
                break
            share = (shorter / self.scale + GUESSED * tokens / (mean + tokens)) / total
            if share <= NEGLIGIBLE:
                least = tokens
            elif tokens > mean / 16:
                spread = min(spread, (tokens - least) * (1 / share - 1))
            shorter += self.weights[at]
        return least, max(spread, 1.0) if spread < math.inf else mean


class ExpectedOutput:
    """Learns from one model's answers. Not safe for several threads at once."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._short, self._short_at = (0.0, FIRST_GUESS), 0
        self._by_prompt: list[_Histogram | None] = [None] * _PROMPTS

    def learn(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request has ended. One without output says nothing."""
        if output_tokens < 1:
            return
        self._all.add(output_tokens)
        self._short_at -= 1
        at = _octave(prompt_tokens)
        own = self._by_prompt[at]
        if own is None:
            own = self._by_prompt[at] = _Histogram()
        own.add(output_tokens)

    def tokens(self, prompt_tokens: int, max_tokens: float | None = None) -> float:
        """Expected output tokens of a request, at least 1; `max_tokens` is where it would be cut."""
        most = math.inf if max_tokens is None else max(float(max_tokens), 1.0)
        if not self._all.total:
            return min(FIRST_GUESS, most)
        every, own = self._all.mean(most), self._by_prompt[_octave(prompt_tokens)]
        if own is None:
            return max(every, 1.0)
        return min(max((own.count * own.mean(most) + ENOUGH * every) / (own.count + ENOUGH), 1.0), most)

    @property
    def short(self) -> tuple[float, float]:
        """How short answers may be, as (least, spread): next to none is shorter than `least`, and at most a share
        t / (spread + t) is shorter than least + t tokens, up to a quarter of the mean."""
        if self._short_at <= 0 and self._all.total:  # again after some answers: it takes microseconds
            self._short_at = 32
            self._short = self._all.short()
        return self._short


def _octave(prompt_tokens: int) -> int:
    return min(max(int(prompt_tokens), 1).bit_length() - 1, _PROMPTS - 1)
