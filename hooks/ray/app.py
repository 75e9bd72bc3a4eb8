"""Ray Serve applications: `import_path: energylens_vllm.hooks.ray.app:build_app` in a Serve config, or in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ray import serve
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_openai_app

from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hooks.ray.config import router_config
from energylens_vllm.hooks.ray.ingress import fleet_handles
from energylens_vllm.hooks.ray.server import EnergyServer
from energylens_vllm.routing.fleet import Targets

TARGETS = tuple(item.name for item in fields(Targets))


class EnergyIngress(OpenAiIngress):
    """Ray's OpenAI ingress with several deployments for a model."""

    def __init__(
        self,
        llm_deployments: Mapping[str, Sequence[DeploymentHandle]],
        model_cards: Mapping[str, Any],
        *,
        targets: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(fleet_handles(llm_deployments, Targets.of(targets or {})), dict(model_cards), **options)


def build_app(settings: Mapping[str, Any]) -> serve.Application:
    """An application of `settings`: `llm_configs`, as in Ray's `build_openai_app` but that several may have one
    `model_id`, which makes them one fleet; and those of `Targets`.

    Raises EnergyLensError for a name that is no setting and a value that is none.
    """
    for name in settings:
        if name not in ("llm_configs", *TARGETS):
            raise unknown("setting", name, ("llm_configs", *TARGETS))
    given = {name: value for name, value in settings.items() if name in TARGETS}
    targets = Targets.of(given)
    configs = [_config(each, given) for each in settings.get("llm_configs", ())]
    if not configs:
        raise EnergyLensError("llm_configs: empty; accepted: at least one of Ray's LLMConfig")
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        # HAProxy asks the router of the one deployment that Ray allows then; answers do not pass an ingress.
        return build_openai_app({"llm_configs": configs})
    deployments: dict[str, list[serve.Application]] = {}
    for number, config in enumerate(configs):
        # Serve wants other names of deployments than one model has.
        deployment = build_llm_deployment(config, name_prefix=f"{config.server_cls.__name__}-{number}:")
        deployments.setdefault(config.model_id, []).append(deployment)
    loras = {each.model_id: each.lora_config.dynamic_lora_loading_path for each in configs if each.lora_config}
    return serve.deployment(
        make_fastapi_ingress(EnergyIngress), **EnergyIngress.get_deployment_options(configs)
    ).bind(
        llm_deployments=deployments,
        model_cards={each.model_id: to_model_metadata(each.model_id, each) for each in configs},
        lora_paths=loras,
        targets={name: getattr(targets, name) for name in TARGETS},
    )  # fmt: skip


def _config(given: Any, targets: Mapping[str, float]) -> LLMConfig:
    if isinstance(given, str):
        config = LLMConfig.from_file(given)
    else:
        config = given if isinstance(given, LLMConfig) else LLMConfig.model_validate(given)
    config.server_cls = config.server_cls or EnergyServer
    config.deployment_config.setdefault("request_router_config", router_config(**targets))
    return config
