"""Other fusions of one network: cascades that compute the same with kernels drawn together or taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from energylens_vllm.einsum.cascade import Block, Cascade, Group
from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.einsum.kernel import Kernel, Mesh, Widths
from energylens_vllm.errors import unknown


def fuse(cascade: Cascade, groups: Mapping[str, Sequence[str]]) -> Cascade:
    """The cascade with kernels drawn together: `{"layer.mlp": ["gate_up", "act", "down"]}` makes one kernel `mlp` of
    three neighbours in block `layer`. What they hand to each other no longer reaches HBM.

    Raises EinsumError for an unknown block or kernel, and for kernels that are not neighbours in that order.
    """
    blocks = {each.name: each for each in cascade.blocks}
    for name, parts in groups.items():
        block_name, _, fused = name.partition(".")
        if block_name not in blocks:
            raise EinsumError(str(unknown(f"fuse {name!r}: block", block_name, blocks)))
        if not fused:
            raise EinsumError(f"fuse {name!r}: write it as block.kernel, such as {block_name}.mlp")
        blocks[block_name] = _fuse(blocks[block_name], fused, list(parts))
    return replace(cascade, blocks=tuple(blocks.values()))


def _fuse(block: Block, fused: str, parts: list[str]) -> Block:
    names = [group.name for group in block.groups]
    for part in parts:
        if part not in names:
            raise EinsumError(str(unknown(f"fuse {block.name}.{fused}: kernel", part, names)))
    if not parts:
        raise EinsumError(f"fuse {block.name}.{fused}: no kernels given")
    start = names.index(parts[0])
    neighbours = names[start : start + len(parts)]
    if neighbours != parts:
        raise EinsumError(
            f"fuse {block.name}.{fused}: {', '.join(parts)} are not neighbours; from {parts[0]} on come "
            f"{', '.join(names[start:])}"
        )
    if fused in names and fused not in parts:
        raise EinsumError(f"fuse {block.name}.{fused}: there is a kernel of that name")
    one = Group(fused, tuple(einsum for group in block.groups[start : start + len(parts)] for einsum in group.einsums))
    return replace(block, groups=(*block.groups[:start], one, *block.groups[start + len(parts) :]))


def unfuse(cascade: Cascade) -> Cascade:
    """The cascade with every einsum a kernel of its own (`attention.1`, `attention.2`, ...), all intermediates in HBM:
    what fusion saves is the difference to this."""
    return replace(cascade, blocks=tuple(replace(each, groups=tuple(_apart(each))) for each in cascade.blocks))


def _apart(block: Block) -> Iterator[Group]:
    for group in block.groups:
        if len(group.einsums) == 1:
            yield group
        else:
            yield from (Group(f"{group.name}.{i}", (einsum,)) for i, einsum in enumerate(group.einsums, 1))


@dataclass(frozen=True, slots=True)
class Difference:
    """A kernel that two cascades do not share: absent from one of them (None), or with other work."""

    name: str
    stage: int
    before: Kernel | None
    after: Kernel | None


def compare(
    before: Cascade, after: Cascade, widths: Widths | None = None, mesh: Mesh | None = None
) -> list[Difference]:
    """The kernels in which two cascades differ under one sharding, in order of `before`, then of `after`.

    Raises EinsumError where the mesh cannot split a rank of either.
    """
    old = {(kernel.stage, kernel.name): kernel for kernel in before.kernels(widths, mesh)}
    new = {(kernel.stage, kernel.name): kernel for kernel in after.kernels(widths, mesh)}
    return [
        Difference(name, stage, old.get((stage, name)), new.get((stage, name)))
        for stage, name in dict.fromkeys((*old, *new))
        if old.get((stage, name)) != new.get((stage, name))
    ]
