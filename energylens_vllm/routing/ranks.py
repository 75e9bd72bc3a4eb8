"""Which data-parallel rank of one vLLM a request goes to, from what the API server knows of its ranks.

Only for ranks that are independent: those of a model with experts run in lockstep, where an idle one saves nothing.
The API server counts requests by rank, its own exactly; prompt tokens that wait are taken for as many as the prompts of
late had. Prefixes in the ranks' caches are those of the prompts that this server sent there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from energylens_vllm.routing.decisions import Decisions
from energylens_vllm.routing.expected import ExpectedOutput
from energylens_vllm.routing.policy import Request, Snapshots, rank
from energylens_vllm.routing.prefixes import Prefixes
from energylens_vllm.routing.prompts import BLOCK_TOKENS, hashes
from energylens_vllm.routing.table import StepTable

#: Weight of a request in the mean prompt, and of a report in the mean ratio of step times.
LEARNING = 0.05


@dataclass(frozen=True, slots=True)
class Load:
    """What a rank holds. `kv_usage` is the part of its KV cache that is used, None if that is not told."""

    running: float
    waiting: float
    kv_usage: float | None


class Ranks:
    """Chooses among `count` ranks of one kind. Not safe for several threads at once."""

    def __init__(
        self, table: StepTable, count: int, ttft_s: float, tpot_s: float, decisions: Decisions | None = None
    ) -> None:
        self._table, self._ttft_s, self._tpot_s = table, ttft_s, tpot_s
        self._snapshots = Snapshots.empty([table] * count)
        self._expected, self._prefixes = ExpectedOutput(), Prefixes()
        self._decisions = decisions or Decisions()
        self._mean_prompt: float | None = None
        self._previous = -1
        self._names = [str(i) for i in range(count)]

    def choose(
        self, loads: Sequence[Load], prompt: Sequence[int] | None, max_tokens: int | None = None
    ) -> int | None:  # fmt: skip
        """The rank for a prompt of these tokens, None if vLLM should decide."""
        tokens = len(prompt) if prompt else 1
        blocks = tuple(hashes(prompt, BLOCK_TOKENS)) if prompt else ()
        typical = float(tokens) if self._mean_prompt is None else self._mean_prompt
        output = self._expected.tokens(tokens, max_tokens)
        s = self._snapshots
        held = [load.running + load.waiting for load in loads]
        used = [
            n * (typical + output / 2) if load.kv_usage is None else load.kv_usage * self._table.kv_tokens
            for n, load in zip(held, loads, strict=True)
        ]
        s.running[:], s.kv_tokens_used[:] = held, used
        s.waiting_tokens[:] = [load.waiting * typical for load in loads]
        s.mean_context[:] = [tokens / n if n else 0.0 for n, tokens in zip(held, used, strict=True)]
        cached = np.array([BLOCK_TOKENS * self._prefixes.matched(name, blocks) for name in self._names], dtype=float)
        request = Request(
            tokens,
            output,
            cached,
            self._ttft_s,
            self._tpot_s,
            typical_prompt_tokens=typical,
            short_output=self._expected.short,
            previous=self._previous,
        )
        ranking = rank(s, request)
        best = ranking.best
        if ranking.fallback or best is None:
            self._decisions.record(ranking, 0)
            return None
        self._decisions.record(ranking, best)
        self._previous = best
        self._prefixes.add(self._names[best], blocks, int(self._table.kv_tokens / BLOCK_TOKENS))
        uncached = max(tokens - float(cached[best]), 1.0)
        self._mean_prompt = uncached if self._mean_prompt is None else typical + LEARNING * (uncached - typical)
        return best

    def ended(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request has ended."""
        self._expected.learn(prompt_tokens, output_tokens)

    def timed(self, rank: int, predicted_s: float, measured_s: float) -> None:
        """Some steps of a rank took `measured_s`."""
        if predicted_s > 0 and measured_s > 0:
            factors = self._snapshots.time_factor
            factors[rank] += LEARNING * (measured_s / predicted_s - factors[rank])
