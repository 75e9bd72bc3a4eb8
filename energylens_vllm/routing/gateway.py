"""Chooses a replica for a request, for gateways that see their replicas' /metrics only.

One `Gateway` is for the replicas of one model. It never raises and never waits: after any error of ours, and as long as
nothing is known of the replicas, `choose` gives None, and the host decides as if nobody had asked.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from energylens_vllm.routing.decisions import Count, Decisions
from energylens_vllm.routing.fleet import LiveFleet, Targets
from energylens_vllm.routing.policy import FEASIBLE, INFEASIBLE
from energylens_vllm.routing.prompts import read
from energylens_vllm.routing.scrape import Scraper, Source

logger = logging.getLogger("energylens_vllm")


class Gateway:
    """Replicas by name, what they tell of themselves, and who is best. Any thread may call it."""

    def __init__(self, targets: Targets | None = None, count: Count | None = None) -> None:
        self.fleet = LiveFleet(targets)
        self.scraper = Scraper(self.fleet)
        self.decisions = Decisions(count)
        self._failed = False

    def start(self) -> None:
        """Begin to read /metrics."""
        self.scraper.start()

    def add(self, key: str, source: Source) -> None:
        """Choose this replica too."""
        self.scraper.add(key, source)

    def remove(self, key: str) -> None:
        """Choose it no more."""
        self.scraper.remove(key)

    def choose(
        self, candidates: Sequence[str], body: object, request: str, tried: Collection[str] = frozenset()
    ) -> str | None:
        """The candidate to send a request to, or None: the host decides. `body` is the OpenAI request.

        The request counts as under way there until `end`, or until the replica reports it. Replicas that were `tried`
        are chosen only if no other is left.
        """
        try:
            return self._choose(candidates, body, request, tried)
        except Exception as error:
            self.decisions.fell_back("error")
            if not self._failed:  # what a request says is not logged, whatever went wrong
                self._failed = True
                logger.warning("routing failed, the host decides (logged once): %s", type(error).__name__)
            return None

    def end(self, request: str) -> None:
        """The request has ended, or will never be sent."""
        self.fleet.end(request)

    def _choose(
        self, candidates: Sequence[str], body: object, request: str, tried: Collection[str]
    ) -> str | None:  # fmt: skip
        left = [key for key in candidates if key not in tried] or list(candidates)
        choice = self.fleet.rank(read(body))
        if choice.fallback is not None:
            self.decisions.fell_back(choice.fallback)
            return None
        ranking, place = choice.ranking, {key: i for i, key in enumerate(choice.keys)}
        if any(key not in place for key in left):
            self.decisions.fell_back("unsupported")
            return None
        if not any(ranking.state[place[key]] in (FEASIBLE, INFEASIBLE) for key in left):
            self.decisions.fell_back("stale")
            return None
        best = next(key for key in choice.order if key in left)
        self.fleet.place(choice, request, best)
        self.decisions.record(ranking, place[best])
        return best
