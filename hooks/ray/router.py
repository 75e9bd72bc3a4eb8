"""The request router: `request_router_class="energylens_vllm.hooks.ray.router.EnergyRequestRouter"`.

Serve makes one in each process that has a handle to the deployment, gives it what replicas report, and asks it where a
request should go. With nothing known of any replica, and after any error of ours, it is Serve's own router of power of
two choices, step by step.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from energylens_vllm.hooks.ray import fleets
from energylens_vllm.routing.fleet import Choice, LiveFleet, Targets
from energylens_vllm.routing.prompts import Prompt, read
from energylens_vllm.routing.report import MODEL, REPORT, Report

logger = logging.getLogger("ray.serve")


class EnergyRequestRouter(PowerOfTwoChoicesRequestRouter):
    """Replicas in the order of `energylens_vllm.routing.rank`."""

    _energylens_failed = False

    def initialize_state(self, **kwargs: Any) -> None:
        """`request_router_kwargs` are those of `Targets`. Raises EnergyLensError for others."""
        self._energylens_deployment = f"{self._deployment_id.app_name}#{self._deployment_id.name}"
        self._energylens_fleet: LiveFleet = fleets.fleet_of(self._energylens_deployment, Targets.of(kwargs))

    # -- what Serve tells ------------------------------------------------------------------------------------------

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas there are now, and their statistics."""
        try:
            self._update_fleet(replicas)
        except Exception as error:
            self._complain(error)
        super().update_replicas(replicas)

    def _update_fleet(self, replicas: list[RunningReplica]) -> None:
        fleet = self._energylens_fleet
        keys = {replica.replica_id.to_full_id_str(): replica for replica in replicas}
        fleet.update(self._energylens_deployment, keys)
        for key, replica in keys.items():
            if not fleet.has_table(key):
                table = fleets.tables.get(replica.replica_metadata.get(MODEL))
                if table is not None:
                    fleet.know(key, table)
            if (report := Report.from_wire(replica.routing_stats.get(REPORT))) is not None:
                fleet.hear(key, report)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """It is gone before Serve's controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self._energylens_fleet.remove(replica_id.to_full_id_str())

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """It cannot be reached now."""
        super().on_replica_actor_unavailable(replica_id)
        self._energylens_fleet.silence(replica_id.to_full_id_str())

    # -- requests --------------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica a rank of its own, best first, so that Serve tries the next only if one is full or silent."""
        if pending_request is not None:
            try:
                if chosen := self._choose(candidate_replicas, pending_request):
                    return chosen
            except Exception as error:
                self._complain(error)
                pending_request.routing_context.energylens = None
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None and self._is_only_asked(pending_request) and ranks:
            self._placed(pending_request, ranks[0][0].replica_id.to_full_id_str())
        return ranks

    def _choose(self, candidates: list[RunningReplica], pending: PendingRequest) -> list[list[RunningReplica]]:
        choice = self._energylens_fleet.rank(_prompt(pending))
        pending.routing_context.energylens = choice
        if choice.fallback is not None:
            return []
        if pending.metadata.multiplexed_model_id:
            # Of adapters, those replicas first that have them loaded; Serve widens the circle when they are full.
            loaded = self.apply_multiplex_routing(pending)
            candidates = [replica for replica in candidates if replica.replica_id in loaded]
        by_key = {replica.replica_id.to_full_id_str(): replica for replica in candidates}
        order = [key for key in choice.order if key in by_key]
        if not order:
            return []
        # Or Serve would go on without a pause while all are full.
        pending.routing_context.should_backoff = True
        for key in choice.silent:
            if key in by_key:  # it has to answer before anything is sent there
                self._replica_queue_len_cache.invalidate_key(by_key[key].replica_id)
        if self._is_only_asked(pending):
            self._placed(pending, order[0])
        else:  # requests that are chosen for before it is accepted have to know
            self._energylens_fleet.place(choice, pending.metadata.internal_request_id, order[0])
        return [[by_key[key]] for key in order]

    def _is_only_asked(self, pending: PendingRequest) -> bool:
        """Whether somebody else sends the request, who tells neither that it was accepted nor that it has ended: with
        direct streaming, HAProxy."""
        return pending.metadata.internal_request_id not in self._pending_requests_by_id

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """A replica chosen for a request is for that one; one that the default chose is for the next in line."""
        pending = self._pending_requests_by_id.get(getattr(request_metadata, "internal_request_id", None))
        choice = None if pending is None else _choice(pending)
        if choice is not None and choice.fallback is None:
            RequestRouter._fulfill_next_pending_request(self, replica, request_metadata)
        else:
            super()._fulfill_next_pending_request(replica, request_metadata)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has accepted the request: the one ranked first, unless it was full."""
        super().on_request_routed(pending_request, replica_id, result)
        self._placed(pending_request, replica_id.to_full_id_str())

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, well or not."""
        super().on_request_completed(replica_id, internal_request_id)
        self._energylens_fleet.end(internal_request_id)

    def _placed(self, pending: PendingRequest, key: str) -> None:
        """The request is at `key`: remember and count it."""
        try:
            choice = _choice(pending)
            if choice is None or key not in choice.keys:
                fleets.decisions().fell_back("error" if choice is None else "no_replica")
                return
            ends = not self._is_only_asked(pending)
            self._energylens_fleet.place(choice, pending.metadata.internal_request_id, key, ends)
            fleets.decisions().record(choice.ranking, choice.keys.index(key))
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once: it would be once a request."""
        if not self._energylens_failed:
            self._energylens_failed = True
            logger.warning("energylens leaves routing to the default: %s: %s", type(error).__name__, error)


def _choice(pending: PendingRequest) -> Choice | None:
    """What was decided for it last; None after an error."""
    choice: Choice | None = getattr(pending.routing_context, "energylens", None)
    return choice


def _prompt(pending: PendingRequest) -> Prompt | None:
    for arg in pending.args:
        if (prompt := read(arg)) is not None:
            return prompt
    return None
