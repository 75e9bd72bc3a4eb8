"""One model on several deployments, which differ as replicas of one cannot: parallelism, GPUs, quantization.

`FleetHandle` stands where Serve has a handle to one deployment. It ranks all replicas of all its deployments and sends
the request to the deployment of the best, whose router then takes that replica. A request whose replica dies before
anything of the answer was passed on is sent to another: nobody has seen a token of it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.handle import DeploymentHandle

from energylens_vllm.hooks.ray import fleets
from energylens_vllm.routing.fleet import Targets
from energylens_vllm.routing.prompts import read

logger = logging.getLogger("ray.serve")

#: Replicas that a request is tried on at most.
MOST_ATTEMPTS = 3


class FleetHandle:
    """Handles to deployments of one model, used as one handle."""

    def __init__(self, handles: Sequence[DeploymentHandle], targets: Targets | None = None) -> None:
        self._handles = {f"{handle.app_name}#{handle.deployment_name}": handle for handle in handles}
        self._fleet = fleets.join(list(self._handles), targets or Targets())
        self._draw, self._failed = random.Random(), False
        for handle in handles:
            if not handle.is_initialized:
                handle._init()  # so that its router knows its replicas before the first request

    def options(self, **options: Any) -> FleetHandle:
        """As of a handle: the same with other options."""
        changed = object.__new__(FleetHandle)
        changed._handles = {name: handle.options(**options) for name, handle in self._handles.items()}
        changed._fleet, changed._draw, changed._failed = self._fleet, self._draw, self._failed
        return changed

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self, method)

    def choose(self, args: Sequence[Any]) -> DeploymentHandle:
        """The deployment for a request, with `args` its method's."""
        name = None
        try:
            prompt = next((prompt for arg in args if (prompt := read(arg)) is not None), None)
            choice = self._fleet.rank(prompt)
            if choice.fallback is None:
                name = self._fleet.deployment_of(choice.order[0])
            else:
                name = self._fleet.power_of_two(list(self._handles), self._draw)
        except Exception as error:
            if not self._failed:  # once: it would be once a request
                self._failed = True
                logger.warning("energylens leaves deployments to chance: %s: %s", type(error).__name__, error)
        return self._handles.get(name or "") or self._draw.choice(list(self._handles.values()))


class _Method:
    """A method of the deployments, called as `handle.method.remote(...)`."""

    def __init__(self, handle: FleetHandle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """The answer, in the parts in which a replica gives it."""
        return _answer(lambda: getattr(self._handle.choose(args), self._name).remote(*args, **kwargs))


async def _answer(send: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    for attempt in range(1, MOST_ATTEMPTS + 1):
        passed_on = False
        try:
            async for part in send():
                passed_on = True
                yield part
            return
        except (ActorDiedError, ActorUnavailableError) as error:
            if passed_on or attempt == MOST_ATTEMPTS:
                raise
            logger.warning("a request whose replica died is sent to another (%s)", type(error).__name__)


def fleet_handles(
    deployments: Mapping[str, Sequence[DeploymentHandle]], targets: Targets | None = None
) -> dict[str, FleetHandle]:
    """Of each model, one handle to all its deployments."""
    return {model: FleetHandle(handles, targets) for model, handles in deployments.items()}
