"""How long a request of a checkpoint may be."""

from __future__ import annotations

from collections.abc import Mapping

#: Kinds of scaled rotary embeddings whose config gives the scaled length already.
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def longest_request(config: Mapping[str, object]) -> int | None:
    """Tokens of prompt and output together, beyond which vLLM refuses `--max-model-len`; None if the config does not
    say. Source: vLLM 0.32, config/model.py, `_get_and_verify_max_len`."""
    text = config.get("text_config")
    holder = text if isinstance(text, Mapping) and "max_position_embeddings" in text else config
    positions = holder.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = holder.get("rope_scaling") or holder.get("rope_parameters")
    if not isinstance(scaling, Mapping) or "gemma3" in str(holder.get("model_type", config.get("model_type"))):
        return positions
    factor = scaling.get("factor")
    if scaling.get("rope_type", scaling.get("type")) in SCALED_ALREADY or not isinstance(factor, int | float):
        return positions
    return int(positions * factor)
