"""Without energy data our router chooses as Serve's own, draw by draw: run with Ray's Python, prints "same"."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import FIFOMixin, PendingRequest

from energylens_vllm.hooks.ray.router import EnergyRequestRouter

DEPLOYMENT = DeploymentID(name="d", app_name="a")


def replica(name: str, stats: dict[str, Any]) -> Any:
    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT), routing_stats=stats, replica_metadata={}, node_id="n",
        availability_zone=None, multiplexed_model_ids=set(), max_ongoing_requests=5,
    )  # fmt: skip


def request(number: int) -> PendingRequest:
    metadata = RequestMetadata(request_id=str(number), internal_request_id=str(number))
    return PendingRequest(args=[{"prompt": "some words"}], kwargs={}, metadata=metadata)


async def choices(cls: type, stats: dict[str, Any]) -> list[list[str]]:
    router = cls(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state()
    router._probe_queue_lens = lambda *_: asyncio.sleep(0)
    random.seed(1)
    found = []
    for number in range(1000):
        if number % 100 == 0:
            router.update_replicas([replica(f"r{i}", stats) for i in range(1 + number // 100)])
        pending = request(number)
        router._pending_requests_by_id[str(number)] = pending
        ranks = await router.choose_replicas(router._replicas_list, pending)
        found.append([each.replica_id.unique_id for rank in ranks for each in rank])
        assert pending.routing_context.should_backoff
    # The default serves those who wait in turn, whichever it was asked for.
    router._pending_requests_to_fulfill.extend(first := [request(2000), request(2001)])
    router._pending_requests_by_id.update({each.metadata.internal_request_id: each for each in first})
    router._fulfill_next_pending_request(router._replicas_list[0], first[1].metadata)
    assert first[0].future.done()
    assert not first[1].future.done()
    return found


async def main() -> None:
    assert issubclass(EnergyRequestRouter, FIFOMixin)
    theirs = await choices(PowerOfTwoChoicesRequestRouter, {})
    for stats in ({}, {"energylens": {}}, {"energylens": {"running": "many"}}, {"energylens": None}):
        assert await choices(EnergyRequestRouter, stats) == theirs, stats
    print("same")


asyncio.run(main())
