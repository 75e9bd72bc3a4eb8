"""Model groups of a LiteLLM router: each is a `Gateway` whose replicas are the group's deployments.

Deployments are taken as they come with the requests, so those added at run time are known from their first request on.
`model_info.energylens` of a deployment says what cannot be read from its /metrics; all of it may be left out:

    model_info:
      energylens:
        model: llama-3.1-8b       # name, hub id or config; by default the name that it is served under
        ttft_s: 1.0               # targets; those of a group's first deployment hold for the group
        tpot_s: 0.05
        metrics_url: http://10.0.0.7:8000/metrics
        deployment: {gpu: H200-SXM, power_limit_w: 500}   # arguments of `vllm serve` over what the replica says
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.routing.decisions import Count, prometheus_count
from energylens_vllm.routing.fleet import Targets
from energylens_vllm.routing.gateway import Gateway
from energylens_vllm.routing.scrape import Source, metrics_url

OPTIONS = ("model", "ttft_s", "tpot_s", "metrics_url", "deployment")
#: A deployment that no request could have gone to for so long is read no more.
FORGET_S = 3600.0
#: Groups kept, and deployments of each: far more than anybody has, and a bound.
MOST_GROUPS, MOST_DEPLOYMENTS = 256, 1024

Deployment = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class _Group:
    gateway: Gateway
    seen_s: dict[str, float]  #: deployment -> when it last came with a request


class Groups:
    """Chooses among the deployments of each group."""

    def __init__(self, count: Count | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._groups: dict[str, _Group] = {}

    def choose(
        self, group: str, deployments: Sequence[Deployment], body: object, request: str, tried: Sequence[str] = ()
    ) -> Deployment | None:
        """The deployment for a request, None if LiteLLM should decide.

        Raises EnergyLensError for a `model_info.energylens` that cannot be used.
        """
        if not deployments:
            return None
        by_id = {str(each["model_info"]["id"]): each for each in deployments}
        gateway = self._gateway(group, by_id)
        chosen = gateway.choose(list(by_id), body, request, frozenset(tried))
        return None if chosen is None else by_id[chosen]

    def end(self, group: str, request: str) -> None:
        """The request has ended, well or not."""
        if (known := self._groups.get(group)) is not None:
            known.gateway.end(request)

    def _gateway(self, name: str, deployments: Mapping[str, Deployment]) -> Gateway:
        group, now = self._groups.get(name), self._clock()
        if group is None:
            if len(self._groups) >= MOST_GROUPS:
                raise EnergyLensError(f"model groups: more than {MOST_GROUPS}")
            targets = targets_of(next(iter(deployments.values())))
            self._count = self._count or prometheus_count()
            group = self._groups[name] = _Group(Gateway(targets, self._count), {})
            group.gateway.start()
        for key, deployment in deployments.items():
            if key not in group.seen_s:
                if len(group.seen_s) >= MOST_DEPLOYMENTS:
                    raise EnergyLensError(f"deployments of {name}: more than {MOST_DEPLOYMENTS}")
                group.gateway.add(key, source_of(deployment))
            group.seen_s[key] = now
        for key in [key for key, seen_s in group.seen_s.items() if now - seen_s > FORGET_S]:
            del group.seen_s[key]
            group.gateway.remove(key)
        return group.gateway


def options_of(deployment: Deployment) -> dict[str, Any]:
    """`model_info.energylens`. Raises EnergyLensError for what is no mapping or has a name that is not known."""
    given = deployment["model_info"].get("energylens") or {}
    if not isinstance(given, Mapping):
        raise EnergyLensError(f"model_info.energylens: {given!r}; accepted: a mapping")
    for name in given:
        if name not in OPTIONS:
            raise unknown("model_info.energylens", name, OPTIONS)
    return dict(given)


def targets_of(deployment: Deployment) -> Targets:
    """What requests of a group are to hold."""
    given = options_of(deployment)
    return Targets(**{name: given[name] for name in ("ttft_s", "tpot_s") if name in given})


def source_of(deployment: Deployment) -> Source:
    """Where a deployment's /metrics are, and what is said of it."""
    given = options_of(deployment)
    url = given.get("metrics_url") or metrics_url(str(deployment["litellm_params"].get("api_base") or ""))
    return Source(url, given.get("model"), given.get("deployment") or {})
