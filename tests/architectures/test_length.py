"""The longest request of a checkpoint, as vLLM derives it from the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from energylens_vllm.architectures import load_config, longest_request

BASE = {"model_type": "llama", "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (BASE, 4096),
        (BASE | {"rope_scaling": None}, 4096),
        (BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (BASE | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 8192),
        (BASE | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        (BASE | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        (BASE | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 4096),
        ({"model_type": "gemma3", "text_config": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}}, None),
        ({"model_type": "llama4", "text_config": BASE}, 4096),
        ({}, None),
    ],
)
def test_it_is_what_the_config_says(config: dict[str, object], tokens: int | None) -> None:
    assert longest_request(config) == tokens


@pytest.mark.vllm
@pytest.mark.parametrize(
    "name", ["llama-2-7b", "llama-3.1-8b", "deepseek-v2-lite", "phi-3.5-mini", "qwen3-30b-a3b", "gemma-2-9b"]
)
def test_it_is_where_vllm_draws_the_line(name: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    config = load_config(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    most = longest_request(config)
    assert most is not None

    def taken(tokens: int) -> int:
        made = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=tokens)
        return int(made.max_model_len)

    assert taken(most) == most
    with pytest.raises(ValueError, match="is greater than the derived max_model_len"):
        taken(most + 1)
