"""Mixtral: Mistral's layers, with experts for the MLP.

Sources: arXiv 2401.04088; vLLM's model_executor/models/mixtral.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts
from energylens_vllm.architectures.part import decoder, pre_normed
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    layer = pre_normed(
        attention(config, window=config.size("sliding_window") if "sliding_window" in config else None),
        experts(config, "num_local_experts", config.size("intermediate_size")),
    )
    return decoder(config, lambda _: layer)
