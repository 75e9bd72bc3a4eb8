"""Llama 2 and 3, and models with the same layers: Mistral, Phi-3 and Phi-4.

Sources: arXiv 2307.09288, 2407.21783, 2310.06825, 2404.14219; vLLM's model_executor/models/llama.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, pre_normed
from energylens_vllm.einsum import Cascade

_KINDS = {"full_attention": "layer", "sliding_attention": "sliding"}


def build(config: Config) -> Cascade:
    """All layers slide if there is a window (Mistral 7B v0.1, Phi-3), unless `layer_types` says which do."""
    bias = config.flag("attention_bias", default=False)

    def layer(kind: str) -> Part:
        window = config.size("sliding_window") if kind == "sliding" else None
        return pre_normed(
            attention(config, window=window, qkv_bias=bias, output_bias=bias),
            mlp(config.size("intermediate_size"), bias=config.flag("mlp_bias", default=False)),
        )

    kind = "sliding" if "sliding_window" in config else "layer"
    return decoder(config, layer, config.layer_types(_KINDS, default=[kind] * config.size("num_hidden_layers")))
