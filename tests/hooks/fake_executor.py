"""An executor without a model: it answers each SchedulerOutput with made-up tokens, and notes what it was given.

Everything above it is real vLLM: EngineCore, the schedulers, asynchronous scheduling, the KV-cache manager. It needs no
compiled code, so it also runs releases of which only the Python files are there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

TOKEN = 65  #: what the "model" always says
BLOCK_BYTES = 2 * 16 * 2 * 32 * 2


@dataclass
class Executed:
    """One step as the workers saw it: request -> (new tokens, tokens computed before, whether it decodes)."""

    requests: dict[str, tuple[int, int, bool]]
    num_drafts: int


class FakeExecutor(Executor):
    """Of the size FAKE_BLOCKS (KV-cache blocks), taking FAKE_STEP_S seconds a step.

    Each step is also written to a file of its engine in the folder FAKE_LOG, if that is set.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        self.executed: list[Executed] = []
        self._known: dict[str, int] = {}  # request -> tokens of it that exist, prompt and output
        self._said: dict[str, int] = {}  # request -> tokens of output among them
        self._answers: list[ModelRunnerOutput] = []
        self._drafts: DraftTokenIds | None = None
        self._gpu = ThreadPoolExecutor(1)  # steps run one after the other, beside the scheduler
        self._step_s = float(os.environ.get("FAKE_STEP_S", "0"))
        draft = self.vllm_config.speculative_config
        folder, engine = os.environ.get("FAKE_LOG"), self.vllm_config.parallel_config.data_parallel_index
        self._log = None if folder is None else Path(folder) / f"{engine}.jsonl"
        self._num_drafts = draft.num_speculative_tokens if draft else 0

    # -- start-up -------------------------------------------------------------------------------------------------

    def determine_available_memory(self) -> list[int]:
        return [int(os.environ.get("FAKE_BLOCKS", "4096")) * BLOCK_BYTES]

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [{"layer": FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return [[layout.name for layout in KVCacheLayout]]

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        pass

    def compile_or_warm_up_model(self) -> None:
        pass

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return [None]

    def get_simple_cpu_offload_num_blocks(self) -> int | None:
        return None

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_health(self) -> None:
        pass

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    # -- steps ----------------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        if not scheduler_output.total_num_scheduled_tokens:
            return _answer(lambda: EMPTY_MODEL_RUNNER_OUTPUT, non_block, self._gpu)
        self._answers.append(self._step(scheduler_output))
        return _answer(lambda: None, non_block, self._gpu)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        answer = self._answers.pop(0)

        def compute() -> ModelRunnerOutput:
            time.sleep(self._step_s)
            return answer

        return _answer(compute, non_block, self._gpu)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts, self._drafts = self._drafts, None
        return drafts

    def execute_dummy_batch(self) -> None:
        pass

    def _step(self, output: Any) -> ModelRunnerOutput:
        old = output.scheduled_cached_reqs
        computed = dict(zip(old.req_ids, old.num_computed_tokens, strict=True))
        for request in output.scheduled_new_reqs:
            computed[request.req_id] = request.num_computed_tokens
            self._known.setdefault(request.req_id, len(request.prompt_token_ids))
            self._said.setdefault(request.req_id, 0)
        drafts = {name: len(ids) for name, ids in output.scheduled_spec_decode_tokens.items()}
        requests = {}
        for name, new in output.num_scheduled_tokens.items():
            prompt = self._known[name] - self._said[name]
            # What lies behind the prompt is computed once as output, and in greater lots after a preemption.
            decodes = computed[name] >= prompt and new <= 1 + drafts.get(name, 0)
            requests[name] = (new, computed[name], decodes)
        self.executed.append(Executed(requests, sum(drafts.values())))
        if self._log is not None:
            with self._log.open("a") as log:
                print(json.dumps([list(requests.values()), sum(drafts.values())]), file=log)
        sampled = [self._sample(name, new, computed[name], drafts) for name, new in output.num_scheduled_tokens.items()]
        names = list(output.num_scheduled_tokens)
        for name in output.finished_req_ids:
            self._known.pop(name, None)
            self._said.pop(name, None)
        decoding = [name for name, tokens in zip(names, sampled, strict=True) if tokens]
        if self._num_drafts:
            self._drafts = DraftTokenIds(decoding, [[TOKEN] * self._num_drafts for _ in decoding])
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )

    def _sample(self, name: str, new: int, computed: int, drafts: dict[str, int]) -> list[int]:
        """Nothing in the middle of a prompt, else one token and half of the drafts."""
        if computed + new - drafts.get(name, 0) < self._known[name]:
            return []
        tokens = [TOKEN] * (1 + drafts.get(name, 0) // 2)
        self._known[name] += len(tokens)
        self._said[name] += len(tokens)
        return tokens


def _answer(compute: Callable[[], Any], non_block: bool, gpu: ThreadPoolExecutor) -> Any:
    if not non_block:
        return compute()
    future: Future[Any] = gpu.submit(compute)
    return future
