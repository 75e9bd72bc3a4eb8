"""What a config lacks or has wrong is one line that names the field and the model type."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.architectures import FAMILIES, ArchitectureError, build, known_models, load_config, quantization
from energylens_vllm.errors import EnergyLensError


def message(config: dict[str, Any]) -> str:
    with pytest.raises(ArchitectureError) as error:
        build(config)
    assert isinstance(error.value, EnergyLensError)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen4"}, ["unknown value 'qwen4'", "did you mean 'qwen3'?"]),
        ({"model_type": "bert", "architectures": ["BertModel"]}, ["model_type of BertModel", "'bert'"]),
        ({"architectures": ["Qwen9ForCausalLM"]}, ["Qwen9ForCausalLM"]),
        ({"model_type": "llava", "text_config": {"model_type": "opt"}}, ["unknown value 'opt'"]),
        ({}, ["field 'model_type' is missing"]),
    ],
)
def test_an_unknown_architecture_says_how_to_write_a_cascade(config: dict[str, Any], words: list[str]) -> None:
    text = message(config)
    for word in (*words, "docs/einsum.md", "Cascade", "YAML", "gpt_oss, llama, "):
        assert word in text


REQUIRED = {
    "llama-3.1-8b": ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
    "qwen3-30b-a3b": ["num_experts", "num_experts_per_tok", "moe_intermediate_size"],
    "mixtral-8x7b": ["num_local_experts", "num_experts_per_tok", "intermediate_size"],
    "gemma-2-9b": ["sliding_window", "hidden_size"],
    "gpt-oss-20b": ["sliding_window", "num_local_experts"],
    "deepseek-v3": ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in REQUIRED.items() for field in fields])
@pytest.mark.parametrize("left_out", [True, False], ids=["absent", "null"])
def test_a_missing_field_is_named(name: str, field: str, left_out: bool) -> None:
    config = load_config(name)
    config[field] = None
    if left_out:
        del config[field]
    assert message(config) == f"config of model_type {config['model_type']!r}: field {field!r} is missing"


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("llama-3.1-8b", "hidden_size", "4096", "field 'hidden_size': '4096' is not a positive whole number"),
        ("llama-3.1-8b", "num_hidden_layers", 0, "field 'num_hidden_layers': 0 is not a positive whole number"),
        ("llama-3.1-8b", "hidden_size", True, "field 'hidden_size': True is not a positive whole number"),
        ("llama-3.1-8b", "num_key_value_heads", 5, "field 'num_key_value_heads': 5 does not divide"),
        ("llama-3.1-8b", "num_attention_heads", 24, "field 'head_dim' is missing, and num_attention_heads 24 does not"),
        ("llama-3.1-8b", "attention_bias", "no", "field 'attention_bias': 'no' is neither true nor false"),
        ("qwen3-30b-a3b", "num_experts_per_tok", 256, "field 'num_experts_per_tok': 256 is more than num_experts 128"),
        ("qwen3-30b-a3b", "mlp_only_layers", "1", "field 'mlp_only_layers': '1' is not a list of whole numbers"),
        ("gpt-oss-20b", "layer_types", [["full_attention"]] * 24, "unknown value ['full_attention']"),
        ("gpt-oss-20b", "layer_types", ["full_attention"], "field 'layer_types' does not list one kind for each"),
        ("gpt-oss-20b", "layer_types", ["linear_attention"] * 24, "unknown value 'linear_attention'"),
        (
            "deepseek-v3",
            "topk_method",
            "noaux",
            "field 'topk_method': unknown value 'noaux' (did you mean 'noaux_tc'?)",
        ),
        ("deepseek-v3", "first_k_dense_replace", -1, "field 'first_k_dense_replace': -1 is not a"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(name: str, field: str, value: Any, words: str) -> None:
    config = load_config(name) | {field: value}
    text = message(config)
    assert words in text
    assert f"config of model_type {config['model_type']!r}" in text


def test_a_class_is_enough_where_the_type_is_another() -> None:
    config = load_config("qwen3-8b")
    del config["model_type"]
    assert build(config) == build(load_config("qwen3-8b"))
    assert build(load_config("kimi-k2")).parameters() > 10**12  # of type kimi_k2, which names DeepSeek's class


def test_text_models_of_wrappers_may_leave_their_type_to_it() -> None:
    config: dict[str, Any] = load_config("gemma-3-27b")
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    assert build(config | {"text_config": text}) == build(config)


def test_too_few_layers_with_rope_are_named() -> None:
    config: dict[str, Any] = load_config("llama-4-scout")
    text = config["text_config"] | {"no_rope_layers": [1, 1, 0]}
    assert "field 'no_rope_layers' lists 3 of the 48 layers" in message(config | {"text_config": text})


JSON = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4)
VALUES = JSON | st.lists(JSON, max_size=3) | st.dictionaries(st.text(max_size=3), JSON, max_size=2)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(known_models()))
def test_no_config_does_anything_else_than_build_or_say_why_not(data: st.DataObject, name: str) -> None:
    config = load_config(name)
    config = dict(config.get("text_config") or config)  # type: ignore[call-overload]  # a mapping
    fields = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3))
    config |= {field: data.draw(VALUES, field) for field in fields}
    result = _built_or_refused(config)
    assert result > 0 if isinstance(result, int) else "\n" not in result
    quantization(config)


def _built_or_refused(config: dict[str, Any]) -> int | str:
    """The number of parameters, or the message."""
    try:
        return build(config).parameters()
    except EnergyLensError as error:
        return str(error)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_empty_config_of_each_family_names_a_field(model_type: str) -> None:
    assert message({"model_type": model_type}).startswith(f"config of model_type {model_type!r}: field '")
