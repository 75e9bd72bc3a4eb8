"""What checkpoints say of how their weights are stored."""

from __future__ import annotations

from typing import Any

import pytest

from energylens_vllm.architectures import quantization


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_per_block"),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "new_method"}, "new_method"),
        (compressed(num_bits=8, type="float", strategy="channel"), "fp8"),
        (compressed(num_bits=8, type="float", strategy="block"), "fp8_per_block"),
        (compressed(num_bits=4, type="int", strategy="group"), "int4"),
        (compressed(num_bits=8, type="int", strategy="channel"), "int8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_names(section: dict[str, Any] | None, name: str | None) -> None:
    assert quantization({"model_type": "llama", "quantization_config": section}) == name
    assert quantization({"model_type": "mistral3", "text_config": {"quantization_config": section}}) == name


def test_the_older_field_of_compressed_tensors() -> None:
    assert quantization({"compression_config": compressed(num_bits=4, type="int")}) == "int4"
