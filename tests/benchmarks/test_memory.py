"""benchmarks/memory.py: what memory is reckoned to hold, against what vLLM found on real GPUs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_room_for_the_cache_is_what_vllm_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fitted to these two starts; a little less than there is errs on the safe side."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    starts = list(importlib.import_module("memory").recorded())
    assert [start.name for start in starts] == ["Llama-3.1-8B, bf16", "Qwen3-30B-A3B, bf16"]
    assert all(-0.03 < start.error < 0 for start in starts)
