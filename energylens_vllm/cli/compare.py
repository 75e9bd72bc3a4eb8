"""Compare two cascades of one network: the kernels in which they differ, and the bytes and joules that one saves.

    energylens compare mine.yaml mine-fused.yaml --decode 64
    energylens compare llama-3.1-8b --fuse layer.mlp=gate_up+act+down --prefill 4096

The second is another model or cascade, or the first with kernels drawn together (--fuse) or all taken apart
(--unfuse). What a fused kernel's einsums hand to each other no longer reaches the GPU's memory. The batch is given as
for `energylens predict`, energies are of all GPUs together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from energylens_vllm.architectures import is_cascade
from energylens_vllm.cli.deployment import add_deployment_arguments, add_model_argument, deployment
from energylens_vllm.cli.predict import add_batch_arguments, requests
from energylens_vllm.cli.table import percent, quantity, table
from energylens_vllm.einsum import Kernel
from energylens_vllm.einsum.fusion import Difference, compare, fuse, unfuse
from energylens_vllm.einsum.kernel import Terms
from energylens_vllm.energy import EnergyModel, StepPrediction
from energylens_vllm.energy.batch import Steps, steps_from_requests
from energylens_vllm.energy.precision import widths
from energylens_vllm.errors import EnergyLensError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    other = parser.add_argument_group("what it is compared with", "one of these")
    other.add_argument("other", nargs="?", metavar="OTHER", help="another model or cascade")
    other.add_argument(
        "--fuse", action="append", default=[], metavar="BLOCK.NAME=A+B+..",
        help="the first with neighbouring kernels A, B, .. of a block drawn together into one; may be given again",
    )  # fmt: skip
    other.add_argument("--unfuse", action="store_true", help="the first with every einsum a kernel of its own")
    add_batch_arguments(parser)
    add_deployment_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    given = deployment(args)
    first = EnergyModel(args.model, given)
    second = _other(args, first)
    batch = requests(args)
    found = differences(first, second, batch)
    before, after = first.step(batch), second.step(batch)
    if args.json:
        print(json.dumps({
            "kernels": [as_json(each) for each in found],
            "before": {"time_s": before.time_s, "energy_j": before.energy_j, "components_j": dict(before.components)},
            "after": {"time_s": after.time_s, "energy_j": after.energy_j, "components_j": dict(after.components)},
            "saved_j": before.energy_j - after.energy_j,
            "saved_s": before.time_s - after.time_s,
        }))  # fmt: skip
        return 0
    if not found:
        print("no kernel differs")
        return 0
    print(as_text(found, before, after))
    return 0


def as_text(found: list[KernelDifference], before: StepPrediction, after: StepPrediction) -> str:
    kernels = [
        [
            each.name,
            _launches(each.before),
            _launches(each.after),
            quantity(each.bytes_before, "B") if each.before else "-",
            quantity(each.bytes_after, "B") if each.after else "-",
        ]
        for each in found
    ]
    totals = [
        quantity(sum(moved), "B") for moved in zip(*((e.bytes_before, e.bytes_after) for e in found), strict=True)
    ]
    kernels.append(["together", "", "", *totals])
    step = [("time", "s", before.time_s, after.time_s), ("energy", "J", before.energy_j, after.energy_j)]
    for name, joules in before.components.items():
        other = after.components[name]
        if abs(joules - other) > 5e-4 * max(joules, other):  # what changes, to a digit that is shown
            step.append((f"  {name.replace('_', ' ')}", "J", joules, other))
    lines = [
        table(["kernel that differs", "launches", "after", "bytes of a GPU", "after"], kernels),
        table(
            ["step", "before", "after", "saved"],
            [
                [what, quantity(old, unit), quantity(new, unit), percent((old - new) / old) if old else "-"]
                for what, unit, old, new in step
            ],
        ),
    ]
    flags = sorted(before.flags | after.flags)
    return "\n\n".join([*lines, *(["flags: " + ", ".join(flags)] if flags else [])])


def _other(args: argparse.Namespace, first: EnergyModel) -> EnergyModel:
    ways = [args.other is not None, bool(args.fuse), args.unfuse]
    if sum(ways) != 1:
        raise EnergyLensError("compare: give one of OTHER, --fuse and --unfuse")
    given = deployment(args)
    # `first` may come from a checkpoint that is stored in a quantization, of which a cascade says nothing.
    same = replace(given, quantization=first.quantization)
    if args.other is None:
        cascade = first.cascade
        groups = dict(parse_fusion(text) for text in args.fuse)
        return EnergyModel(unfuse(cascade) if args.unfuse else fuse(cascade, groups), same)
    second = EnergyModel(args.other, given)
    if is_cascade(args.other):
        return EnergyModel(second.cascade, same)
    if second.quantization != first.quantization:
        formats = [model.quantization or given.dtype for model in (first, second)]
        raise EnergyLensError(
            f"compare: {args.model} is stored in {formats[0]}, {args.other} in {formats[1]}; accepted: cascades in one "
            "format, or --quantization for both"
        )
    return second


def parse_fusion(text: str) -> tuple[str, list[str]]:
    """ "layer.mlp=gate_up+act+down" -> ("layer.mlp", ["gate_up", "act", "down"])."""
    name, equals, kernels = text.partition("=")
    parts = [part.strip() for part in kernels.split("+")]
    if not equals or not name.strip() or not all(parts):
        raise EnergyLensError(f"--fuse: {text!r}; accepted: BLOCK.NAME=A+B, such as layer.mlp=gate_up+act+down")
    return name.strip(), parts


@dataclass(frozen=True, slots=True)
class KernelDifference:
    """A kernel in which two cascades differ, with its HBM bytes over all its launches of one GPU in a step."""

    name: str
    before: Kernel | None
    after: Kernel | None
    bytes_before: float
    bytes_after: float


def differences(first: EnergyModel, second: EnergyModel, batch: Iterable[tuple[int, int]]) -> list[KernelDifference]:
    """The kernels in which two models of one deployment differ, and what each moves for a batch."""
    given = first.deployment
    pairs = list(batch)
    element = widths(given.dtype, first.quantization, given.kv_cache_dtype)
    found = compare(first.cascade, second.cascade, element, given.mesh)
    return [
        KernelDifference(_where(each), each.before, each.after, _moved(each.before, first, pairs),
                         _moved(each.after, second, pairs))
        for each in found
    ]  # fmt: skip


def _where(each: Difference) -> str:
    return each.name if not each.stage else f"{each.name} (stage {each.stage})"


def _moved(kernel: Kernel | None, model: EnergyModel, batch: list[tuple[int, int]]) -> float:
    """Bytes between the GPU and its memory, over all launches; messages of collectives do not count."""
    if kernel is None or kernel.collective is not None:
        return 0.0
    steps = steps_from_requests(batch, model.masks).share(model.deployment.data_parallel_size)
    terms = (kernel.activation_bytes, kernel.kv_read_bytes, kernel.kv_write_bytes)
    return kernel.count * (kernel.weight_bytes + sum(_value(each, kernel, model, steps) for each in terms))


def _value(terms: Terms, kernel: Kernel, model: EnergyModel, steps: Steps) -> float:
    shape = kernel.attention
    load = steps.attention[model.masks.index(shape.mask) if shape is not None else 0] if steps.attention else None
    of_phase = {"all": 1.0, "decode": steps.decode_tokens[0] / steps.tokens[0]}
    share = of_phase.get(kernel.phase, 1.0 - of_phase["decode"])
    total = terms.constant + terms.tokens * steps.tokens[0] * share + terms.sampled * steps.sequences[0]
    if load is not None:
        decode, prefill = kernel.phase != "prefill", kernel.phase != "decode"
        total += terms.pairs * (load.decode_pairs[0] * decode + load.prefill_pairs[0] * prefill)
        total += terms.keys * (load.decode_keys[0] * decode + load.prefill_keys[0] * prefill)
    return float(total)


def as_json(each: KernelDifference) -> dict[str, object]:
    return {
        "kernel": each.name,
        "launches_before": each.before.count if each.before else 0,
        "launches_after": each.after.count if each.after else 0,
        "bytes_before": each.bytes_before,
        "bytes_after": each.bytes_after,
    }


def _launches(kernel: Kernel | None) -> str:
    return "-" if kernel is None else str(kernel.count)
