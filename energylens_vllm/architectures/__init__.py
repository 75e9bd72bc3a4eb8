"""A Hugging Face config -> `Cascade`, one module a family; `catalog/` holds the configs of known models."""

from energylens_vllm.architectures.errors import ArchitectureError
from energylens_vllm.architectures.families import FAMILIES, build
from energylens_vllm.architectures.known import hub_ids, is_cascade, known_models, load_config
from energylens_vllm.architectures.length import longest_request
from energylens_vllm.architectures.quantization import quantization

__all__ = [
    "FAMILIES", "ArchitectureError", "build", "hub_ids", "is_cascade", "known_models", "load_config",
    "longest_request", "quantization",
]  # fmt: skip
