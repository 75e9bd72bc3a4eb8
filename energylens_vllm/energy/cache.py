"""The KV cache that one GPU holds of a token."""

from __future__ import annotations

from collections.abc import Iterable

from energylens_vllm.einsum.kernel import Kernel, Mask


def cached_bytes(kernels: Iterable[Kernel]) -> dict[Mask, float]:
    """Bytes of a token in all layers of each mask together; a layer keeps no more tokens than its mask reaches."""
    cached: dict[Mask, float] = {}
    for kernel in kernels:
        if kernel.attention is not None and kernel.phase != "prefill":  # latent attention has a kernel for each phase
            mask = kernel.attention.mask
            cached[mask] = cached.get(mask, 0.0) + kernel.count * kernel.kv_read_bytes.keys
    return cached
