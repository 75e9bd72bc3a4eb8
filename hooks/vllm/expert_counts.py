"""Count in vLLM's workers how often tokens select each expert, with the setting `learn_expert_routing`.

vLLM's routers have a slot for a function that is shown the experts of each token, before they are mapped to copies
(`BaseRouter.set_capture_fn`); vLLM's own `RoutedExpertsCapturer` is what fills it to return experts to clients, and
keeps them in a buffer on the device, a layer's with one copy that CUDA graphs take in. So the same is used here, and
after each step two small kernels, outside of the graph, add the buffer's rows of real tokens up. A thread reads the
table on a stream of its own, each few seconds.

Nothing is counted, and a warning says why, where the slot is taken (`--enable-return-routed-experts`), where a kernel
selects experts by itself, and where tokens of a step are not in the buffer in order: two halves of a batch
(`--enable-dbo`), sequence-parallel experts, context parallelism.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np

from energylens_vllm.serving.expert_counts import Counts, Integers, folder, publish

logger = logging.getLogger("energylens_vllm")

PUBLISH_S = 5.0  #: how often a busy worker publishes its counts
CHUNK = 1024  #: tokens that are added up at a time: bounds the memory for it


def install(gpu_worker: ModuleType) -> None:
    """Have a worker count from when its model is loaded, if the settings say so."""
    original = getattr(getattr(gpu_worker, "Worker", None), "load_model", None)
    if original is None:  # in a release to come; for what is off by default no engine shall fail
        logger.info("energylens cannot learn how tokens choose experts in this release of vLLM")
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            _count(self)
        except Exception as error:
            logger.warning("energylens does not learn how tokens choose experts: %s", error)
        return result

    gpu_worker.Worker.load_model = load_model


def _count(worker: Any) -> None:
    from energylens_vllm.hooks.vllm import log
    from energylens_vllm.serving import settings

    config = worker.vllm_config
    chosen = settings.load(config.additional_config)
    if not (chosen.enabled and chosen.learn_expert_routing):
        return
    log.follow_vllm()
    from vllm.distributed.parallel_state import get_tp_group

    model = worker.model_runner.get_model()
    layers = _expert_layers(model)
    if not layers:
        return  # another pipeline stage may have some
    if problem := _obstacle(config):
        raise RuntimeError(problem)
    if not get_tp_group().is_first_rank:  # tensor-parallel ranks see the same tokens
        return
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

    capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
    tap = _Tap(capturer)
    _bind(model, layers, tap)
    counter = Counter(capturer.device_buffer, config.model_config.get_num_experts())
    publisher = Publisher(counter, [layer.layer_id for layer in layers], worker)
    original = worker.execute_model

    @functools.wraps(original)
    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(scheduler_output, *args, **kwargs)
        if not tap.failed and scheduler_output.total_num_scheduled_tokens:
            try:
                counter.add(scheduler_output.total_num_scheduled_tokens)
                publisher.begin()
            except Exception:
                tap.fail()
        return output

    worker.execute_model = execute_model
    logger.info("energylens counts how tokens choose experts in %d layers", len(layers))


def _obstacle(config: Any) -> str | None:
    """Why counting is not possible, None if it is."""
    model, parallel = config.model_config, config.parallel_config
    returns = getattr(model, "enable_return_routed_experts", False) or getattr(
        getattr(config, "aux_output_config", None), "enable_return_routed_experts", False
    )
    if returns:
        return "vLLM returns them to clients (--enable-return-routed-experts), and there is one place to look at them"
    if parallel.use_ubatching:
        return "steps run in parts (--enable-dbo)"
    if parallel.use_sequence_parallel_moe:
        return "tensor-parallel ranks see different tokens (sequence-parallel experts)"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        return "context parallelism is not supported"
    return None


def _expert_layers(model: Any) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    return sorted(
        (module for module in model.modules() if isinstance(module, MoERunner)), key=lambda layer: layer.layer_id
    )


def _bind(model: Any, layers: list[Any], tap: _Tap) -> None:
    """Have each layer show its tokens' experts to `tap`. Raises if one of them does not."""
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer
    except ImportError:  # vLLM 0.25: the same as a method of its model runner
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

        for layer in layers:
            if layer._quant_method.is_monolithic or not isinstance(layer.router, BaseRouter):
                raise RuntimeError("the kernel of the experts selects them by itself") from None
        for layer in layers:
            layer.router.set_capture_fn(functools.partial(tap.capture, layer.layer_id))
    else:
        bind_routed_experts_capturer(model, tap)


class _Tap:
    """vLLM's capturer, from which no failure gets into the forward pass."""

    def __init__(self, capturer: Any) -> None:
        self._capturer = capturer
        self.failed = False

    def capture(self, layer_id: int, topk_ids: Any) -> None:
        if not self.failed:
            try:
                self._capturer.capture(layer_id, topk_ids)
            except Exception:
                self.fail()

    def fail(self) -> None:
        self.failed = True
        logger.exception("energylens no longer learns how tokens choose experts; serving goes on")


class Counter:
    """Adds up the experts in a buffer of shape (tokens, layers, selected)."""

    def __init__(self, buffer: Any, experts: int) -> None:
        import torch

        self._buffer = buffer
        self.device, self.experts = buffer.device, experts
        _, self._layers, self.selected = buffer.shape
        # Each layer has a place in front for ids below 0, and one behind for those that are no routed expert's.
        width = experts + 2
        self._first = torch.arange(self._layers, device=self.device).view(1, -1, 1) * width + 1
        self._index = torch.empty((CHUNK, self._layers, self.selected), dtype=torch.int64, device=self.device)
        self._one = torch.ones(1, dtype=torch.int64, device=self.device)
        self.counts = torch.zeros(self._layers * width, dtype=torch.int64, device=self.device)
        self.steps = 0

    def add(self, tokens: int) -> None:
        """Count the first `tokens` rows of the buffer, on the current stream."""
        import torch

        with torch.inference_mode():
            for start in range(0, tokens, CHUNK):
                ids = self._buffer[start : min(start + CHUNK, tokens)]
                index = self._index[: len(ids)]
                index.copy_(ids).clamp_(-1, self.experts).add_(self._first)
                self.counts.scatter_add_(0, index.view(-1), self._one.expand(index.numel()))
        self.steps += 1

    def table(self) -> Integers:
        """The counts so far, of shape (layers, experts). Another thread may go on adding."""
        host = self.counts.cpu() if self.device.type != "cpu" else self.counts.clone()
        whole: Integers = host.numpy().reshape(self._layers, self.experts + 2)
        return whole[:, 1:-1]


class Publisher(threading.Thread):
    """Publishes a worker's counts while it works. It begins with the first step: by then CUDA graphs are captured,
    during which no other thread may call CUDA."""

    def __init__(self, counter: Counter, layers: list[int], worker: Any) -> None:
        super().__init__(name="energylens-expert-counts", daemon=True)
        self._counter, self._layers = counter, np.array(layers)
        self._rank = int(worker.rank)
        config = worker.vllm_config
        self._into = folder(config.instance_id, config.parallel_config.data_parallel_index)
        self._begun = False

    def begin(self) -> None:
        """Start, unless it has been."""
        if not self._begun:
            self._begun = True
            self.start()

    def run(self) -> None:
        """Publish until the process ends."""
        published = 0
        try:
            while True:
                if (steps := self._counter.steps) != published:
                    self._publish()
                    published = steps
                time.sleep(PUBLISH_S)
        except Exception:
            logger.exception("energylens no longer learns how tokens choose experts; serving goes on")

    def _publish(self) -> None:
        import torch

        counter = self._counter
        if counter.device.type == "cuda":
            with torch.cuda.device(counter.device), torch.cuda.stream(torch.cuda.Stream(counter.device)):
                table = counter.table()
        else:
            table = counter.table()
        publish(self._into, self._rank, Counts(self._layers, table[self._layers], counter.selected))
