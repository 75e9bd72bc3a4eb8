"""DeepSeek V2 and V3: latent attention, a few dense layers, then shared and routed experts.

The multi-token prediction layer of V3 is a draft model to vLLM and not part of this one.

Sources: arXiv 2405.04434, 2412.19437; vLLM's model_executor/models/deepseek_v2.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts, shared_experts
from energylens_vllm.architectures.latent import latent_attention
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, join, pre_normed
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    dense, every = config.count("first_k_dense_replace", default=0), config.size("moe_layer_freq", default=1)

    def layer(kind: str) -> Part:
        return pre_normed(
            latent_attention(config),
            mlp(config.size("intermediate_size")) if kind == "dense" else _experts(config),
        )

    layers = range(config.size("num_hidden_layers"))
    return decoder(config, layer, ["dense" if i < dense or i % every else "moe" for i in layers])


def _experts(config: Config) -> Part:
    """Routed and shared experts; V3 chooses without an auxiliary loss, by scores that a bias corrects."""
    intermediate = config.size("moe_intermediate_size")
    correction = config.choice("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"), default="greedy")
    shared = config.count("n_shared_experts", default=0)
    routed = experts(
        config,
        "n_routed_experts",
        intermediate,
        output="M" if shared else "X",
        correction=correction == "noaux_tc",
    )
    return join(routed, shared_experts(shared * intermediate, "M")) if shared else routed
