"""Configs by name, offline: `catalog/` holds those of known models, as published, with the hub ids they serve."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TypeGuard

from energylens_vllm.architectures.errors import ArchitectureError
from energylens_vllm.errors import unknown

CATALOG = Path(__file__).parent / "catalog"

#: The field of a catalogue entry that lists the models of the hub with this config, the first of them the original.
HUB_IDS = "_hub_ids"


def known_models() -> list[str]:
    """The names of the models in the catalogue."""
    return sorted(path.stem for path in CATALOG.glob("*.json"))


def hub_ids(name: str) -> list[str]:
    """The models of the hub that the catalogue's `name` stands for, the original first."""
    ids = _read(CATALOG / f"{name}.json")[HUB_IDS]
    assert isinstance(ids, list)
    return ids


def is_cascade(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a model is given as the path of a cascade in YAML, which knows of no checkpoint, and not as a config."""
    return isinstance(source, str | os.PathLike) and os.fspath(source).endswith((".yaml", ".yml"))


def load_config(source: str | Path | Mapping[str, object]) -> dict[str, object]:
    """A Hugging Face config from a known name ("llama-3.1-8b"), a known hub id ("meta-llama/Llama-3.1-8B", in any
    case), the path of a config.json or of the folder that holds it, or the config itself.

    Raises ArchitectureError for a name that is neither known nor a path, and for a file that is no config.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path, name = Path(source), str(source)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        place = file.resolve()
        return _read(file) | {
            "_name_or_path": str(place.parent if file.name == "config.json" else place.with_suffix(""))
        }
    found = _hub().get(name.lower())
    if found is None:
        if file.suffix == ".json":
            raise ArchitectureError(f"config {str(file)!r}: No such file")
        raise ArchitectureError(str(unknown("model", name, known_models(), "Or give the path of a config.json")))
    config = _read(CATALOG / f"{found}.json")
    del config[HUB_IDS]
    return {"_name_or_path": name if "/" in name else hub_ids(found)[0]} | config


@cache
def _hub() -> Mapping[str, str]:
    """Lower-case name or hub id -> name in the catalogue."""
    names: dict[str, str] = {}
    for name in known_models():
        names |= {name: name} | {each.lower(): name for each in hub_ids(name)}
    return names


def _read(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchitectureError(f"config {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise ArchitectureError(f"config {str(path)!r}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArchitectureError(f"config {str(path)!r}: holds a {type(config).__name__}, not a config")
    return config
