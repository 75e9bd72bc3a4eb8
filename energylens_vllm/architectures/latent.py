"""Multi-head latent attention, as vLLM runs it: prefill expands the cached latents to keys and values of each head,
decode takes the heads to the latents instead.

Ranks: `u`, `y` tokens of prefill and decode requests, `cu`, `cy` their contexts; `l` latent of keys and values, `q` of
queries, `n` head dimension without rope, `p` with rope, `o` value dimension.

Sources: arXiv 2405.04434, section 2.1; vLLM's model_executor/layers/mla.py and layers/attention/mla_attention.py.
"""

from __future__ import annotations

from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.part import Part, Size
from energylens_vllm.einsum import Rank


def latent_attention(config: Config) -> Part:
    """From `A` to `X`. Without `q_lora_rank` queries come straight from `A`."""
    kernels: dict[str, list[str]] = {}
    if "q_lora_rank" in config:
        kernels["qkv_a"] = ["QA[t,q] = A[t,d] * WDQ[d,q]", *_KV_A]
        kernels["qkv_norm"] = ["QC[t,q] = rmsnorm(QA[t,q]) * NQ[q]", _KV_NORM]
        kernels["q_b"] = ["Q[t,h,n] = QC[t,q] * WUQ[q,h,n]", "QP[t,h,p] = QC[t,q] * WQP[q,h,p]"]
        ranks: dict[str, Size] = {"q": config.size("q_lora_rank")}
        tensors: dict[str, str] = {"quantized": "WDQ WUQ WQP", "plain": "NQ"}
    else:
        kernels["q"] = ["Q[t,h,n] = A[t,d] * WQ[d,h,n]", "QP[t,h,p] = A[t,d] * WQP[d,h,p]"]
        kernels["kv_a"] = _KV_A
        kernels["kv_norm"] = [_KV_NORM]
        ranks, tensors = {}, {"quantized": "WQ WQP"}
    kernels |= _ATTENTION
    return Part(
        kernels,
        ranks
        | {
            "u": Rank(bound="tokens", phase="prefill"),
            "y": Rank(bound="tokens", phase="decode"),
            "cu": Rank(bound="context", phase="prefill"),
            "cy": Rank(bound="context", phase="decode"),
            "h": Rank(config.size("num_attention_heads"), split="tp"),
            "l": config.size("kv_lora_rank"),
            "n": config.size("qk_nope_head_dim"),
            "p": config.size("qk_rope_head_dim"),
            "o": config.size("v_head_dim"),
        },
        {
            "quantized": tensors["quantized"] + " WDKV WKP WUK WUV WO",
            "plain": tensors.get("plain", "") + " NC WUK2 WUV2",
            "kv_cache": "C CP",
        },
        # The decode kernels multiply with the same weights, as 16-bit copies.
        tied={"WUK2": "WUK", "WUV2": "WUV"},
    )


_KV_A = ["CN[t,l] = A[t,d] * WDKV[d,l]", "KP[t,p] = A[t,d] * WKP[d,p]"]
_KV_NORM = "CL[t,l] = rmsnorm(CN[t,l]) * NC[l]"
_ATTENTION = {
    "rope": ["QR[t,h,p] = rope(QP[t,h,p])", "KR[t,p] = rope(KP[t,p])"],
    "cache": ["C[t,l] = CL[t,l]", "CP[t,p] = KR[t,p]"],
    "kv_b": ["KN[cu,h,n] = C[cu,l] * WUK[l,h,n]", "VN[cu,h,o] = C[cu,l] * WUV[l,h,o]"],
    "prefill": [
        "S[u,h,cu] = Q[u,h,n] * KN[cu,h,n] + QR[u,h,p] * CP[cu,p]",
        "P[u,h,cu] = softmax(S[u,h,cu])",
        "O[u,h,o] = P[u,h,cu] * VN[cu,h,o]",
    ],
    "absorb": ["QL[y,h,l] = Q[y,h,n] * WUK2[l,h,n]"],
    "decode": [
        "S2[y,h,cy] = QL[y,h,l] * C[cy,l] + QR[y,h,p] * CP[cy,p]",
        "P2[y,h,cy] = softmax(S2[y,h,cy])",
        "OL[y,h,l] = P2[y,h,cy] * C[cy,l]",
    ],
    "v_up": ["O[y,h,o] = OL[y,h,l] * WUV2[l,h,o]"],
    "o": ["X[t,d] = O[t,h,o] * WO[h,o,d]"],
}
