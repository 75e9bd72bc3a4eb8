"""Parameter counts, to the last one, against what transformers makes of the same config, on its meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from energylens_vllm.architectures import FAMILIES, build, known_models, load_config

pytestmark = pytest.mark.vllm  # which brings transformers along


def as_transformers(config: Mapping[str, Any]) -> Any:
    """transformers' own config object."""
    from transformers import AutoConfig

    left_out = ("model_type", "architectures", "quantization_config", "_name_or_path")
    model_type = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    return AutoConfig.for_model(model_type, **{key: value for key, value in config.items() if key not in left_out})


def counted(config: Any) -> int:
    """Parameters of the model of text, and the scores' corrections, which transformers keeps as buffers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return sum(tensor.numel() for tensor in (*model.parameters(), *buffers.values()))


@pytest.mark.parametrize("name", known_models())
def test_catalogue_models_are_those_of_transformers(name: str) -> None:
    config: dict[str, Any] = load_config(name)
    theirs = as_transformers(config.get("text_config", config))
    ours = build(config)
    assert ours.parameters() == counted(theirs)
    # All defaults filled in, some fields renamed.
    written_out = build({**theirs.to_dict(), "quantization_config": config.get("quantization_config")})
    assert written_out.parameters() == ours.parameters()
    assert written_out.kernels() == ours.kernels()


# Of each family one small config with everything that the catalogue's models leave at its default.
SHAPE = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=192)
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24)
SMALL: dict[str, dict[str, Any]] = {
    "llama": dict(intermediate_size=96, head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": dict(intermediate_size=96, head_dim=24, sliding_window=16),
    "phi3": dict(intermediate_size=96, sliding_window=16, pad_token_id=0),
    "qwen2": dict(intermediate_size=96, use_sliding_window=True, sliding_window=16, max_window_layers=4),
    "qwen3": dict(intermediate_size=96, head_dim=24, attention_bias=True),
    "qwen3_moe": dict(
        intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=24,
        decoder_sparse_step=2, mlp_only_layers=[3],
    ),
    "mixtral": dict(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "gemma2": dict(intermediate_size=96, head_dim=24, sliding_window=16, attention_bias=True),
    "gemma3_text": dict(intermediate_size=96, head_dim=24, sliding_window=16, sliding_window_pattern=3),
    "gpt_oss": dict(
        intermediate_size=96, head_dim=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
    ),
    "deepseek_v2": dict(
        intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2,
        first_k_dense_replace=2, q_lora_rank=None, num_key_value_heads=4, **LATENT,
    ),
    "deepseek_v3": dict(
        intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, num_key_value_heads=4,
        topk_method="noaux_tc", **LATENT,
    ),
    "llama4_text": dict(
        intermediate_size=32, intermediate_size_mlp=96, head_dim=24, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, no_rope_layer_interval=3, attention_chunk_size=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_small_models_of_every_family_are_those_of_transformers(model_type: str) -> None:
    config = {"model_type": model_type, **SHAPE, **SMALL[model_type]}
    theirs = as_transformers(config)
    assert build(config).parameters() == counted(theirs)
    assert build(theirs.to_dict()).parameters() == counted(theirs)


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-27b", "llama-4-scout", "llama-4-maverick"])
def test_of_a_multimodal_model_the_text_model_is_built(name: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    config: dict[str, Any] = load_config(name)
    theirs = as_transformers(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(theirs)
    seeing = ("vision", "multi_modal_projector")
    text = sum(each.numel() for part, each in model.named_parameters() if not any(word in part for word in seeing))
    assert build(config).parameters() == text
    assert build(theirs.to_dict()).parameters() == text
