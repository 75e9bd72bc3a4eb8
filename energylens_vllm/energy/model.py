"""`EnergyModel`: a network on a deployment, compiled once; then time, energy and their intervals of any batch."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from energylens_vllm.architectures import build, is_cascade, load_config
from energylens_vllm.architectures import quantization as quantization_of
from energylens_vllm.einsum import Cascade, Kernel, load_cascade
from energylens_vllm.einsum.kernel import ExpertShape, Mask
from energylens_vllm.energy.batch import Array, Steps, steps_from_requests
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.energy.deployment import Deployment
from energylens_vllm.energy.expert_exchange import EXCHANGE_STD, ExpertExchanges
from energylens_vllm.energy.factors import Factors
from energylens_vllm.energy.interval import COMMUNICATION_STD, DECODE_CONTEXT_STD, PREFILL_CONTEXT_STD, Uncertainty
from energylens_vllm.energy.kernel_time import expert_tile_rows
from energylens_vllm.energy.overlap import DualBatch, DualBatchStep, Overlap, StagedStep, overlap_std
from energylens_vllm.energy.precision import format_of, kernel_format, widths
from energylens_vllm.energy.queueing import OpenServing, serve_openly
from energylens_vllm.energy.routing_load import LoadTable, Placement, RankLoads, Routing, imbalance
from energylens_vllm.energy.serving import ServingPrediction, serve
from energylens_vllm.energy.speculative import Speculation
from energylens_vllm.energy.step import COMPONENTS, Evaluated, Exchanged, GpuStep
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware.profile import GpuProfile, load_profile

PHASES = ("prefill", "decode")
#: Steps that are evaluated at a time: their arrays stay in a core's cache, and take the memory of those before.
BLOCK_STEPS = 24 * 1024


@dataclass(frozen=True, slots=True)
class Predictions:
    """N steps of one data-parallel rank; every array has shape (N,), energies are over all GPUs of the rank.

    `components` and `phases` each sum to `energy_j`. The bounds are of 90 % intervals. `flags` say why they are less
    than sure.
    """

    time_s: Array  #: the larger of the next two
    gpu_s: Array
    host_s: Array  #: to prepare and launch, while the GPU runs the step before where scheduling is asynchronous
    energy_j: Array
    components: Mapping[str, Array]
    phases: Mapping[str, Array]
    low_s: Array
    high_s: Array
    low_j: Array
    high_j: Array
    clock: Array  #: SM clock relative to the top clock
    communication_s: Array  #: part of `time_s` in collectives
    waiting_s: Array  #: part of `time_s` in which the mean GPU waits for the one with the hottest experts
    waste_j: Array  #: part of `energy_j`: static power in as much of that time as makes the step longer
    padding_j: Array  #: part of `energy_j`: arithmetic on rows that only fill experts' tiles up
    flags: frozenset[str]


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """One engine step over the whole deployment. `components` and `phases` each sum to `energy_j`; `flags` say why the
    prediction is less than sure, which the 90 % intervals (low, high) reflect."""

    time_s: float
    energy_j: float
    components: Mapping[str, float]
    phases: Mapping[str, float]
    interval_s: tuple[float, float]
    interval_j: tuple[float, float]
    flags: frozenset[str]
    #: part of the static energy that imbalance costs: burnt while waiting for the GPU with the hottest experts
    waste_j: float = 0.0
    #: part of the experts' energy: arithmetic on rows that only fill tiles up
    padding_j: float = 0.0

    @property
    def power_w(self) -> float:
        """Mean power of all GPUs."""
        return self.energy_j / self.time_s


class EnergyModel:
    """Predicts the steps of one network on one deployment.

    `config`: a Hugging Face config (dict), the path of one or of a cascade in YAML, a known name, or a `Cascade`.
    `profile` takes the place of the one that the deployment names (for fits). `overlap`: how collectives run beside
    computation, see energy/overlap.py; None: after it. `expert_counts`: how often tokens have selected each expert, of
    shape (experts,) or (layers, experts), in place of the deployment's `expert_routing`.
    Raises EnergyLensError for a network, a GPU or a sharding that is not known.
    """

    def __init__(
        self,
        config: Mapping[str, object] | str | os.PathLike[str] | Cascade,
        deployment: Deployment | None = None,
        profile: GpuProfile | None = None,
        overlap: Overlap | DualBatch | None = None,
        expert_counts: npt.ArrayLike | None = None,
    ) -> None:
        self.deployment = deployment = deployment or Deployment()
        if overlap is None and deployment.enable_dbo:
            overlap = DualBatch(
                decode_token_threshold=deployment.dbo_decode_token_threshold,
                prefill_token_threshold=deployment.dbo_prefill_token_threshold,
            )
        self._overlap, self._expert_counts = overlap, expert_counts
        self._counted: dict[tuple[ExpertShape, str], LoadTable] = {}  #: tables of `expert_counts`
        self.cascade, quantization = _cascade(config, deployment)
        if not self.cascade.expert_layers:
            deployment.check_experts(self.cascade.name)
        self.quantization = quantization
        self.profile = profile or load_profile(deployment.gpu)
        if deployment.vllm_release is not None:
            self.profile = self.profile.at_release(deployment.vllm_release)
        if deployment.prefill_context_parallel_size > 1 and not self.profile.splits_prefills:
            raise EnergyLensError(
                f"vllm_release: {self.profile.vllm_release} has no prefill context parallelism; accepted: 0.32 or later"
            )
        mesh = deployment.mesh
        element = widths(deployment.dtype, quantization, deployment.kv_cache_dtype)
        #: what each GPU launches in a step, of all pipeline stages
        self.kernels = kernels = self.cascade.kernels(element, mesh)
        #: masks of the network's attention, in the order in which `Steps.attention` has to be
        self.masks: tuple[Mask, ...] = tuple(dict.fromkeys(k.attention.mask for k in kernels if k.attention))
        self._collectives = Collectives.of(self.profile)
        form = format_of(quantization)
        self._exchanges = ExpertExchanges(
            self._collectives,
            kernels,
            deployment.all2all_backend,
            deployment.tensor_parallel_size,
            fp8=form is not None and form.kernel == "fp8_block",  # vLLM dispatches others in 16 bits
        )
        unlike = Counter(
            tuple(replace(kernel, stage=0) for kernel in kernels if kernel.stage == stage) for stage in range(mesh.pp)
        )
        self._gpu = self._gpu_step(
            overlap,
            list(unlike),
            self.masks,
            self.profile,
            form,
            deployment.capture_sizes,
            deployment.power_limit_w,
            self.async_scheduling,
            element.kv_cache,
            self._loads,
            self._exchange,
            mesh,
        )
        #: GPUs of each unlike stage, of shape (S, 1)
        self._gpus = deployment.gpus_per_stage * np.array(list(unlike.values()), dtype=np.float64)[:, None]
        self._uncertainty = Uncertainty.of(self.profile, kernels, quantization, deployment)
        if overlap is not None:
            self._uncertainty = self._uncertainty.wider("overlap_not_measured", overlap_std(overlap, self.profile.name))
        for parts, std in ((mesh.dcp, DECODE_CONTEXT_STD), (mesh.pcp, PREFILL_CONTEXT_STD)):
            if parts > 1:
                self._uncertainty = self._uncertainty.wider("context_parallel", std)
        if self._exchanges:
            self._uncertainty = self._uncertainty.wider("all2all_not_measured", EXCHANGE_STD)
        std = self._collectives.unmeasured_std(kernels)
        #: how much less sure communication is than where it was measured
        self._less_sure = max(std / COMMUNICATION_STD, 1.0)
        if std:
            self._uncertainty = self._uncertainty.wider("extrapolated", 0.0)
        self.flags = self._uncertainty.flags
        self.factors = Factors()  #: on what the profile says of this very GPU

    def with_factors(self, factors: Factors) -> EnergyModel:
        """The same model with other factors; what is compiled is shared, so it costs microseconds."""
        other = copy.copy(self)
        other.factors = factors
        other._gpu = self._gpu.with_factors(factors)
        return other

    def predict(self, steps: Steps) -> Predictions:
        """N steps of one data-parallel rank. With pipeline parallelism the pipeline is taken to be full: a step ends
        each time the slowest stage does. Ranks that share experts are taken to have like batches."""
        if len(steps) <= BLOCK_STEPS:
            return self._together(steps, self._gpu.evaluate(steps))
        first = self.predict(steps[:1])
        room = iter(np.empty((len(list(_arrays(first))), len(steps))))  # in one piece, which gets large pages
        whole = _each(first, lambda _: next(room))
        for start in range(0, len(steps), BLOCK_STEPS):
            block = slice(start, start + BLOCK_STEPS)
            for into, values in zip(_arrays(whole), _arrays(self.predict(steps[block])), strict=True):
                into[block] = values
        return whole

    def step(self, requests: Sequence[tuple[int, int]], decode: Sequence[bool] | None = None) -> StepPrediction:
        """One engine step over the whole deployment, of requests (num_new_tokens, num_computed_tokens).

        `decode` says which requests decode, where that is not those with one new token after at least one computed
        (speculative decoding). With data parallelism the requests are spread evenly over the ranks.
        Raises EnergyLensError for an empty batch or a negative count.
        """
        if not len(requests):
            raise EnergyLensError("requests: the batch is empty; accepted: one request or more")
        ranks = self.deployment.data_parallel_size
        steps = steps_from_requests(requests, self.masks, decode)
        rank = self.predict(steps.share(ranks) if ranks > 1 else steps)

        def one(values: Array, times: float = ranks) -> float:
            return float(values[0]) * times

        return StepPrediction(
            time_s=one(rank.time_s, 1),
            energy_j=one(rank.energy_j),
            components={name: one(joules) for name, joules in rank.components.items()},
            phases={name: one(joules) for name, joules in rank.phases.items()},
            interval_s=(one(rank.low_s, 1), one(rank.high_s, 1)),
            interval_j=(one(rank.low_j), one(rank.high_j)),
            flags=rank.flags,
            waste_j=one(rank.waste_j),
            padding_j=one(rank.padding_j),
        )

    def serving(
        self,
        concurrency: float,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        mean_context_tokens: float | None = None,
        prefix_cache_hit_rate: float | None = None,
        speculation: Speculation | None = None,
    ) -> ServingPrediction:
        """A closed queue in steady state: `concurrency` requests in all, each replaced when it ends.

        `prompt_tokens` and `output_tokens` are numbers, or samples. `mean_context_tokens` overrides the mean context of
        a decoding request (else prompt + E[L^2] / 2 E[L]). `prefix_cache_hit_rate` is the share of prompt tokens that
        vLLM's prefix cache (on by default) spares; None takes that of chat traffic, with the spread of what its prompts
        leave to compute, and sets the flag "prefix_hits_assumed". `speculation`: drafts that each decode verifies.
        Raises EnergyLensError for what is not positive, or no rate.
        """
        return serve(
            self, concurrency, prompt_tokens, output_tokens, mean_context_tokens, prefix_cache_hit_rate, speculation
        )

    def open_serving(
        self,
        rate_per_s: float,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        prefix_cache_hit_rate: float | None = None,
    ) -> OpenServing:
        """Requests that arrive at random, `rate_per_s` a second over the whole deployment: utilisation, power with idle
        time, and percentiles of latencies from the arrival on (see energy/queueing.py).

        Lengths and `prefix_cache_hit_rate` as for `serving`. Raises EnergyLensError for a rate that is not positive or
        that a full batch does not complete.
        """
        return serve_openly(self, rate_per_s, prompt_tokens, output_tokens, prefix_cache_hit_rate)

    def with_expert_counts(self, counts: npt.ArrayLike) -> EnergyModel:
        """The same model with the routing that was counted (see `expert_counts`). Its first step raises EnergyLensError
        if they do not suit the network."""
        deployment = replace(self.deployment, quantization=self.quantization)
        other = EnergyModel(self.cascade, deployment, self.profile, self._overlap, counts)
        return other.with_factors(self.factors)

    @property
    def async_scheduling(self) -> bool:
        """Whether vLLM schedules a step while the one before runs: as the deployment says, else as its release does."""
        given = self.deployment.async_scheduling
        return self.profile.async_scheduling if given is None else given

    @property
    def lockstep_ranks(self) -> int:
        """Data-parallel ranks that step together, with requests or without: all that share experts, else each alone."""
        return self.deployment.data_parallel_size if any(kernel.experts for kernel in self.kernels) else 1

    @property
    def servers(self) -> int:
        """What steps by itself, busy or idle: data-parallel ranks, or as many groups of them as step together."""
        return self.deployment.data_parallel_size // self.lockstep_ranks

    @property
    def expert_imbalance(self) -> float:
        """Rows of the expert-parallel rank with most over those of the mean rank, in large batches; mean over layers.
        1 is balance, or a network without experts."""
        ratios, layers = [], []
        for kernel in self.kernels:
            if kernel.experts is not None:
                chances, copies = self._routing(kernel.experts)
                ratios.append(imbalance(chances, placement(kernel.experts, chances, copies)))
                layers.append(kernel.count)
        return float(np.average(ratios, weights=layers)) if ratios else 1.0

    @property
    def idle_power_w(self) -> float:
        """Power of all GPUs of the deployment while an engine waits for requests."""
        return self.profile["power.static_w"] * self.factors.static * self.deployment.num_gpus

    # -- parts ----------------------------------------------------------------------------------------------------

    def _together(self, steps: Steps, stages: Evaluated) -> Predictions:
        gpu_s, host_s, waiting_s = (each.max(axis=0) for each in (stages.gpu_s, stages.host_s, stages.waiting_s))
        time_s = np.maximum(gpu_s, host_s) + stages.serial_s
        # Where the host is what bounds the step, waiting makes it no longer.
        longer_s = np.maximum(gpu_s, host_s) - np.maximum(gpu_s - waiting_s, host_s)

        def total(of_stages: Array) -> Array:
            return np.asarray((self._gpus * of_stages).sum(axis=0))

        static_w = total(stages.static_w)
        components = {name: np.zeros_like(time_s) for name in COMPONENTS}
        components |= {name: total(joules) for name, joules in stages.components.items()}
        components |= {"static": static_w * gpu_s, "host_gap": static_w * (time_s - gpu_s)}
        busy_j = sum(stages.components.values(), np.zeros_like(stages.gpu_s))
        above_static, prefill_j = total(busy_j), total(stages.prefill_share * busy_j)
        energy_j = above_static + components["static"] + components["host_gap"]
        share = np.divide(prefill_j, above_static, out=np.zeros_like(energy_j), where=above_static > 0)
        share = np.minimum(share, 1.0)  # by rounding it may exceed 1, and then decode would be negative
        # Static power is shared as the rest is: a step in which prefill did most of the work is mostly prefill's.
        prefill = np.where(steps.decode_tokens > 0, share, 1.0) * energy_j
        communication_s = stages.communication_s.max(axis=0)
        communicating = self._less_sure * communication_s / np.maximum(time_s, 1e-12)
        relative_s, relative_j = self._uncertainty.relative(steps, communicating)
        return Predictions(
            time_s=time_s,
            gpu_s=gpu_s + stages.serial_s,
            host_s=host_s + stages.serial_s,
            energy_j=energy_j,
            components=components,
            phases={"prefill": prefill, "decode": energy_j - prefill},
            low_s=time_s / (1 + relative_s),
            high_s=time_s * (1 + relative_s),
            low_j=energy_j / (1 + relative_j),
            high_j=energy_j * (1 + relative_j),
            clock=stages.clock.min(axis=0),
            communication_s=communication_s,
            waiting_s=waiting_s,
            waste_j=static_w * longer_s,
            padding_j=total(stages.padding_j),
            flags=self.flags,
        )

    def _loads(self, kernel: Kernel, tokens: Array) -> RankLoads:
        """Loads of a rank's experts when each rank that has tokens of its own has `tokens`."""
        shape = kernel.experts
        assert shape is not None
        form = kernel_format(format_of(self.quantization), kernel)
        small_tiles = self.profile.small_expert_tiles
        if self._expert_counts is None:
            table = _load_table(
                shape, form, small_tiles, self.deployment.expert_routing, self._copies, self.cascade.expert_layers
            )
        elif (shape, form) in self._counted:
            table = self._counted[shape, form]
        else:
            table = self._counted[shape, form] = _table(shape, form, small_tiles, *self._routing(shape), every=5)
        return table(tokens * self.deployment.prefill_context_parallel_size * self.deployment.data_parallel_size)

    @property
    def _copies(self) -> int | None:
        return self.deployment.num_redundant_experts if self.deployment.enable_eplb else None

    def _routing(self, shape: ExpertShape) -> tuple[Routing, int | None]:
        """How tokens choose experts, and redundant experts (see `placement`)."""
        experts, counts = shape.total - (self._copies or 0), self._expert_counts
        if counts is None:
            spec = self.deployment.expert_routing
            return Routing.parse(spec, experts, shape.selected, self.cascade.expert_layers), self._copies
        return Routing.counted(counts, experts, shape.selected, self.cascade.expert_layers), self._copies

    def _gpu_step(self, overlap: Overlap | DualBatch | None, *arguments: Any) -> GpuStep:
        if overlap is None:
            return GpuStep(*arguments)
        if isinstance(overlap, Overlap):
            return StagedStep(overlap, self._collectives, self._exchanges, *arguments)
        return DualBatchStep(overlap, self._collectives, self._exchanges, *arguments)

    def _exchange(self, kernel: Kernel, message_bytes: Array) -> Exchanged:
        if (timed := self._exchanges.timed(kernel, message_bytes)) is not None:
            return Exchanged(timed.time_s, self._collectives.energy_j(timed).energy_j)
        time_s, energy_j = self._collectives.kernel(kernel, message_bytes)
        return Exchanged(time_s, energy_j)


def _each(predictions: Predictions, made: Callable[[Array], Array]) -> Predictions:
    """The same with other arrays, each made of its own."""

    def change(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: made(values) for name, values in value.items()}
        return made(value) if isinstance(value, np.ndarray) else value

    return Predictions(*(change(getattr(predictions, name)) for name in Predictions.__slots__))


def _arrays(predictions: Predictions) -> Iterator[Array]:
    """Those that `_each` changes, in its order."""
    for name in Predictions.__slots__:
        value = getattr(predictions, name)
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, np.ndarray):
            yield value


@cache
def _load_table(
    shape: ExpertShape, form: str, small_tiles: bool, routing: str, copies: int | None, layers: int
) -> LoadTable:
    chances = Routing.parse(routing, shape.total - (copies or 0), shape.selected, layers)
    return _table(shape, form, small_tiles, chances, copies)


def _table(
    shape: ExpertShape, form: str, small_tiles: bool, chances: Routing, copies: int | None, every: int = 1
) -> LoadTable:
    return LoadTable.build(
        chances,
        placement(shape, chances, copies),
        lambda tokens: expert_tile_rows(small_tiles, form, tokens, shape.local),
        every=every,
    )


def placement(shape: ExpertShape, chances: Routing, copies: int | None) -> Placement:
    """Experts on ranks. `copies`: redundant ones of a balanced placement, which `shape.total` has; None: in order."""
    ranks = round(shape.total / shape.local)
    return Placement.linear(shape.total, ranks) if copies is None else Placement.balanced(chances, ranks, copies)


def _cascade(
    config: Mapping[str, object] | str | os.PathLike[str] | Cascade, deployment: Deployment
) -> tuple[Cascade, str | None]:
    """The cascade, and the quantization: the deployment's, or else what the config says."""
    if isinstance(config, Cascade):
        return config, deployment.quantization
    if is_cascade(config):
        return load_cascade(Path(config)), deployment.quantization
    loaded = load_config(config if isinstance(config, Mapping) else os.fspath(config))
    return build(loaded), deployment.quantization or quantization_of(loaded)
