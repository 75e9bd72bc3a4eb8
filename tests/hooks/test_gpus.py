"""Which GPUs are an engine's, and that nothing about them keeps vLLM from starting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.hooks.vllm import gpus, start
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.settings import Settings

pytestmark = pytest.mark.vllm


def config(**parallel: Any) -> Any:
    """Of one engine on one host, but for `parallel`."""
    plain = dict(
        distributed_executor_backend="mp",
        data_parallel_backend="mp",
        data_parallel_rank_local=None,
        data_parallel_index=0,
        world_size=1,
        local_world_size=1,
        nnodes_within_dp=1,
        assigned_physical_gpu_ids=None,
    )
    return SimpleNamespace(parallel_config=SimpleNamespace(**plain | parallel))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA GPUs, as far as vLLM can tell."""
    monkeypatch.setattr("vllm.platforms._current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")


@pytest.mark.parametrize(
    ("parallel", "chosen"),
    [
        ({}, ("4,5,6,7", 0, 1)),
        ({"world_size": 2, "local_world_size": 2}, ("4,5,6,7", 0, 2)),
        ({"data_parallel_rank_local": 1, "world_size": 2, "local_world_size": 2}, ("4,5,6,7", 2, 2)),
        ({"data_parallel_index": 3}, ("4,5,6,7", 3, 1)),
        ({"data_parallel_index": 3, "data_parallel_rank_local": 1}, ("4,5,6,7", 1, 1)),
        ({"world_size": 8, "local_world_size": 4, "nnodes_within_dp": 2, "data_parallel_index": 1}, ("4,5,6,7", 0, 4)),
        ({"assigned_physical_gpu_ids": [2, 3]}, ("2,3", 0, 1)),
    ],
)
def test_the_gpus_that_the_workers_take(cuda: None, parallel: dict[str, Any], chosen: tuple[str, int, int]) -> None:
    found = gpus.gpus_of(config(**parallel))
    assert found is not None
    backend, count = found
    assert (backend._visible, backend._first, backend._count) == chosen
    assert count == chosen[2]


@pytest.mark.parametrize(
    "parallel", [{"distributed_executor_backend": "ray"}, {"data_parallel_backend": "ray"}], ids=["workers", "ranks"]
)
def test_with_ray_they_may_be_anywhere(cuda: None, parallel: dict[str, Any]) -> None:
    assert gpus.gpus_of(config(**parallel)) is None


def test_on_a_cpu_there_are_none() -> None:
    assert gpus.gpus_of(config()) is None


@pytest.fixture
def no_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that nobody asks for a recording: that needs more of vLLM's configuration than there is here."""
    monkeypatch.setattr(start, "describe", lambda vllm_config: SimpleNamespace(config={}, deployment={}))
    monkeypatch.setattr(start, "record", lambda *args: None)


@pytest.mark.usefixtures("no_recordings")
def test_what_fails_about_them_is_counted_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "gpus_of", lambda vllm_config: 1 / 0)
    observer = StepObserver(lambda work: work, None)
    start._listen(observer, config(), Settings())
    assert observer.guard.failures == {"start": 1}
    start._listen(observer, config(), Settings(meter=False))
    assert observer.guard.failures == {"start": 1}


@pytest.mark.usefixtures("no_recordings")
@pytest.mark.parametrize("required", [False, True])
def test_accounts_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    """Stop vLLM if the plugin was asked for by name, and are counted if not."""

    def cannot(*args: Any) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(start, "attribute", cannot)
    monkeypatch.setattr(start.status, "is_required", lambda: required)
    observer = StepObserver(lambda work: work, None)
    if required:
        with pytest.raises(OSError, match="on purpose"):
            start._listen(observer, config(), Settings(meter=False))
    else:
        start._listen(observer, config(), Settings(meter=False))
        assert observer.guard.failures == {"start": 1}
