"""What the routers of one process share. Serve copies the module of a router class with the class, this one it imports:
in `router` these would be one set for each copy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

from energylens_vllm.routing.decisions import Decisions
from energylens_vllm.routing.fleet import LiveFleet, Targets
from energylens_vllm.routing.report import Tables

_fleets: dict[str, LiveFleet] = {}
_lock = threading.Lock()

tables = Tables()


@functools.cache
def decisions() -> Decisions:
    """Where this process counts what it decides: in Ray's metrics, which each node's agent exports."""
    from energylens_vllm.hooks.ray.metrics import ray_count

    return Decisions(ray_count())


def fleet_of(deployment: str, targets: Targets) -> LiveFleet:
    """The fleet that a deployment's replicas are in: a new one of its own, with `targets`, unless it has one."""
    with _lock:
        return _fleets.setdefault(deployment, LiveFleet(targets))


def join(deployments: Sequence[str], targets: Targets) -> LiveFleet:
    """One fleet for several deployments, to be called before any of their routers is made."""
    with _lock:
        fleet = next((_fleets[name] for name in deployments if name in _fleets), None) or LiveFleet(targets)
        for name in deployments:
            _fleets[name] = fleet
        return fleet
