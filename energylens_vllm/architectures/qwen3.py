"""Qwen 3: Llama's layers, with queries and keys normed by head; dense, or with experts.

Sources: arXiv 2505.09388; vLLM's model_executor/models/qwen3.py and qwen3_moe.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, pre_normed
from energylens_vllm.architectures.qwen2 import windows
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    def layer(kind: str) -> Part:
        return _layer(config, kind == "sliding", mlp(config.size("intermediate_size")))

    return decoder(config, layer, windows(config))


def build_moe(config: Config) -> Cascade:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` lists it; all slide or none."""
    step, dense = config.size("decoder_sparse_step", default=1), config.whole_numbers("mlp_only_layers")
    slides = config.flag("use_sliding_window", default=False)

    def layer(kind: str) -> Part:
        if kind == "dense":
            return _layer(config, slides, mlp(config.size("intermediate_size")))
        return _layer(config, slides, experts(config, "num_experts", config.size("moe_intermediate_size")))

    layers = range(config.size("num_hidden_layers"))
    return decoder(config, layer, ["dense" if i in dense or (i + 1) % step else "layer" for i in layers])


def _layer(config: Config, slides: bool, feed_forward: Part) -> Part:
    bias = config.flag("attention_bias", default=False)
    window = config.size("sliding_window") if slides else None
    return pre_normed(
        attention(config, window=window, qkv_bias=bias, output_bias=bias, norm="rms"),
        feed_forward,
    )
