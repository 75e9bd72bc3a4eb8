"""Parameter counts against published ones."""

from __future__ import annotations

import pytest

from energylens_vllm.architectures import build, load_config

HUB = "parameters of the safetensors, shown on https://huggingface.co/"

# Billions of parameters as published, and where. Multimodal models: of the text model.
PUBLISHED = [
    ("llama-2-7b", 6.74, HUB + "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", 13.0, HUB + "meta-llama/Llama-2-13b-hf"),
    ("llama-2-70b", 69.0, HUB + "meta-llama/Llama-2-70b-hf"),
    ("llama-3-8b", 8.03, HUB + "meta-llama/Meta-Llama-3-8B"),
    ("llama-3.1-8b", 8.03, HUB + "meta-llama/Llama-3.1-8B"),
    ("llama-3.1-70b", 70.6, HUB + "meta-llama/Llama-3.1-70B"),
    ("llama-3.1-405b", 406.0, HUB + "meta-llama/Llama-3.1-405B"),
    ("llama-3.2-1b", 1.23, "model card of meta-llama/Llama-3.2-1B, table of models"),
    ("llama-3.2-3b", 3.21, "model card of meta-llama/Llama-3.2-3B, table of models"),
    ("mistral-7b-v0.1", 7.24, HUB + "mistralai/Mistral-7B-v0.1"),
    ("mistral-7b-v0.3", 7.25, HUB + "mistralai/Mistral-7B-v0.3"),
    ("mistral-nemo-12b", 12.2, HUB + "mistralai/Mistral-Nemo-Base-2407"),
    ("mistral-small-24b", 23.6, HUB + "mistralai/Mistral-Small-24B-Base-2501"),
    ("phi-3.5-mini", 3.82, HUB + "microsoft/Phi-3.5-mini-instruct"),
    ("phi-4", 14.7, HUB + "microsoft/phi-4"),
    ("qwen2-7b", 7.62, HUB + "Qwen/Qwen2-7B"),
    ("qwen2.5-0.5b", 0.494, HUB + "Qwen/Qwen2.5-0.5B"),
    ("qwen2.5-1.5b", 1.54, "model card of Qwen/Qwen2.5-1.5B"),
    ("qwen2.5-3b", 3.09, "model card of Qwen/Qwen2.5-3B"),
    ("qwen2.5-7b", 7.61, "model card of Qwen/Qwen2.5-7B"),
    ("qwen2.5-14b", 14.8, HUB + "Qwen/Qwen2.5-14B"),
    ("qwen2.5-32b", 32.8, HUB + "Qwen/Qwen2.5-32B"),
    ("qwen2.5-72b", 72.7, "model card of Qwen/Qwen2.5-72B"),
    ("qwen3-4b", 4.02, HUB + "Qwen/Qwen3-4B"),
    ("qwen3-8b", 8.2, "model card of Qwen/Qwen3-8B"),
    ("qwen3-14b", 14.8, "model card of Qwen/Qwen3-14B"),
    ("qwen3-32b", 32.8, "model card of Qwen/Qwen3-32B"),
    ("qwen3-30b-a3b", 30.5, "model card of Qwen/Qwen3-30B-A3B"),
    ("qwen3-235b-a22b", 235.0, "model card of Qwen/Qwen3-235B-A22B"),
    ("qwen3-coder-480b-a35b", 480.0, "model card of Qwen/Qwen3-Coder-480B-A35B-Instruct"),
    ("mixtral-8x7b", 46.7, "https://mistral.ai/news/mixtral-of-experts"),
    ("mixtral-8x22b", 141.0, "https://mistral.ai/news/mixtral-8x22b"),
    ("gemma-2-2b", 0.590118912 + 2.024517888, "arXiv 2408.00118, table 2: embedding and the rest"),
    ("gemma-2-9b", 0.917962752 + 8.324201984, "arXiv 2408.00118, table 2"),
    ("gemma-2-27b", 1.180237824 + 26.047480320, "arXiv 2408.00118, table 2"),
    ("gemma-3-1b", 0.302 + 0.698, "arXiv 2503.19786, table 1: embedding and the rest, without the vision encoder"),
    ("gemma-3-4b", 0.675 + 3.209, "arXiv 2503.19786, table 1"),
    ("gemma-3-12b", 1.012 + 10.759, "arXiv 2503.19786, table 1"),
    ("gemma-3-27b", 1.416 + 25.600, "arXiv 2503.19786, table 1"),
    ("gpt-oss-20b", 20.91, "arXiv 2508.10925, table 1"),
    ("gpt-oss-120b", 116.83, "arXiv 2508.10925, table 1"),
    ("deepseek-v2-lite", 15.7, "arXiv 2405.04434, appendix B"),
    ("deepseek-v2", 236.0, "arXiv 2405.04434, abstract"),
    ("deepseek-v3", 671.0, "arXiv 2412.19437, abstract"),
    ("moonlight-16b-a3b", 15.29 + 2 * 163840 * 2048 / 1e9, "arXiv 2502.16982, table of models: without embeddings"),
    ("kimi-k2", 1026.4, HUB + "moonshotai/Kimi-K2-Instruct, less the scales of FP8 blocks"),
    ("llama-4-scout", 108.641793536 - 0.871932416, HUB + "meta-llama/Llama-4-Scout-17B-16E, less vision and projector"),
    ("llama-4-maverick", 402.0 - 0.871932416, HUB + "meta-llama/Llama-4-Maverick-17B-128E, less vision and projector"),
]


@pytest.mark.parametrize(("name", "billions", "source"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_parameters_are_the_published_ones(name: str, billions: float, source: str) -> None:
    assert build(load_config(name)).parameters() == pytest.approx(billions * 1e9, rel=0.005), source


@pytest.mark.parametrize(
    ("name", "billions", "source"),
    [
        ("mixtral-8x7b", 12.9, "https://mistral.ai/news/mixtral-of-experts"),
        ("mixtral-8x22b", 39.0, "https://mistral.ai/news/mixtral-8x22b"),
        # 5.13 and 3.61 billion and, as the paper leaves it out, the embedding.
        ("gpt-oss-120b", 5.13 + 201088 * 2880 / 1e9, "arXiv 2508.10925, table 1"),
        ("gpt-oss-20b", 3.61 + 201088 * 2880 / 1e9, "arXiv 2508.10925, table 1"),
    ],
)
def test_active_parameters_are_the_published_ones(name: str, billions: float, source: str) -> None:
    assert build(load_config(name)).active_parameters() == pytest.approx(billions * 1e9, rel=0.005), source


def test_all_parameters_of_a_dense_model_are_active() -> None:
    cascade = build(load_config("llama-3.1-8b"))
    assert cascade.active_parameters() == cascade.parameters()
