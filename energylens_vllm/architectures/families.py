"""Which builder makes which model: by `model_type`, and for types that are not known by the class they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from energylens_vllm.architectures import llama, qwen2, qwen3
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.errors import ArchitectureError
from energylens_vllm.einsum import Cascade
from energylens_vllm.errors import unknown

FAMILIES: Mapping[str, Callable[[Config], Cascade]] = {
    "llama": llama.build,
    "mistral": llama.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
    "qwen3_moe": qwen3.build_moe,
}

#: Classes in `architectures` -> model type, for models of another type that name one of these.
CLASSES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

HOW_TO_WRITE_ONE = (
    "For another network write its cascade, as docs/einsum.md shows, and give the Cascade or the path of its YAML in "
    "place of the config"
)


def build(config: Mapping[str, object]) -> Cascade:
    """The cascade of a Hugging Face config. Of a multimodal model it is that of the text model alone.

    Raises ArchitectureError for an architecture that is not known, and for a field that is missing or makes no sense.
    """
    text = _text(config)
    model_type = _family(text)
    return FAMILIES[model_type](Config(text, model_type))


def _text(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text model's own config, with what only its wrapper says."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    shared = {key: config[key] for key in ("_name_or_path", "tie_word_embeddings") if key in config}
    return shared | {key: value for key, value in text.items() if key not in shared or value not in (None, "")}


def _family(config: Mapping[str, object]) -> str:
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return str(model_type)
    classes = config.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    for name in names:
        if name in CLASSES:
            return CLASSES[name]
    if model_type is None and not names:
        raise ArchitectureError(f"config: field 'model_type' is missing; accepted: {', '.join(sorted(FAMILIES))}")
    of = f"model_type of {names[0]}" if names else "model_type"
    raise ArchitectureError(str(unknown(f"config: {of}", model_type, FAMILIES, HOW_TO_WRITE_ONE)))
