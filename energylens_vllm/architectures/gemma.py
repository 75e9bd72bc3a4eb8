"""Gemma 2 and 3: norms before and after each sublayer, sliding windows in most layers, a tied head.

Sources: arXiv 2408.00118, 2503.19786; vLLM's model_executor/models/gemma2.py and gemma3.py. The published configs leave
out what equals the defaults of transformers' `Gemma2Config` and `Gemma3TextConfig`, which are therefore ours too.
"""

from __future__ import annotations

from energylens_vllm.architectures.attention import attention
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.mlp import mlp
from energylens_vllm.architectures.part import Part, decoder, join, norm
from energylens_vllm.einsum import Cascade

_SHARED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def build_gemma2(config: Config) -> Cascade:
    """Every other layer slides; logits are capped."""
    config = config.with_defaults({**_SHARED, "final_logit_softcapping": 30.0})
    return _decoder(config, every=2, qk_norm=False)


def build_gemma3(config: Config) -> Cascade:
    """Five of six layers slide; queries and keys are normed by head."""
    return _decoder(config.with_defaults({**_SHARED, "vocab_size": 262_208}), every=6, qk_norm=True)


def _decoder(config: Config, every: int, qk_norm: bool) -> Cascade:
    bias = config.flag("attention_bias", default=False)
    every = config.size("sliding_window_pattern", default=every)
    layers = range(config.size("num_hidden_layers"))

    def layer(kind: str) -> Part:
        window = config.size("sliding_window") if kind == "sliding" else None
        return join(
            norm("input_norm", "A", "N1"),
            attention(config, window=window, qkv_bias=bias, output_bias=bias, norm="rms" if qk_norm else None),
            Part(
                {
                    "post_norm": [
                        "XN[t,d] = rmsnorm(X[t,d]) * N2[d]",
                        "R[t,d] = R[t,d] + XN[t,d]",
                        "B[t,d] = rmsnorm(R[t,d]) * N3[d]",
                    ]
                },
                tensors={"plain": "N2 N3"},
            ),
            mlp(config.size("intermediate_size"), "gelu"),
            Part({"mlp_norm": ["X[t,d] = rmsnorm(X[t,d]) * N4[d]"]}, tensors={"plain": "N4"}),
        )

    sequence = config.layer_types(_KINDS, default=["full" if (i + 1) % every == 0 else "sliding" for i in layers])
    return decoder(config, layer, sequence, softcap="final_logit_softcapping" in config)
