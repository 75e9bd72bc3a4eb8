"""Llama 4: layers with rope attend within chunks, every fourth has no rope and sees everything; experts in every layer
(Scout) or every second (Maverick), beside one that all tokens share.

Sources: the model cards of Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E; vLLM's model_executor/models/llama4.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts, shared_experts
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, join, pre_normed
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    def layer(kind: str) -> Part:
        reach, feed_forward = kind.split("_")
        return pre_normed(
            _attention(config, chunked=reach == "chunked"),
            mlp(config.size("intermediate_size_mlp")) if feed_forward == "dense" else _experts(config),
        )

    return decoder(config, layer, [f"{a}_{b}" for a, b in zip(_reaches(config), _feed_forwards(config), strict=True)])


def _attention(config: Config, chunked: bool) -> Part:
    if not chunked:  # the logarithmic scale of queries at far positions rides in the kernel that writes the cache
        return attention(config, rope=False)
    norm_ = "l2" if config.flag("use_qk_norm", default=True) else None
    chunk = config.size("attention_chunk_size") if "attention_chunk_size" in config else None
    return attention(config, chunk=chunk, norm=norm_)


def _experts(config: Config) -> Part:
    """The routed experts' input, not their output, is scaled by the router; it is the same work."""
    intermediate = config.size("intermediate_size")
    return join(experts(config, "num_local_experts", intermediate, output="M"), shared_experts(intermediate, "M"))


def _reaches(config: Config) -> list[str]:
    layers, every = config.size("num_hidden_layers"), config.size("no_rope_layer_interval", default=4)
    rope = config.whole_numbers("no_rope_layers") or [(i + 1) % every for i in range(layers)]
    if len(rope) < layers:
        raise config.error(f"field 'no_rope_layers' lists {len(rope)} of the {layers} layers")
    kinds = {"chunked_attention": "chunked", "full_attention": "full"}
    return config.layer_types(kinds, default=["chunked" if rope[i] else "full" for i in range(layers)])


def _feed_forwards(config: Config) -> list[str]:
    layers = range(config.size("num_hidden_layers"))
    step = config.size("interleave_moe_layer_step", default=1)
    listed = config.whole_numbers("moe_layers", default=[i for i in layers if (i + 1) % step == 0])
    return ["moe" if i in listed else "dense" for i in layers]
