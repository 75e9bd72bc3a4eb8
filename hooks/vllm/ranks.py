"""Steers requests among the data-parallel ranks of one vLLM (setting `steer_ranks`), in its API servers.

vLLM's own balancing takes the rank with the fewest requests. Here the rank is chosen by the energy that the request
adds, and given to vLLM as if the request had asked for it (`X-data-parallel-rank`). A request that did ask keeps its
rank. Whenever there is no choice, also after any error of ours, vLLM's own balancing decides.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing.decisions import Decisions
from energylens_vllm.routing.ranks import Load, Ranks
from energylens_vllm.serving import settings
from energylens_vllm.serving.increments import Report, added
from energylens_vllm.serving.metrics import MEASURED_TIME, PREDICTED_TIME

logger = logging.getLogger("energylens_vllm")

LOCKSTEP = (
    "steer_ranks: the ranks of a model with experts run in lockstep, an idle one would save nothing; accepted: false"
)
#: the clients of this process that are steered: the stat logger tells them what it hears
_steered: weakref.WeakSet[Steering] = weakref.WeakSet()


class Steering:
    """Of one client of the engines."""

    def __init__(self, client: Any, chosen: settings.Settings) -> None:
        self._decisions = Decisions()
        self._count = len(client.core_engines)
        self._failed = False
        self._ranks: Future[Ranks] = _pool.submit(_make, client.vllm_config, chosen, self._count, self._decisions)

    def choose(self, client: Any, request: Any) -> int | None:
        """The rank for a request that has none yet; None if vLLM should decide."""
        try:
            if not self._ranks.done():
                self._decisions.fell_back("no_model")
                return None
            loads = _loads(client)
            if len(loads) != self._count:  # the deployment is being scaled
                self._decisions.fell_back("unsupported")
                return None
            parameters = request.sampling_params
            if parameters is None:  # pooling: no output, and vLLM may have a rank in mind
                self._decisions.fell_back("unsupported")
                return None
            return self._ranks.result().choose(loads, request.prompt_token_ids, parameters.max_tokens)
        except Exception as error:
            self._decisions.fell_back("error")
            if not self._failed:
                self._failed = True
                told = str(error) if isinstance(error, EnergyLensError) else type(error).__name__
                logger.warning("energylens does not steer ranks, vLLM balances them: %s", told)
            return None

    def heard(self, rank: int, reports: Sequence[Report], finished: Sequence[Any]) -> None:
        """What a rank has reported, and the requests that have ended there."""
        if not self._ranks.done() or self._ranks.exception() is not None:
            return
        ranks = self._ranks.result()
        for request in finished:
            ranks.ended(request.num_prompt_tokens, request.num_generation_tokens)
        if rank < self._count:
            ranks.timed(rank, added(reports, PREDICTED_TIME), added(reports, MEASURED_TIME))


def install(core_client: ModuleType) -> None:
    """Have clients that balance ranks ask us first, where the settings say so."""
    cls = getattr(core_client, "DPLBAsyncMPClient", None)
    if cls is None:  # a release without internal balancing
        return
    original_init, original_choice = cls.__init__, cls.get_core_engine_for_request

    @functools.wraps(original_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        self.energylens_steering = _steering_of(self)

    @functools.wraps(original_choice)
    def get_core_engine_for_request(self: Any, request: Any) -> Any:
        steering = getattr(self, "energylens_steering", None)
        if (
            steering is None
            or request.data_parallel_rank is not None
            or request.request_id in self.reqs_in_flight  # a session stays where it is
        ):
            return original_choice(self, request)
        request.data_parallel_rank = steering.choose(self, request)
        try:
            return original_choice(self, request)
        finally:
            request.data_parallel_rank = None

    cls.__init__, cls.get_core_engine_for_request = __init__, get_core_engine_for_request


def heard(rank: int, reports: Sequence[Report], iteration_stats: Any) -> None:
    """The stat logger has heard of a rank."""
    for steering in _steered:
        steering.heard(rank, reports, getattr(iteration_stats, "finished_requests", None) or ())


def is_lockstep(vllm_config: Any) -> bool:
    """Whether the ranks are those of a model with experts, which wait for each other in each step."""
    return bool(vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe)


def _steering_of(client: Any) -> Steering | None:
    try:
        chosen = settings.load(client.vllm_config.additional_config)
        if not (chosen.enabled and chosen.steer_ranks):
            return None
        if is_lockstep(client.vllm_config):
            raise EnergyLensError(LOCKSTEP)
        steering = Steering(client, chosen)
        _steered.add(steering)
        return steering
    except Exception as error:
        logger.warning("energylens does not steer ranks, vLLM balances them: %s", error)
        return None


def _make(vllm_config: Any, chosen: settings.Settings, count: int, decisions: Decisions) -> Ranks:
    from energylens_vllm.hooks.vllm.deployment import describe, kv_cache_tokens
    from energylens_vllm.routing import StepTable
    from energylens_vllm.serving.predictor import ModelPredictor
    from energylens_vllm.serving.start import start_predictor

    started = start_predictor(describe(vllm_config), chosen.gpu)
    if not isinstance(started.predictor, ModelPredictor):
        raise EnergyLensError(started.problem)
    # vLLM adds up the blocks of all ranks; newer releases tell the tokens of one.
    told = getattr(vllm_config.cache_config, "kv_cache_size_tokens", None)
    tokens = told or kv_cache_tokens(vllm_config) / count
    table = StepTable.compile(started.predictor.model, float(tokens))
    logger.info("energylens steers requests among %d ranks", count)
    return Ranks(table, count, chosen.ttft_target_s, chosen.tpot_target_s, decisions)


def _loads(client: Any) -> list[Load]:
    """Of the ranks, as vLLM's own balancing sees them: the coordinator's counts, no older than 100 ms, or this client's
    own requests if those are more. Each client sees its own only, so they stand for those of the others."""
    own = getattr(client, "engine_inflight", None)
    if own is None:  # before 0.32
        own = Counter(client.reqs_in_flight.values())
    loads = []
    for engine, (waiting, running, *usage) in zip(client.core_engines, client.lb_engines, strict=True):
        new = max(client.client_count * own[engine] - waiting - running, 0)
        loads.append(Load(running, waiting + new, float(usage[0]) if usage else None))
    return loads


_pool = ThreadPoolExecutor(1, "energylens-ranks")
