"""What a router has decided, as metrics: decisions by reason, fallbacks by cause, joules saved as estimated.

Hosts call `Decisions.record` for each request that they place after a ranking, and `Decisions.fell_back` where there
was none. Counters go to Prometheus in this process unless a host counts in its own way (`count`). No label is taken
from a request, so there are as many series after a day as at the start.

**Joules saved are an estimate**: of each decision the marginal joules that `rank` gave the replica which least-request
would have taken (the fewest requests; the mean of those with as few), less those of the chosen one. Neither is
measured, and the fleet is in the state that our decisions led to, not in least-request's. A counter cannot fall: what a
choice costs more, for latency's sake say, is made up for first by later savings. Both sides are in
`energylens_routing_added_joules_total`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from energylens_vllm.metric import Metric
from energylens_vllm.routing.policy import FEASIBLE, INFEASIBLE, UNKNOWN, Ranking

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

logger = logging.getLogger("energylens_vllm")

#: why a request went where it went
REASONS = ("least_joules", "hysteresis", "least_damage", "unknown", "host", "fallback")
#: why the host's own policy decided
CAUSES = ("no_model", "stale", "no_replica", "error", "unsupported")
SIDES = ("chosen", "least_request")

DECISIONS = "energylens_routing_decisions_total"
FALLBACKS = "energylens_routing_fallbacks_total"
ADDED = "energylens_routing_added_joules_total"
SAVED = "energylens_routing_saved_joules_total"

METRICS = (
    Metric(
        DECISIONS,
        "counter",
        "decisions",
        "Requests placed, by reason: fewest joules of the replicas that hold the targets; the one before, within "
        "hysteresis; least damage, as none holds them; a replica of which nothing is known, as those known are out or "
        "worse; another than ranked first, which the host preferred; the host's own policy (fallback).",
        (("reason", REASONS),),
    ),
    Metric(
        FALLBACKS,
        "counter",
        "fallbacks",
        "Requests that the host's own policy placed, by cause: no step model is known, all that is known of replicas "
        "is too old, no replica may be chosen, an error, or replicas that cannot be chosen among.",
        (("cause", CAUSES),),
    ),
    Metric(
        ADDED,
        "counter",
        "joules",
        "Estimated marginal energy of the requests that were placed, at the replica chosen and at the one that "
        "least-request would have chosen.",
        (("side", SIDES),),
    ),
    Metric(
        SAVED,
        "counter",
        "joules",
        "Estimated energy saved against least-request: the difference of both sides, which rises only once what "
        "choices cost more has been made up for. An estimate of the step model, not measured.",
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}

#: raises a counter by a value >= 0: name, value, values of its labels in order
Count = Callable[[str, float, tuple[str, ...]], None]


#: what this process has registered
_counters: dict[tuple[object, str], Counter] = {}


class Decisions:
    """Counts what one router decides. Cheap: a few microseconds a decision. Never raises: counting is no reason to
    lose a request."""

    def __init__(self, count: Count | None = None) -> None:
        self._count = count or prometheus_count()
        self._debt_j = 0.0  #: what choices cost more than least-request's, not made up for yet
        self._failed = False

    def record(self, ranking: Ranking, chosen: int) -> str:
        """A request was ranked and went to `chosen`. Gives the reason that was counted."""
        try:
            reason = self._reason(ranking, chosen)
            self._count(DECISIONS, 1.0, (reason,))
            if reason == "fallback":
                self._count(FALLBACKS, 1.0, (cause_of(ranking),))
            else:
                self._add_joules(ranking, chosen)
            return reason
        except Exception as error:
            self._complain(error)
            return "fallback"

    def fell_back(self, cause: str) -> None:
        """The host's own policy placed a request without a ranking. A `cause` that is not in `CAUSES` is an error."""
        try:
            self._count(DECISIONS, 1.0, ("fallback",))
            self._count(FALLBACKS, 1.0, (cause if cause in CAUSES else "error",))
        except Exception as error:
            self._complain(error)

    def _reason(self, ranking: Ranking, chosen: int) -> str:
        if ranking.fallback or ranking.best is None:
            return "fallback"
        if chosen != ranking.best:
            return "host"
        state = ranking.state[chosen]
        if state == FEASIBLE:
            least = np.where(np.asarray(ranking.state) == FEASIBLE, ranking.joules, np.inf).min()
            return "least_joules" if ranking.joules[chosen] <= least else "hysteresis"
        return "unknown" if state == UNKNOWN else "least_damage"

    def _add_joules(self, ranking: Ranking, chosen: int) -> None:
        state, joules = np.asarray(ranking.state), np.asarray(ranking.joules)
        known = (state == FEASIBLE) | (state == INFEASIBLE)
        if not known[chosen]:
            return
        running = np.where(known, ranking.snapshots.running, np.inf)
        chosen_j, baseline_j = float(joules[chosen]), float(joules[running == running.min()].mean())
        self._count(ADDED, chosen_j, ("chosen",))
        self._count(ADDED, baseline_j, ("least_request",))
        self._debt_j -= baseline_j - chosen_j
        if self._debt_j < 0:
            self._count(SAVED, -self._debt_j, ())
            self._debt_j = 0.0

    def _complain(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("routing decisions are not counted: %s: %s", type(error).__name__, error)


def cause_of(ranking: Ranking) -> str:
    """Why a ranking leaves the choice to the host."""
    if ranking.best is None:
        return "no_replica"
    return "stale" if ranking.snapshots.fleet.known.any() else "no_model"


def prometheus_count(registry: CollectorRegistry | None = None) -> Count:
    """Counts in Prometheus counters of this process, in the default registry unless another is given.

    Where they are registered already, by an earlier router of this process, it goes on with those.
    """
    import prometheus_client  # not before it is wanted: Ray counts in its own way

    registry = registry or prometheus_client.REGISTRY
    children: dict[tuple[str, tuple[str, ...]], Counter] = {}
    for metric in METRICS:
        counter = _counters.get((registry, metric.name))
        if counter is None:
            counter = prometheus_client.Counter(metric.name, metric.help, metric.label_names, registry=registry)
            _counters[registry, metric.name] = counter
        for labels in metric.known_label_values():
            children[metric.name, labels] = counter.labels(*labels) if labels else counter

    def count(name: str, value: float, labels: tuple[str, ...]) -> None:
        children[name, labels].inc(value)

    return count
