"""Models by name: the catalogue is complete, offline, quick, and can be deployed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.architectures import ArchitectureError, build, hub_ids, known_models, load_config, quantization
from energylens_vllm.einsum import EinsumError, Mesh, dump_cascade, load_cascade
from energylens_vllm.energy.precision import QUANTIZATIONS

MODELS = known_models()


def test_every_family_has_models() -> None:
    assert len(MODELS) >= 30
    types = {
        str((config.get("text_config") or config)["model_type"])  # type: ignore[index]  # a mapping
        for config in map(load_config, MODELS)
    }
    assert types >= {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gpt_oss",
        "deepseek_v2", "deepseek_v3", "llama4_text",
    }  # fmt: skip


def test_no_hub_id_is_claimed_twice() -> None:
    ids = [each.lower() for name in MODELS for each in hub_ids(name)]
    assert len(ids) == len(set(ids))
    assert all(each.count("/") == 1 for each in ids)


@pytest.mark.parametrize("name", MODELS)
def test_build_is_quick(name: str) -> None:
    config = load_config(name)
    best = min(_seconds(config) for _ in range(3))
    assert best < 0.2


def _seconds(config: dict[str, object]) -> float:
    start = time.perf_counter()
    build(config)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_model_can_be_split_where_its_heads_allow(name: str, tp: int) -> None:
    """As in vLLM: query heads must divide, KV heads must divide or be divided."""
    cascade = build(load_config(name))
    heads, kv_heads = cascade.ranks["h"].size, cascade.ranks["g"].size if "g" in cascade.ranks else 1
    assert heads is not None
    assert kv_heads is not None
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        with pytest.raises(EinsumError, match=r"rank [hg] \(\d+\)"):
            cascade.kernels(mesh=Mesh(tp=tp))
        return
    assert any(kernel.collective for kernel in cascade.kernels(mesh=Mesh(tp=tp))) == (tp > 1)
    # Latent projections, norms, routers and KV heads beyond their number are on every GPU.
    even = sum(cascade.weight_bytes()) / tp
    assert even <= cascade.weight_bytes(mesh=Mesh(tp=tp))[0] < even * 1.4


@pytest.mark.parametrize("name", MODELS)
def test_every_model_round_trips_through_yaml(name: str) -> None:
    cascade = build(load_config(name))
    again = load_cascade(dump_cascade(cascade))
    assert again == cascade
    assert again.kernels(mesh=Mesh(tp=2)) == cascade.kernels(mesh=Mesh(tp=2))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("META-LLAMA/llama-3.1-8b-INSTRUCT", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "qwen3-235b-a22b-fp8"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_hub_ids_in_any_case(source: str, name: str) -> None:
    assert build(load_config(source)).blocks == build(load_config(name)).blocks


def test_the_cascade_is_named_after_what_was_asked_for(tmp_path: Path) -> None:
    assert build(load_config("llama-3.1-8b")).name == "Llama-3.1-8B"
    assert build(load_config("meta-llama/Llama-3.1-8B-Instruct")).name == "Llama-3.1-8B-Instruct"
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(load_config("qwen3-8b") | {"_name_or_path": "/home/me/checkpoint-9"})
    )
    for source in (folder, str(folder), folder / "config.json"):
        assert build(load_config(source)).name == "my-model"


def test_here_is_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llama-3.1-8b"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert build(load_config("llama-3.1-8b")).name == "Llama-3.1-8B"  # a folder of that name that holds no config
    (folder / "config.json").write_text(json.dumps(load_config("qwen3-8b")))
    assert build(load_config("llama-3.1-8b")).parameters() == build(load_config("qwen3-8b")).parameters()
    monkeypatch.chdir(folder)
    assert build(load_config(".")).name == "llama-3.1-8b"


def test_a_config_may_be_a_mapping_a_file_or_its_folder(tmp_path: Path) -> None:
    config = load_config("gemma-2-2b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps(config))
    for source in (config, tmp_path, tmp_path / "config.json", str(tmp_path / "other.json")):
        assert load_config(source) | {"_name_or_path": config["_name_or_path"]} == config
    assert load_config(config) is not config


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("llama-3.1-8", ["unknown value 'llama-3.1-8'", "did you mean 'llama-3.1-8b'?", "the path of a config.json"]),
        ("none/config.json", ["'none/config.json'", "No such file"]),
    ],
)
def test_what_is_no_model_is_one_clear_error(source: str, words: list[str]) -> None:
    with pytest.raises(ArchitectureError) as error:
        load_config(source)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[1]", "holds a list, not a config")])
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ArchitectureError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"config\.json': No such file"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoints_quantization_is_one_that_deployments_know(name: str) -> None:
    assert quantization(load_config(name)) in {None, *QUANTIZATIONS}


# -- any config of a family, not only those of the catalogue -----------------------------------------------------------

FAMILY_MODELS = [
    "llama-3.2-1b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "qwen3-30b-a3b", "mixtral-8x7b", "gemma-2-2b",
    "gemma-3-1b", "gpt-oss-20b", "deepseek-v2-lite", "deepseek-v3", "llama-4-maverick",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(FAMILY_MODELS))
def test_any_shape_round_trips_and_splits(data: st.DataObject, name: str) -> None:
    config = load_config(name)
    config = dict(config.get("text_config") or config)  # type: ignore[call-overload]  # a mapping
    layers = data.draw(st.integers(1, 13), "layers")
    kv_heads = data.draw(st.sampled_from([1, 2, 4]), "KV heads")
    config |= {
        "num_hidden_layers": layers,
        "hidden_size": data.draw(st.integers(1, 8), "hidden") * 64,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * data.draw(st.sampled_from([1, 2, 3]), "queries of a KV head"),
        "tie_word_embeddings": data.draw(st.booleans(), "tied"),
        "head_dim": 32,
        "layer_types": None,
        "moe_layers": None,
        "no_rope_layers": None,
    }
    cascade = build(config)
    assert load_cascade(dump_cascade(cascade)) == cascade
    assert sum(block.count or 0 for block in cascade.blocks) == layers
    assert cascade.weight_bytes() == [2 * cascade.parameters()]
    assert sum(kernel.count for kernel in cascade.kernels() if kernel.name.endswith(".o")) == layers
    assert len({kernel.stage for kernel in cascade.kernels(mesh=Mesh(pp=layers))}) == layers
