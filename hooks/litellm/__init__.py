"""LiteLLM's proxy, by configuration alone:

    litellm_settings:
      callbacks: energylens_vllm.hooks.litellm.callback.energy_router

`groups` is what it does, without LiteLLM; `callback` is where LiteLLM calls. See docs/gateways.md.
"""
