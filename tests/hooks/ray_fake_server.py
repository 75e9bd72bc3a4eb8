"""Ray's LLM server over `fake_executor`: real vLLM but for the executor, which no configuration of Ray may choose."""

from __future__ import annotations

from typing import Any

from fake_executor import FakeExecutor
from vllm.v1.executor.abstract import Executor

from energylens_vllm.hooks.ray.server import EnergyServer


class FakeEngineServer(EnergyServer):
    async def start(self) -> None:
        Executor.get_class = staticmethod(_fake)  # type: ignore[method-assign, assignment]
        await super().start()


def _fake(vllm_config: Any) -> type[Executor]:
    return FakeExecutor
