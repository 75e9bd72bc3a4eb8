"""Quantization names as vLLM spells them -> bytes per element and the number format that tensor cores compute in."""

from __future__ import annotations

from dataclasses import dataclass

from energylens_vllm.einsum.kernel import Kernel, Widths


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored and multiplied.

    `kernel` names the coefficients of the profile ("linear.<kernel>.*"); `weight_bytes` is per element with the
    scales of its block format; `input_bytes` that of the other operand as the tensor cores take it (below 2 an extra
    kernel quantizes it before each GEMM); `experts_only` that only expert weights are stored so.
    """

    kernel: str
    weight_bytes: float
    input_bytes: float = 2.0
    experts_only: bool = False


# Scales: fp8 per tensor or channel: none worth counting; fp8 block 128 x 128: one fp32 per 16,384 elements; int4 in
# groups of 128 with an fp16 scale and a packed zero point: 0.5 + 2.5/128; mxfp4: one byte per 32 (OCP MX v1.0).
FORMATS: dict[str, Format] = {
    "bfloat16": Format("bfloat16", 2.0),
    "fp8": Format("fp8", 1.0, 1.0),
    "fp8_block": Format("fp8_block", 1.0 + 4 / 16384, 1.0),
    "int8_wo": Format("int8_wo", 1.0 + 2 / 128),
    "int4_wo": Format("int4_wo", 0.5 + 2.5 / 128),
    "mxfp4": Format("mxfp4", 0.5 + 1 / 32, experts_only=True),
}
#: vLLM's quantization names -> format.
QUANTIZATIONS: dict[str, str] = {
    "fp8": "fp8",
    "fp8_per_tensor": "fp8",
    "fp8_per_block": "fp8_block",
    "fp8_block": "fp8_block",
    "modelopt": "fp8",
    "ptpc_fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "compressed-tensors": "fp8",
    "awq": "int4_wo",
    "awq_marlin": "int4_wo",
    "gptq": "int4_wo",
    "gptq_marlin": "int4_wo",
    "int4": "int4_wo",
    "int8": "int8_wo",
    "mxfp4": "mxfp4",
    "gpt_oss_mxfp4": "mxfp4",
}
#: Of these, what vLLM makes of an unquantized checkpoint; the others it reads from checkpoints that are stored so.
#: Source: vllm/config/quantization.py, `_ONLINE_SHORTHANDS`, and layers/quantization/fp8.py, `Fp8Config` (0.32).
ONLINE_QUANTIZATIONS = ("fp8", "fp8_per_tensor", "fp8_per_block")
#: vLLM's KV-cache dtypes -> bytes per element (None: the model's dtype).
KV_CACHE_DTYPES: dict[str, float | None] = {
    "auto": None, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "fp8_inc": 1.0,
}  # fmt: skip
_DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "auto": 2.0, "float32": 4.0}


def format_of(quantization: str | None) -> Format | None:
    """The format of a vLLM quantization name; None for unquantized."""
    return None if quantization is None else FORMATS[QUANTIZATIONS[quantization]]


def kernel_format(form: Format | None, kernel: Kernel) -> str:
    """The name, as profiles spell it, of the format that a kernel's weights are in."""
    return form.kernel if kernel.quantized and form is not None else "bfloat16"


def widths(dtype: str, quantization: str | None, kv_cache_dtype: str) -> Widths:
    """Bytes per element of each kind of tensor of a deployment."""
    plain = _DTYPE_BYTES[dtype]
    form = format_of(quantization)
    kv = KV_CACHE_DTYPES[kv_cache_dtype]
    return Widths(
        weight=plain if form is None or form.experts_only else form.weight_bytes,
        expert_weight=plain if form is None else form.weight_bytes,
        plain_weight=plain,
        kv_cache=plain if kv is None else kv,
        activation=plain,
    )
