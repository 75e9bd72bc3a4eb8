"""The server class: `server_cls: energylens_vllm.hooks.ray.server.EnergyServer` in an LLMConfig is all it takes."""

from __future__ import annotations

import logging
from typing import Any

from ray.llm._internal.serve.core.server.llm_server import LLMServer

from energylens_vllm.hooks.ray.config import router_config
from energylens_vllm.routing.report import MODEL, REPORT

logger = logging.getLogger("ray.serve")


class EnergyReporting:
    """To be mixed into any of Ray's LLM servers (`class Mine(EnergyReporting, DPServer)`)."""

    _energylens_failed = False
    _energylens_state: Any = None

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """With our router unless the config names one, and the plugin's measured step times each second."""
        options: dict[str, Any] = super().get_deployment_options(llm_config)  # type: ignore[misc]
        options.setdefault("request_router_config", router_config())
        environment = options["ray_actor_options"]["runtime_env"]
        environment["env_vars"] = {"ENERGYLENS_REPORT_INTERVAL_S": "1", **environment.get("env_vars", {})}
        return options

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Once, when the replica is ready: which model it runs on what."""
        try:
            return {MODEL: self._energylens().model()}
        except Exception as error:
            return self._without(error)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Each second: how it is doing."""
        theirs: dict[str, Any] = await super().record_routing_stats()  # type: ignore[misc]
        try:
            return {**theirs, REPORT: self._energylens().report().to_wire()}
        except Exception as error:
            return {**theirs, **self._without(error)}

    def _energylens(self) -> Any:
        if self._energylens_state is None:
            from energylens_vllm.hooks.ray.engine_state import EngineState

            self._energylens_state = EngineState.attach(self.engine._engine_client)  # type: ignore[attr-defined]
        return self._energylens_state

    def _without(self, error: Exception) -> dict[str, Any]:
        """Routers then take this replica for unknown."""
        if not self._energylens_failed:
            self._energylens_failed = True
            logger.warning("energylens cannot report this replica: %s: %s", type(error).__name__, error)
        return {}


class EnergyServer(EnergyReporting, LLMServer):
    """Ray Serve LLM's server with reports."""
