"""gpt-oss: experts with biases, attention with sinks, a sliding window in every other layer.

Sources: arXiv 2508.10925; vLLM's model_executor/models/gpt_oss.py and, for mxfp4 experts, its
gpt_oss_triton_kernels_moe.py, where the activation and the weighted sum are epilogues of the two GEMMs.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.experts import experts
from energylens_vllm.architectures.part import Part, decoder, pre_normed
from energylens_vllm.architectures.quantization import quantization
from energylens_vllm.einsum import Cascade


def build(config: Config) -> Cascade:
    fused = quantization(config.fields) == "mxfp4"

    def layer(kind: str) -> Part:
        window = config.size("sliding_window") if kind == "sliding" else None
        return pre_normed(
            attention(config, window=window, qkv_bias=True, output_bias=True, sinks=True),
            experts(
                config,
                "num_local_experts",
                config.size("intermediate_size"),
                function="swiglu",
                bias=True,
                fused=fused,
            ),
        )

    kinds = {"sliding_attention": "sliding", "full_attention": "full"}
    layers = range(config.size("num_hidden_layers"))
    return decoder(config, layer, config.layer_types(kinds, default=["full" if i % 2 else "sliding" for i in layers]))
