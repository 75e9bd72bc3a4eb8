"""List the models that are known by name: their parameters, and what their attention is like.

A model is also known by its hub ids, such as meta-llama/Llama-3.1-8B-Instruct; --ids lists them. Of any other model
of a known family give the path of its config.json, and of any other network that of a cascade in YAML
(docs/einsum.md).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from energylens_vllm.architectures import build, hub_ids, known_models, load_config, quantization
from energylens_vllm.cli.table import table
from energylens_vllm.einsum import AttentionShape, Cascade


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ids", action="store_true", help="list the hub ids of each model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    models = [_model(name) for name in known_models()]
    if args.json:
        print(json.dumps([asdict(model) for model in models]))
    elif args.ids:
        print(table(["model", "hub ids"], ([model.name, ", ".join(model.hub_ids)] for model in models), left=2))
    else:
        print(
            table(
                ["model", "attention", "weights", "parameters", "active"],
                (
                    [
                        model.name,
                        model.attention,
                        model.quantization or "16 bits",
                        _billions(model.parameters),
                        _billions(model.active_parameters),
                    ]
                    for model in models
                ),
                left=3,
            )
        )
    return 0


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    hub_ids: list[str]
    parameters: int
    active_parameters: int  #: those that one token meets: of experts only the selected ones
    attention: str
    quantization: str | None  #: None: 16-bit weights


def _model(name: str) -> _Model:
    config = load_config(name)
    cascade = build(config)
    return _Model(
        name,
        hub_ids(name),
        cascade.parameters(),
        cascade.active_parameters(),
        _attention(cascade),
        quantization(config),
    )


def _attention(cascade: Cascade) -> str:
    """Query and KV heads, and how far which layers see, such as "64/8 heads, 12 window 128, 12 full"."""
    layers: dict[AttentionShape, int] = {}
    for kernel in cascade.kernels():
        if kernel.attention is not None and kernel.phase != "prefill":  # latent attention has a kernel for each phase
            layers[kernel.attention] = layers.get(kernel.attention, 0) + kernel.count
    shape = next(iter(layers))
    latent = shape.value_dim != shape.head_dim
    heads = f"{shape.heads} heads on latents" if latent else f"{shape.heads}/{shape.kv_heads} heads"
    reaches = [_reach(each) if len(layers) == 1 else f"{count} {_reach(each)}" for each, count in layers.items()]
    return ", ".join([heads, *reaches])


def _reach(shape: AttentionShape) -> str:
    if shape.mask.window is not None:
        return f"window {shape.mask.window}"
    return "full" if shape.mask.chunk is None else f"chunk {shape.mask.chunk}"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters < 1e12 else f"{parameters / 1e9:.0f}B"
