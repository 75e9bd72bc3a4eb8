"""The einsum language: text, YAML or Python -> `Cascade` -> kernels with exact work. Knows no GPU and no vLLM."""

from energylens_vllm.einsum.cascade import Block, Cascade, Group, block, build_cascade
from energylens_vllm.einsum.document import dump_cascade, load_cascade
from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.fusion import Difference, compare, fuse, unfuse
from energylens_vllm.einsum.kernel import (
    AttentionShape,
    CollectiveShape,
    ExpertShape,
    GemmShape,
    Kernel,
    Mask,
    Mesh,
    Terms,
    Widths,
)
from energylens_vllm.einsum.rank import Rank

__all__ = [
    "AttentionShape",
    "Block",
    "Cascade",
    "CollectiveShape",
    "Difference",
    "EinsumError",
    "ExpertShape",
    "GemmShape",
    "Group",
    "Kernel",
    "Mask",
    "Mesh",
    "Rank",
    "Terms",
    "Widths",
    "block",
    "build_cascade",
    "compare",
    "dump_cascade",
    "fuse",
    "load_cascade",
    "unfuse",
]
