"""Our router in the configuration of a deployment, of Ray Serve LLM or of Ray Serve alone."""

from __future__ import annotations

from ray.serve.config import RequestRouterConfig

ROUTER = "energylens_vllm.hooks.ray.router.EnergyRequestRouter"
REPORT_PERIOD_S = 1.0


def router_config(**targets: float) -> RequestRouterConfig:
    """Ours as the request router of a deployment, with `Targets`, told of its replicas each second."""
    return RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs=targets,
        request_routing_stats_period_s=REPORT_PERIOD_S,
        # One that hangs is asked again soon after it has come back.
        request_routing_stats_timeout_s=5 * REPORT_PERIOD_S,
    )
