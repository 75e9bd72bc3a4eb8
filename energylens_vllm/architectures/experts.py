"""A router with experts, and the experts that every token shares."""

from __future__ import annotations

from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.part import Part
from energylens_vllm.einsum import Rank

#: What configs call the number of routed experts. transformers writes some under another name than it reads.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def experts(
    config: Config,
    count: str,
    intermediate: int,
    *,
    output: str = "X",
    function: str = "silu",
    bias: bool = False,
    fused: bool = False,
    correction: bool = False,
) -> Part:
    """From `B` to `output`: router, top-k choice, and the experts' two GEMMs, which are kernels of their own as in
    vLLM's Triton experts; what these hand to each other crosses HBM.

    `count` is the family's field for the number of experts. `fused` draws activation and weighted sum into the GEMMs,
    as the kernels for mxfp4 weights do. `correction` is a learnt bias of each expert in the choice alone.
    """
    count = next((name for name in (count, *_COUNTS) if name in config), count)
    total, selected = config.size(count), config.size("num_experts_per_tok")
    if selected > total:
        raise config.error(f"field 'num_experts_per_tok': {selected} is more than {count} {total}")
    gate_up = [
        "EG[t,x,m] = B[t,d] * XG[x,d,m]" + (" + BXG[x,m]" if bias else ""),
        "EU[t,x,m] = B[t,d] * XU[x,d,m]" + (" + BXU[x,m]" if bias else ""),
    ]
    act = [f"EH[t,x,m] = {function}(EG[t,x,m]) * EU[t,x,m]"]
    down = ["EY[t,x,d] = EH[t,x,m] * XD[x,m,d]" + (" + BXD[x,d]" if bias else "")]
    combine = [f"{output}[t,d] = EY[t,x,d] * W[t,x]"]
    return Part(
        {
            "router": ["GL[t,r] = B[t,d] * WR[d,r]" + (" + BR[r]" if bias else "")],
            "topk": ["W[t,x] = topk(GL[t,r]" + (", BC[r])" if correction else ")")],
            **(
                {"w13": [*gate_up, *act], "w2": [*down, *combine]}
                if fused
                else {"w13": gate_up, "expert_act": act, "w2": down, "sum": combine}
            ),
        },
        {"r": total, "x": Rank(total, select=selected, split="ep"), "m": Rank(intermediate, split="tp")},
        {"expert": "XG XU XD", "plain": "WR" + (" BR BXG BXU BXD" if bias else "") + (" BC" if correction else "")},
    )


def shared_experts(intermediate: int, routed: str) -> Part:
    """From `B` to `X`: a dense MLP beside the routed experts, whose result `routed` is added to its own."""
    return Part(
        {
            "shared_gate_up": ["SG[t,j] = B[t,d] * WSG[d,j]", "SU[t,j] = B[t,d] * WSU[d,j]"],
            "shared_act": ["SH[t,j] = silu(SG[t,j]) * SU[t,j]"],
            "shared_down": ["SX[t,d] = SH[t,j] * WSD[j,d]"],
            "add": [f"X[t,d] = {routed}[t,d] + SX[t,d]"],
        },
        {"j": Rank(intermediate, split="tp")},
        {"quantized": "WSG WSU WSD"},
    )
