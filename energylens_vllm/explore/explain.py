"""The best deployments in words: how to start them, what bounds them, and what the next best loses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from energylens_vllm.energy import Deployment
from energylens_vllm.explore.engine import DEFAULT_BACKEND, DEFAULT_COMBINE
from energylens_vllm.explore.search import Exploration
from energylens_vllm.explore.space import MAX_CAPTURE_SIZE
from energylens_vllm.explore.steady import steady
from energylens_vllm.hardware.profile import load_profile


@dataclass(frozen=True, slots=True)
class Choice:
    """One deployment. Energies are joules an output token; power and rates of all replicas together."""

    index: int  #: into the exploration's deployments
    title: str
    deployment: Deployment
    replicas: int
    gpus: int
    running: float  #: requests that run at a time in a data-parallel rank
    token_j: float
    interval_j: tuple[float, float]
    power_w: float
    tokens_per_s: float
    tpot_s: float
    ttft_s: float
    idle_share: float
    waiting_share: float
    components_j: Mapping[str, float]  #: sum to `token_j`; "idle" is what waiting for requests takes
    flags: tuple[str, ...]
    why: str
    command: str

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.gpus


def choices(found: Exploration, served: str, count: int = 5, quantized: bool = False) -> list[Choice]:
    """The best deployments, at most one of each engine. `served` is the model's name for `vllm serve`; `quantized` says
    that its checkpoint is stored in the quantization, which vLLM then finds by itself."""
    best = found.best(count + 1)
    parts = {index: components(found, index) for index in best}
    return [_choice(found, index, best, parts, served, quantized) for index in best[:count]]


def components(found: Exploration, index: int) -> dict[str, float]:
    """Joules an output token by what they are spent on.

    Where requests arrive at a rate, those of the mean number of running requests, scaled to the energy of the time in
    which the engine is not idle.
    """
    engine, running, budget = found.evaluate(index)
    load, table = found.load, found.deployments
    at = steady(engine.model, [running], [budget], load.prompt_tokens, load.output_tokens, load.prefix_cache_hit_rate)
    idle_w = float(table.idle_share[index]) * engine.model.idle_power_w * int(table.replicas[index])
    idle_j = idle_w / float(table.tokens_per_s[index])
    scale = (float(table.token_j[index]) - idle_j) / float(at.token_j[0])
    split = {name: float(part[0]) * scale for name, part in at.components_j.items()}
    return {**split, "idle": idle_j} if idle_j > 1e-6 * float(table.token_j[index]) else split


def _choice(
    found: Exploration,
    index: int,
    best: list[int],
    parts: Mapping[int, Mapping[str, float]],
    served: str,
    quantized: bool,
) -> Choice:
    table = found.deployments
    engine = found.engines[table.engine[index]]
    why = [_bound(found, index), _spent(parts[index], float(table.token_j[index]))]
    if index != best[0]:
        why.append(_loses("It", found, index, best[0], parts, "the best"))
    elif len(best) > 1:
        following = found.engines[table.engine[best[1]]].title
        why.append(_loses(f"The next best, {following},", found, best[1], index, parts, "this"))
    if (limit_w := engine.deployment.power_limit_w) is not None:
        why.append(f"Its GPUs are limited to {limit_w:g} W, which vLLM does not set: nvidia-smi -pl {limit_w:g}.")
    return Choice(
        index=index,
        title=engine.title,
        deployment=engine.deployment,
        replicas=int(table.replicas[index]),
        gpus=int(table.gpus[index]),
        running=float(table.running[index]),
        token_j=float(table.token_j[index]),
        interval_j=(float(table.low_j[index]), float(table.high_j[index])),
        power_w=float(table.power_w[index]),
        tokens_per_s=float(table.tokens_per_s[index]),
        tpot_s=float(table.tpot_s[index]),
        ttft_s=float(table.ttft_s[index]),
        idle_share=float(table.idle_share[index]),
        waiting_share=float(table.waiting_share[index]),
        components_j=parts[index],
        flags=tuple(sorted(engine.model.flags)),
        why=" ".join(why),
        command=command(found, index, served, quantized),
    )


def command(found: Exploration, index: int, served: str, quantized: bool = False) -> str:
    """The `vllm serve` that starts one replica."""
    table = found.deployments
    engine = found.engines[table.engine[index]]
    deployment = engine.deployment
    words = ["vllm", "serve", served]
    for flag, degree in (
        ("--tensor-parallel-size", deployment.tensor_parallel_size),
        ("--pipeline-parallel-size", deployment.pipeline_parallel_size),
        ("--data-parallel-size", deployment.data_parallel_size),
        ("--prefill-context-parallel-size", deployment.prefill_context_parallel_size),
        ("--decode-context-parallel-size", deployment.decode_context_parallel_size),
    ):
        if degree > 1:
            words += [flag, str(degree)]
    if deployment.dcp_comm_backend != DEFAULT_COMBINE:
        words += ["--dcp-comm-backend", deployment.dcp_comm_backend]
    if deployment.enable_expert_parallel:
        words.append("--enable-expert-parallel")
    if deployment.enable_eplb:
        words.append("--enable-eplb")
        if copies := deployment.num_redundant_experts:
            words += ["--eplb-config", json.dumps({"num_redundant_experts": copies})]
    if deployment.all2all_backend != DEFAULT_BACKEND:
        words += ["--all2all-backend", deployment.all2all_backend]
    if deployment.enable_dbo:
        words.append("--enable-dbo")
    if deployment.quantization is not None and not quantized:
        words += ["--quantization", deployment.quantization]
    if deployment.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", deployment.kv_cache_dtype]
    words += ["--max-num-seqs", str(table.max_num_seqs[index])]
    words += ["--max-num-batched-tokens", str(table.max_num_batched_tokens[index])]
    words += ["--max-model-len", str(found.load.longest)]
    words += ["--gpu-memory-utilization", f"{found.space.gpu_memory_utilization:g}"]
    words += ["--max-cudagraph-capture-size", str(MAX_CAPTURE_SIZE)]
    return " ".join(shlex.quote(word) for word in words)


# -- sentences --------------------------------------------------------------------------------------------------------


def _bound(found: Exploration, index: int) -> str:
    """What keeps the batch from being larger, or how the rate fills it. Limits are those of a data-parallel rank."""
    table, load = found.deployments, found.load
    limit = int(table.max_num_seqs[index])
    ranks = found.engines[table.engine[index]].deployment.data_parallel_size
    each = f" in each of {ranks} data-parallel ranks" if ranks > 1 else ""
    if load.rate_per_s is not None:
        running, replicas = float(table.running[index]), int(table.replicas[index])
        text = f"{load.rate_per_s:g} requests a second keep {running:.3g} of {limit} places busy{each}"
        text += f" on each of {replicas} replicas" if replicas > 1 else ""
        if (waiting := float(table.waiting_share[index])) > 0.001:
            text += f"; {waiting:.1%} of requests wait in line"
        if (idle := float(table.idle_share[index])) > 0.001:
            text += f"; {idle:.1%} of the time it idles"
        return text + "."
    larger = np.flatnonzero(
        (table.engine == table.engine[index])
        & (table.max_num_batched_tokens == table.max_num_batched_tokens[index])
        & (table.replicas == table.replicas[index])
        & (table.max_num_seqs > limit)
    )
    if not len(larger):
        if limit >= max(found.space.max_num_seqs):
            return f"The batch of {limit}{each} is the largest that was tried."
        return f"Memory bounds it: the KV cache holds no more than {limit} requests{each}."
    after = int(larger[np.argmin(table.max_num_seqs[larger])])
    more = f"{int(table.max_num_seqs[after])} requests at a time{each}"
    for bound, values, what in ((load.tpot_s, table.tpot_s, "token"), (load.ttft_s, table.ttft_s, "first token")):
        if bound is not None and values[after] > bound:
            return f"Time per {what} bounds it: {more} would take {values[after] * 1e3:.3g} ms."
    return f"A batch of {limit}{each} takes least: {more} would take more energy a token."


def _spent(parts: Mapping[str, float], total: float) -> str:
    first, second = sorted(parts, key=lambda name: -parts[name])[:2]
    return (
        f"{_named(first).capitalize()} takes {parts[first] / total:.0%} of the energy, "
        f"{_named(second)} {parts[second] / total:.0%}."
    )


def _loses(
    subject: str, found: Exploration, index: int, to: int, parts: Mapping[int, Mapping[str, float]], other: str
) -> str:
    table = found.deployments
    more = {name: parts[index].get(name, 0.0) - parts[to].get(name, 0.0) for name in {*parts[index], *parts[to]}}
    up, down = max(more, key=lambda name: more[name]), min(more, key=lambda name: more[name])
    excess_j = float(table.token_j[index] - table.token_j[to])
    excess = excess_j / float(table.token_j[to])
    if excess < 0.0005:
        return f"{subject} takes as much as {other}."
    text = f"{subject} takes {excess:.1%} more than {other}: {_difference(more[up])} a token for {_named(up)}"
    if more[down] < -0.2 * excess_j:
        text += f", {_difference(more[down])} for {_named(down)}"
    return text + "."


def _difference(joules: float) -> str:
    """With its sign, and the unit that needs no powers of ten."""
    return f"{joules:+.3g} J" if abs(joules) >= 0.9995 else f"{joules * 1e3:+.3g} mJ"


_NAMES = {
    "static": "static power",
    "linear": "arithmetic of linear layers",
    "attention": "arithmetic of attention",
    "experts": "arithmetic of experts",
    "weights": "reading weights",
    "kv_cache": "the KV cache",
    "activations": "moving activations",
    "communication": "communication",
    "host_gap": "waiting for the host",
    "idle": "idle time",
}


def _named(component: str) -> str:
    return _NAMES.get(component, component)


# -- data -------------------------------------------------------------------------------------------------------------


def as_json(found: Exploration, best: list[Choice]) -> dict[str, object]:
    """The exploration's result as plain data."""
    load = found.load
    return {
        "model": found.name,
        "vllm_release": found.space.vllm_release,
        "measured_releases": measured_releases(found),
        "load": {
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "ttft_s": load.ttft_s,
            "tpot_s": load.tpot_s,
            "rate_per_s": load.rate_per_s,
            "prefix_cache_hit_rate": load.prefix_cache_hit_rate,
            "max_model_len": load.longest,
        },
        "deployments": len(found.deployments),
        "feasible": int(found.feasible.sum()),
        "front": [row(found, int(index)) for index in np.flatnonzero(found.front)],
        "best": [
            row(found, choice.index)
            | {"components_j": dict(choice.components_j), "why": choice.why, "command": choice.command}
            for choice in best
        ],
        "flags": sorted(found.flags),
    }


def measured_releases(found: Exploration) -> dict[str, str]:
    """GPU -> the release of vLLM that was measured on it and is nearest to the one that is predicted for."""
    release = found.space.vllm_release
    return {gpu: load_profile(gpu).measured_release(release) for gpu in dict.fromkeys(found.space.gpus)}


def row(found: Exploration, index: int) -> dict[str, object]:
    """One deployment under vLLM's names, with what is predicted of it; None for what does not keep up."""
    table = found.deployments
    engine = found.engines[table.engine[index]]
    deployment = engine.deployment

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if np.isfinite(value) else None

    return {
        "gpu": deployment.gpu,
        "gpus": int(table.gpus[index]),
        "replicas": int(table.replicas[index]),
        "tensor_parallel_size": deployment.tensor_parallel_size,
        "pipeline_parallel_size": deployment.pipeline_parallel_size,
        "data_parallel_size": deployment.data_parallel_size,
        "prefill_context_parallel_size": deployment.prefill_context_parallel_size,
        "decode_context_parallel_size": deployment.decode_context_parallel_size,
        "dcp_comm_backend": deployment.dcp_comm_backend,
        "enable_expert_parallel": deployment.enable_expert_parallel,
        "enable_eplb": deployment.enable_eplb,
        "num_redundant_experts": deployment.num_redundant_experts,
        "all2all_backend": deployment.all2all_backend,
        "enable_dbo": deployment.enable_dbo,
        "quantization": deployment.quantization,
        "kv_cache_dtype": deployment.kv_cache_dtype,
        "power_limit_w": deployment.power_limit_w,
        "max_num_seqs": int(table.max_num_seqs[index]),
        "max_num_batched_tokens": int(table.max_num_batched_tokens[index]),
        "feasible": bool(found.feasible[index]),
        "pareto": bool(found.front[index]),
        "running": number(table.running[index]),
        "energy_per_output_token_j": number(table.token_j[index]),
        "low_j": number(table.low_j[index]),
        "high_j": number(table.high_j[index]),
        "power_w": number(table.power_w[index]),
        "output_tokens_per_s": number(table.tokens_per_s[index]),
        "output_tokens_per_s_per_gpu": number(table.tokens_per_s[index] / table.gpus[index]),
        "tpot_s": number(table.tpot_s[index]),
        "ttft_s": number(table.ttft_s[index]),
        "idle_share": number(table.idle_share[index]),
        "waiting_share": number(table.waiting_share[index]),
    }


def dumps(value: object) -> str:
    """JSON without NaN, which JSON has not."""
    return json.dumps(value, allow_nan=False)
