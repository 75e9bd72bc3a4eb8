"""The two kinds of MLP: dense, and a router with experts."""

from __future__ import annotations

from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.errors import ArchitectureError
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


def experts(
    config: Config, count: str, intermediate: int, function: str = "silu", bias: bool = False, fused: bool = False
) -> Part:
    """From `B` to `X`: router, top-k choice, and the experts' two GEMMs, which are kernels of their own as in vLLM's
    Triton experts; what these hand to each other crosses HBM.

    `count` is the field with the number of experts. `fused` draws activation and weighted sum into the GEMMs, as the
    kernels for mxfp4 weights do.
    """
    total, selected = config.size(count), config.size("num_experts_per_tok")
    if selected > total:
        raise ArchitectureError(
            f"config of model_type {config.model_type!r}: field 'num_experts_per_tok': {selected} is more than "
            f"{count} {total}"
        )
    gate_up = [
        "EG[t,x,m] = B[t,d] * XG[x,d,m]" + (" + BXG[x,m]" if bias else ""),
        "EU[t,x,m] = B[t,d] * XU[x,d,m]" + (" + BXU[x,m]" if bias else ""),
    ]
    act = [f"EH[t,x,m] = {function}(EG[t,x,m]) * EU[t,x,m]"]
    down = ["EY[t,x,d] = EH[t,x,m] * XD[x,m,d]" + (" + BXD[x,d]" if bias else "")]
    combine = ["X[t,d] = EY[t,x,d] * W[t,x]"]
    return Part(
        {
            "router": ["GL[t,r] = B[t,d] * WR[d,r]" + (" + BR[r]" if bias else "")],
            "topk": ["W[t,x] = topk(GL[t,r])"],
            **(
                {"w13": [*gate_up, *act], "w2": [*down, *combine]}
                if fused
                else {"w13": gate_up, "expert_act": act, "w2": down, "sum": combine}
            ),
        },
        {"r": total, "x": Rank(total, select=selected, split="ep"), "m": Rank(intermediate, split="tp")},
        {"expert": "XG XU XD", "plain": "WR" + (" BR BXG BXU BXD" if bias else "")},
    )
