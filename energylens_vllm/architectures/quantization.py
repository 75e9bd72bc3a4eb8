"""What a checkpoint's config says of how its weights are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def quantization(config: Mapping[str, object]) -> str | None:
    """The name of the checkpoint's quantization as `vllm serve --quantization` spells it, None if it has none.

    Where a method leaves the format open it is the format's own name: "int4" or "int8" weights, "fp8_per_block" for
    FP8 with block scales (DeepSeek V3). A method that is not known is returned as it stands.
    """
    given = _section(config)
    if not given:
        return None
    method = str(given.get("quant_method", "")).lower()
    if method == "fp8":
        return "fp8_per_block" if given.get("weight_block_size") else "fp8"
    if method in ("gptq", "awq"):
        return "int8" if given.get("bits") == 8 else method
    if method == "compressed-tensors":
        return _compressed(given)
    return method or None


def _section(config: Mapping[str, object]) -> Mapping[str, object]:
    """The config's own section, or that of the text model in it."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                found = holder.get(key)
                if isinstance(found, Mapping):
                    return found
    return {}


def _compressed(given: Mapping[str, object]) -> str:
    """compressed-tensors states the format of each group of layers; the linear layers are the first group."""
    for weights in _weights(given):
        bits, kind = weights.get("num_bits"), weights.get("type")
        if kind == "float" and bits == 8:
            return "fp8_per_block" if weights.get("strategy") == "block" else "fp8"
        if kind == "int" and bits in (4, 8):
            return f"int{bits}"
    return "compressed-tensors"


def _weights(given: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    groups = given.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights
