"""The dense, gated MLP."""

from __future__ import annotations

from energylens_vllm.architectures.part import Part
from energylens_vllm.einsum import Rank


def mlp(intermediate: int, function: str = "silu", bias: bool = False) -> Part:
    """From `B` to `X`: one GEMM for gate and up, the gated activation, the down GEMM."""
    return Part(
        {
            "gate_up": [
                "G[t,f] = B[t,d] * WG[d,f]" + (" + BG[f]" if bias else ""),
                "U[t,f] = B[t,d] * WU[d,f]" + (" + BU[f]" if bias else ""),
            ],
            "act": [f"H[t,f] = {function}(G[t,f]) * U[t,f]"],
            "down": ["X[t,d] = H[t,f] * WD[f,d]" + (" + BD[d]" if bias else "")],
        },
        {"f": Rank(intermediate, split="tp")},
        {"quantized": "WG WU WD", "plain": "BG BU BD" if bias else ""},
    )
