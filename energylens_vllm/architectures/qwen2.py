"""Qwen 2 and 2.5: Llama's layers, with biases on queries, keys and values.

Sources: arXiv 2407.10671, 2412.15115; vLLM's model_executor/models/qwen2.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, pre_normed
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    def layer(kind: str) -> Part:
        return pre_normed(
            attention(config, window=config.size("sliding_window") if kind == "sliding" else None, qkv_bias=True),
            mlp(config.size("intermediate_size")),
        )

    return decoder(config, layer, windows(config))


def windows(config: Config) -> list[str]:
    """Which layers slide: none, unless `use_sliding_window` has those from `max_window_layers` on do so."""
    layers = config.size("num_hidden_layers")
    if not config.flag("use_sliding_window", default=False):
        return ["layer"] * layers
    full = min(layers, config.count("max_window_layers", default=layers))
    kinds = {"full_attention": "layer", "sliding_attention": "sliding"}
    return config.layer_types(kinds, default=["layer"] * full + ["sliding"] * (layers - full))
