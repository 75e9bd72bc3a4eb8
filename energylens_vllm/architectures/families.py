"""Which builder makes which model: by `model_type`, and for types that are not known by the class they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from energylens_vllm.architectures import deepseek, gemma, gpt_oss, llama, llama4, mixtral, qwen2, qwen3
from energylens_vllm.architectures.config import Config
from energylens_vllm.architectures.errors import ArchitectureError
from energylens_vllm.einsum import Cascade
from energylens_vllm.errors import unknown

FAMILIES: Mapping[str, Callable[[Config], Cascade]] = {
    "llama": llama.build,
    "mistral": llama.build,
    "phi3": llama.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
    "qwen3_moe": qwen3.build_moe,
    "mixtral": mixtral.build,
    "gemma2": gemma.build_gemma2,
    "gemma3_text": gemma.build_gemma3,
    "gpt_oss": gpt_oss.build,
    "deepseek_v2": deepseek.build,
    "deepseek_v3": deepseek.build,
    "llama4_text": llama4.build,
}

#: Classes in `architectures` -> model type, for models of another type that name one of these.
CLASSES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Llama4ForCausalLM": "llama4_text",
}

#: Multimodal wrappers -> the type of their text model, for configs whose `text_config` does not say it.
TEXT_MODELS: Mapping[str, str] = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}

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
    shared = {key: config.get(key) for key in ("_name_or_path", "tie_word_embeddings")}
    shared["model_type"] = TEXT_MODELS.get(str(config.get("model_type")))
    return shared | {key: value for key, value in text.items() if value not in (None, "")}


def _family(config: Mapping[str, object]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    classes = config.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    for name in names:
        if name in CLASSES:
            return CLASSES[name]
    if model_type is None and not names:
        accepted = ", ".join(sorted(FAMILIES))
        raise ArchitectureError(f"config: field 'model_type' is missing; accepted: {accepted}. {HOW_TO_WRITE_ONE}")
    of = f"model_type of {names[0]}" if names else "model_type"
    raise ArchitectureError(str(unknown(f"config: {of}", model_type, FAMILIES, HOW_TO_WRITE_ONE)))
