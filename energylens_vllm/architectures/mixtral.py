"""Mixtral: Mistral's layers, with experts for the MLP.

Sources: arXiv 2401.04088; vLLM's model_executor/models/mixtral.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts
from energylens_vllm.architectures.part import decoder, join, norm
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    layer = join(
        norm("input_norm", "A", "N1"),
        attention(config, window=config.size("sliding_window") if "sliding_window" in config else None),
        norm("post_norm", "B", "N2"),
        experts(config, "num_local_experts", config.size("intermediate_size")),
    )
    return decoder(config, lambda _: layer)
