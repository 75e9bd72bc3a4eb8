"""The flags that say what is deployed and how, spelled as `vllm serve` spells them, for every subcommand."""

from __future__ import annotations

import argparse
from dataclasses import fields

from energylens_vllm.energy import Deployment, EnergyModel

# Field of Deployment -> (further options of add_argument, help). The flag is the field's name with dashes.
_FLAGS: dict[str, tuple[dict[str, object], str]] = {
    "gpu": ({"metavar": "NAME"}, "GPU profile (see `energylens gpus`), or the path of a profile's JSON"),
    "tensor_parallel_size": ({"type": int, "metavar": "N"}, "GPUs that share each layer"),
    "pipeline_parallel_size": ({"type": int, "metavar": "N"}, "groups of layers"),
    "data_parallel_size": ({"type": int, "metavar": "N"}, "engines that share the requests (and, with -ep, experts)"),
    "enable_expert_parallel": ({"action": "store_true"}, "whole experts on each GPU instead of slices of all"),
    "dtype": ({"metavar": "TYPE"}, "type of activations and of weights that are not quantized"),
    "quantization": ({"metavar": "METHOD"}, "of the weights, such as fp8 or mxfp4 (default: as the config says)"),
    "kv_cache_dtype": ({"metavar": "TYPE"}, "type of the KV cache, such as fp8"),
    "max_num_batched_tokens": ({"type": int, "metavar": "N"}, "most tokens of a step"),
    "max_num_seqs": ({"type": int, "metavar": "N"}, "most requests of a step"),
    "enforce_eager": ({"action": "store_true"}, "without CUDA graphs"),
    "expert_routing": ({"metavar": "HOW"}, "uniform, zipf:ALPHA, collapsed, or the path of a file of counts"),
    "enable_eplb": ({"action": "store_true"}, "experts placed by their load (needs -ep)"),
    "num_redundant_experts": ({"type": int, "metavar": "N"}, "copies of the most wanted experts, with --enable-eplb"),
    "all2all_backend": ({"metavar": "NAME"}, "how tokens reach other ranks' experts, with -dp and -ep"),
    "enable_dbo": ({"action": "store_true"}, "dual-batch overlap (needs an --all2all-backend of DeepEP)"),
    "dbo_decode_token_threshold": ({"type": int, "metavar": "N"}, "least tokens of a decode that is split"),
    "dbo_prefill_token_threshold": ({"type": int, "metavar": "N"}, "least tokens of another step that is split"),
    "prefill_context_parallel_size": ({"type": int, "metavar": "N"}, "times as many GPUs, that split a step's tokens"),
    "decode_context_parallel_size": ({"type": int, "metavar": "N"}, "of the -tp GPUs, that share out each KV cache"),
    "dcp_comm_backend": ({"metavar": "NAME"}, "how these put their outputs together, ag_rs or a2a"),
    "dcp_q_replicate": ({"action": "store_true"}, "each of them computes all their queries (latent attention)"),
    "vllm_release": ({"metavar": "X.Y.Z"}, "release of vLLM (default: the one that the profile was measured with)"),
    "async_scheduling": (
        {"action": argparse.BooleanOptionalAction},
        "whether the host schedules a step while the one before runs (default: as that release does)",
    ),
    "cudagraph_capture_sizes": (
        {"type": int, "nargs": "+", "metavar": "N"},
        "token counts that steps are padded to (default: as vLLM captures them)",
    ),
    "power_limit_w": ({"type": float, "metavar": "WATTS"}, "power limit of each GPU (default: the profile's)"),
}
_SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "enable_expert_parallel": "-ep",
    "prefill_context_parallel_size": "-pcp",
    "decode_context_parallel_size": "-dcp",
    "quantization": "-q",
}


def add_model_argument(parser: argparse.ArgumentParser, flag: str = "model") -> None:
    """Add the model, as a positional argument or under `flag`."""
    argument = parser.add_argument(
        flag,
        metavar="MODEL",
        help="name of a known model (see `energylens models`), or the path of a Hugging Face config.json or of a "
        "cascade in YAML",
    )
    argument.dest, argument.required = "model", True


def add_deployment_arguments(parser: argparse.ArgumentParser, leave_out: frozenset[str] = frozenset()) -> None:
    """Add a flag for each field of `Deployment` but those in `leave_out`."""
    group = parser.add_argument_group("deployment", "under vLLM's own names")
    for field in fields(Deployment):
        if field.name in leave_out:
            continue
        options, what = _FLAGS[field.name]
        default = "" if "default" in what or field.default is False else f" (default: {field.default})"
        short = [_SHORT[field.name]] if field.name in _SHORT else []
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, *short, default=field.default, help=what + default, **options)  # type: ignore[arg-type]


def deployment(args: argparse.Namespace) -> Deployment:
    """The deployment of the parsed flags. Raises `EnergyLensError` for a value that is not accepted."""
    given = {name: value for name, value in vars(args).items() if name in Deployment.accepted()}
    return Deployment(**given)


def energy_model(args: argparse.Namespace) -> EnergyModel:
    """The energy model of the parsed model and deployment. Raises `EnergyLensError`."""
    return EnergyModel(args.model, deployment(args))
