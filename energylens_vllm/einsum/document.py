"""Cascades as YAML: the same words as `build_cascade`, to read, edit and write by hand. See docs/einsum.md."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from energylens_vllm.einsum.cascade import Block, Cascade, Kind, block, build_cascade
from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.rank import Rank
from energylens_vllm.errors import unknown

_FIELDS = ("name", "ranks", "tensors", "tied", "order", "blocks")


def load_cascade(source: str | Path | Mapping[str, object]) -> Cascade:
    """A cascade from the path of a YAML file, the YAML's text (more than one line), or the mapping that it holds.

    Raises EinsumError naming the field, or the einsum, the rank and both sizes.
    """
    if isinstance(source, Mapping):
        return _build(source)
    if isinstance(source, str) and "\n" in source:
        text, where = source, "cascade"
    else:
        path = Path(source)
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except OSError as error:
            raise EinsumError(f"cascade {str(source)!r}: {error.strerror or error}") from None
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise EinsumError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return _build(_mapping("document", document))
    except EinsumError as error:
        raise EinsumError(f"{where}: {error}") from None


def dump_cascade(cascade: Cascade) -> str:
    """The cascade as YAML. `load_cascade(dump_cascade(cascade)) == cascade`."""
    tensors = {
        kind: " ".join(tensor for tensor, own in cascade.kinds.items() if own == kind)
        for kind in get_args(Kind)
        if kind in cascade.kinds.values()
    }
    document: dict[str, Any] = {
        "name": cascade.name,
        "ranks": {name: _short(rank) for name, rank in cascade.ranks.items()},
        "tensors": tensors,
    }
    if cascade.tied:
        document["tied"] = _Inline(cascade.tied)
    if cascade.order:
        document["order"] = " ".join(cascade.order)
    document["blocks"] = {each.name: _dump_block(each) for each in cascade.blocks}
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


def _build(document: Mapping[str, object]) -> Cascade:
    for key in document:
        if key not in _FIELDS:
            raise EinsumError(str(unknown("field", key, _FIELDS)))
    for key in ("name", "ranks", "tensors", "blocks"):
        if key not in document:
            raise EinsumError(f"field {key!r} is missing")
    ranks, tensors = _mapping("ranks", document["ranks"]), _mapping("tensors", document["tensors"])
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int | str | Mapping | Rank):
            raise EinsumError(f"rank {name!r}: {rank!r} is neither a size, a bound nor a mapping")
    return build_cascade(
        str(document["name"]),
        ranks=cast("Mapping[str, int | str]", ranks),
        tensors={kind: _words(f"tensors {kind}", names) for kind, names in tensors.items()},
        blocks=[_load_block(name, each) for name, each in _mapping("blocks", document["blocks"]).items()],
        tied=cast("Mapping[str, str]", _mapping("tied", document.get("tied", {}))),
        order=_words("order", document.get("order", "")),
    )


def _load_block(name: str, document: object) -> Block:
    given = _mapping(f"block {name!r}", document)
    for key in given:
        if key not in ("count", "kernels"):
            raise EinsumError(f"block {name!r}: {unknown('field', key, ('count', 'kernels'))}")
    kernels = _mapping(f"block {name!r}: kernels", given.get("kernels"))
    texts = {kernel: [lines] if isinstance(lines, str) else lines for kernel, lines in kernels.items()}
    for kernel, lines in texts.items():
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise EinsumError(f"kernel {name}.{kernel}: {lines!r} is neither an einsum nor a list of einsums")
    return block(name, cast("Mapping[str, list[str]]", texts), cast("int | None", given.get("count")))


def _dump_block(each: Block) -> dict[str, object]:
    kernels = {
        group.name: [str(einsum) for einsum in group.einsums] if len(group.einsums) > 1 else str(group.einsums[0])
        for group in each.groups
    }
    return {"kernels": kernels} if each.count is None else {"count": each.count, "kernels": kernels}


def _short(rank: Rank) -> object:
    """The shortest spelling of a rank: its size, its bound, or what differs from the defaults."""
    default = {field.name: field.default for field in fields(Rank)}
    given = {name: value for name in default if (value := getattr(rank, name)) != default[name]}
    if set(given) in ({"size"}, {"bound"}):
        return next(iter(given.values()))
    return _Inline(given)


def _mapping(what: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise EinsumError(f"{what}: {value!r} is not a mapping")
    for key in value:
        if not isinstance(key, str):
            raise EinsumError(f"{what}: the name {key!r} is not text (put it in quotes)")
    return value


def _words(what: str, value: object) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise EinsumError(f"{what}: {value!r} is neither names with spaces nor a list of names")
    return list(words)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, which YAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Inline(dict[str, object]):
    """Dumped on one line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    _Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)
