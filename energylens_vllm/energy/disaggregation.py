"""Prefill and decode on engines of their own, with the KV cache sent from one to the other.

Decode engines run closed queues without prompts between; each request that ends is replaced by one whose prompt a
prefill engine has computed, one at a time. There are as many prefill engines as are given; one that has nothing to do
idles. The cache of a prompt crosses the links of the GPUs that hold it, all at once: seconds and joules are those of a
send between two nodes (or inside one), docs/collectives.md. It costs no steps: vLLM sends it beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from energylens_vllm.energy.batch import steps_of_mixtures
from energylens_vllm.energy.cache import cached_bytes
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.energy.model import EnergyModel
from energylens_vllm.errors import EnergyLensError, is_positive_whole


@dataclass(frozen=True, slots=True)
class DisaggregatedServing:
    """Means over time, of all engines together; joules an output token sum to `energy_per_output_token_j`."""

    energy_per_output_token_j: float
    prefill_j: float  #: an output token's part, idle prefill engines included
    decode_j: float
    transfer_j: float
    power_w: float
    output_tokens_per_s: float
    inter_token_latency_s: float
    time_to_first_token_s: float  #: prefill, without waiting for an engine; the first token comes from there
    transfer_s: float  #: of a prompt's cache, before its second token
    prefill_utilisation: float
    gpus: int
    flags: frozenset[str]


def cache_bytes(model: EnergyModel, tokens: float) -> float:
    """Bytes of the KV cache that one GPU holds of a request of `tokens`; layers with a window or chunks keep no more
    than that."""
    return sum(
        token_bytes * min(tokens, mask.window or mask.chunk or math.inf)
        for mask, token_bytes in cached_bytes(model.kernels).items()
    )


def serve_apart(
    prefill: EnergyModel,
    decode: EnergyModel,
    concurrency: float,
    prompt_tokens: float,
    output_tokens: float,
    prefill_engines: int = 1,
    decode_engines: int = 1,
    across_nodes: bool = True,
) -> DisaggregatedServing:
    """`concurrency` requests decode at a time on all decode engines together. Raises EnergyLensError for numbers that
    are not positive, for fewer requests than decode engines, where decode engines cannot read the cache that prefill
    engines write, and where those do not keep up."""
    for name, count in (("prefill_engines", prefill_engines), ("decode_engines", decode_engines)):
        if not is_positive_whole(count):
            raise EnergyLensError(f"{name}: {count!r} is not a positive whole number")
    if not (math.isfinite(prompt_tokens) and prompt_tokens > 0):
        raise EnergyLensError(f"prompt_tokens: {prompt_tokens!r} is not a positive number")
    if not (math.isfinite(concurrency) and concurrency >= decode_engines):
        raise EnergyLensError(f"concurrency: {concurrency!r}; accepted: {decode_engines} or more, one a decode engine")
    if replace(prefill.cascade, name=decode.cascade.name) != decode.cascade:
        raise EnergyLensError(
            f"decode: {decode.cascade.name} cannot read the cache of {prefill.cascade.name}; accepted: the same network"
        )
    written, read = prefill.deployment.kv_cache_dtype, decode.deployment.kv_cache_dtype
    if written != read:
        raise EnergyLensError(f"decode: kv_cache_dtype {read!r}; accepted: {written!r}, as prefill engines write it")
    if not (math.isfinite(output_tokens) and output_tokens > 1):
        raise EnergyLensError(f"output_tokens: {output_tokens!r}; accepted: more than 1, the first is prefill's")
    for side, model in (("prefill", prefill), ("decode", decode)):
        if model.deployment.pipeline_parallel_size > 1:
            raise EnergyLensError(f"{side}: pipeline_parallel_size; accepted: 1")
    if prefill.deployment.data_parallel_size > 1:
        raise EnergyLensError("prefill: data_parallel_size; accepted: 1, and as many engines as it has ranks")

    ranks = decode.deployment.data_parallel_size * decode_engines
    batch = min(concurrency / ranks, decode.deployment.max_num_seqs)
    none = np.zeros(1)
    context = prompt_tokens + output_tokens / 2
    step = decode.predict(
        steps_of_mixtures(np.array([batch]), context, none, none, prompt_tokens, 0.0, decode.masks)
    )  # fmt: skip
    step_s, step_j = float(step.time_s[0]), float(step.energy_j[0])
    completed = ranks * batch / ((output_tokens - 1) * step_s)  # requests a second

    budget = prefill.deployment.max_num_batched_tokens
    chunks = math.ceil(prompt_tokens / budget)
    done = [min(budget, prompt_tokens - i * budget) for i in range(chunks)]
    steps = [prefill.step([(round(new), i * budget)], [False]) for i, new in enumerate(done)]
    prompt_s, prompt_j = sum(s.time_s for s in steps), sum(s.energy_j for s in steps)
    utilisation = completed * prompt_s / prefill_engines
    if utilisation >= 1:
        raise EnergyLensError(
            f"prefill_engines: {prefill_engines} compute {prefill_engines / prompt_s:.3g} prompts a second, decode "
            f"engines ask for {completed:.3g}; accepted: {math.ceil(completed * prompt_s) or 1} or more"
        )
    idle_j = prefill_engines * (1 - utilisation) * prefill.idle_power_w / completed  # a request

    holders = decode.deployment.gpus_per_stage
    sent = cache_bytes(decode, prompt_tokens)
    transfer_s, transfer_j = _send(decode, sent, across_nodes)
    tokens = output_tokens
    parts = ((prompt_j + idle_j) / tokens, step_j / batch * (tokens - 1) / tokens, holders * transfer_j / tokens)
    return DisaggregatedServing(
        energy_per_output_token_j=sum(parts),
        prefill_j=parts[0],
        decode_j=parts[1],
        transfer_j=parts[2],
        power_w=sum(parts) * completed * tokens,
        output_tokens_per_s=completed * tokens,
        inter_token_latency_s=step_s,
        time_to_first_token_s=prompt_s,
        transfer_s=transfer_s,
        prefill_utilisation=utilisation,
        gpus=prefill_engines * prefill.deployment.num_gpus + decode_engines * decode.deployment.num_gpus,
        flags=prefill.flags | decode.flags | {"transfer_not_measured"},
    )


def _send(model: EnergyModel, sent: float, across_nodes: bool) -> tuple[float, float]:
    """Seconds, and joules at both ends, of `sent` bytes from one GPU to another."""
    collectives = Collectives.of(model.profile)
    node = collectives.interconnect
    if across_nodes:
        seconds = node["network_hop_s"] + sent / node["network_bandwidth_bytes_per_s"]
    else:
        seconds = float(collectives.time_s("send_recv", np.array([sent]), 2, "nccl").time_s[0])
    return seconds, 2 * node["communication_power_w"] * seconds + node["energy_per_link_byte_j"] * sent
