"""Where LiteLLM calls: `callbacks: energylens_vllm.hooks.litellm.callback.energy_router`.

Of the healthy deployments it leaves one, the best. A request that failed there is tried at another, if there is one.
Whatever goes wrong here, LiteLLM sees all deployments, as if this callback were not there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hooks.litellm.groups import Groups

logger = logging.getLogger("energylens_vllm")


class EnergyRouter(CustomLogger):
    """One for a whole proxy."""

    def __init__(self) -> None:
        super().__init__()
        self._groups = Groups()
        self._problems: set[str] = set()

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        """The best deployment alone, or all of them."""
        try:
            given = request_kwargs or {}
            body = {
                "messages": messages,
                "max_tokens": given.get("max_tokens"),
                "max_completion_tokens": given.get("max_completion_tokens"),
            }
            request = str(given.get("litellm_call_id", id(given)))
            chosen = self._groups.choose(model, healthy_deployments, body, request, _tried(given))
        except Exception as error:
            self._complain(error)
            return healthy_deployments
        return healthy_deployments if chosen is None else [chosen]

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The request has ended, also a streamed one."""
        self._end(kwargs)

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """An attempt has failed; if there is another, the deployments are filtered again."""
        self._end(kwargs)

    def _end(self, kwargs: Mapping[str, Any]) -> None:
        try:
            metadata = kwargs["litellm_params"].get("metadata") or {}
            self._groups.end(str(metadata.get("model_group")), str(kwargs["litellm_call_id"]))
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once each. Only messages of ours are shown: others might hold something of a request."""
        problem = str(error) if isinstance(error, EnergyLensError) else type(error).__name__
        if problem not in self._problems and len(self._problems) < 100:
            self._problems.add(problem)
            logger.warning("energylens does not route, LiteLLM decides: %s", problem)


def _tried(given: Mapping[str, Any]) -> list[str]:
    """Deployments at which this request has failed before."""
    metadata = given.get("metadata") or given.get("litellm_metadata") or {}
    attempts = metadata.get("previous_models") or ()
    return [str(each["deployment_id"]) for each in attempts if each.get("deployment_id")]


energy_router = EnergyRouter()
