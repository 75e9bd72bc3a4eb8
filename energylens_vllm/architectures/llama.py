"""Llama 2 and 3, and models with the same layers: Mistral.

Sources: arXiv 2307.09288, 2407.21783, 2310.06825; vLLM's model_executor/models/llama.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import decoder, join, norm
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    bias = config.flag("attention_bias", default=False)
    window = config.size("sliding_window") if "sliding_window" in config else None  # Mistral 7B v0.1
    layer = join(
        norm("input_norm", "A", "N1"),
        attention(config, window=window, qkv_bias=bias, output_bias=bias),
        norm("post_norm", "B", "N2"),
        mlp(config.size("intermediate_size"), bias=config.flag("mlp_bias", default=False)),
    )
    return decoder(config, lambda _: layer)
