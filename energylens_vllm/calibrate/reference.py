"""How much longer a kernel takes in vLLM's steps than alone, from the GPU on which both were measured.

A kernel that repeats alone finds its instructions and descriptors in caches, follows its like, and waits for nothing
that wrote its input just before: how much is in docs/calibrate.md. The shipped
profile of that GPU is fitted on whole steps, and `hardware/kernels` has its points; their ratio is taken to hold on
other GPUs, so that what is fitted on points predicts steps.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import energylens_vllm.hardware
from energylens_vllm.calibrate.points import Point, expected, points
from energylens_vllm.hardware import load_profile

GPU = "H100-SXM"


def slower_in_steps(point: Point) -> float:
    """Seconds of a point's kernel in a step over those alone; 1 where that is not known."""
    return _ratios().get(point.name, 1.0)


@cache
def _ratios() -> dict[str, float]:
    path = Path(energylens_vllm.hardware.__file__).parent / "kernels" / f"{GPU}.json"
    alone = json.loads(path.read_text())
    profile = load_profile(GPU).at_release(alone["vllm_release"])
    return {
        point.name: expected(point, profile, seen["clock"]).time_s / seen["time_s"]
        for point in points()
        if (seen := alone["points"].get(point.name)) is not None
    }
