"""Learning on recorded runs, as if they were live, with profiles that are off by 20 %.

    python benchmarks/learn_recorded.py

Of the recordings in tests/data the part with mixed load (Poisson arrivals, closed queues) is repeated for 5 minutes and
sent through meter, prediction, pairing and learning in the time in which it was recorded. "Profile": wMAPE over windows
of 5 s from the fourth minute on, of the profile alone; "learnt": the same of what was predicted live at that time, with
what had been learnt until then. "Inside": windows whose measured energy was inside the 90 % interval.

A second table learns on what is not repeated: the steady windows of an H200's recording, decodes and prefills of one
size each, and then predicts mixed load that it has not seen. A third is as the first for two H100s, with tensor and
expert parallelism; there the whole recordings are repeated, whose mixed load is short, and of what both GPUs drew
together, which is what was recorded, each is taken to have half.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.calibrate.live import joined, live, read, readings_of, wmape
from energylens_vllm.hardware import load_profile
from energylens_vllm.hardware.profile import Coefficient, GpuProfile
from energylens_vllm.meter import Reading
from energylens_vllm.serving.pairing import Window

DATA = pathlib.Path(__file__).parents[1] / "tests" / "data"
#: (recording, model, GPU)
RUNS = (
    ("h200_vllm/llama8b", "llama-3.1-8b", "H200-SXM"),
    ("h200_vllm/qwen30b", "qwen3-30b-a3b", "H200-SXM"),
    ("h100_vllm/llama8b", "llama-3.1-8b", "H100-SXM"),
    ("h100_vllm/qwen30b", "qwen3-30b-a3b", "H100-SXM"),
)
TWO_GPUS = (
    ("llama8b-tp2", "llama-3.1-8b", False),
    ("qwen32b-tp2", "qwen3-32b", False),
    ("qwen30b-tp2", "qwen3-30b-a3b", False),
    ("qwen30b-ep2", "qwen3-30b-a3b", True),
)
RELEASE = "0.25.1"  #: of vLLM, that ran them
#: How a profile may be off: factors on groups of its coefficients.
OFF: Mapping[str, Mapping[str, float]] = {
    "as shipped": {},
    "all +20 %": dict(static=1.2, memory=1.2, compute=1.2),
    "all -20 %": dict(static=0.8, memory=0.8, compute=0.8),
    "static -20 %": dict(static=0.8),
    "bytes +20 %, arithmetic -20 %": dict(memory=1.2, compute=0.8),
    "bytes -20 %, arithmetic +20 %": dict(memory=0.8, compute=1.2),
    "speed -20 %": dict(speed=0.8),
    "all +20 %, speed +20 %": dict(static=1.2, memory=1.2, compute=1.2, speed=1.2),
}
REPEATED_S, LEARNING_S = 300.0, 180.0


def group(name: str) -> str | None:
    """Which group a coefficient of a profile is in; None for those that are left alone."""
    if name in ("power.static_w", "power.floor_w"):
        return "static"
    if name == "energy.memory_j_per_byte":
        return "memory"
    if name.startswith("energy.") and name.endswith(".j_per_flop"):
        return "compute"
    return "speed" if name.endswith((".memory_efficiency", ".compute_efficiency")) else None


def off(profile: GpuProfile, factors: Mapping[str, float]) -> GpuProfile:
    """A profile that is wrong by these factors, for all releases of vLLM."""

    def wrong(coefficients: Mapping[str, Coefficient]) -> dict[str, Coefficient]:
        return {
            name: replace(c, value=c.value * factors.get(group(name) or "", 1.0)) for name, c in coefficients.items()
        }

    by_release = {release: wrong(given) for release, given in profile.by_release.items()}
    return replace(profile, coefficients=wrong(profile.coefficients), by_release=by_release)


def inside(windows: Sequence[Window]) -> float:
    """Share of windows whose measured energy is in the interval."""
    return sum(window.low_j <= window.measured_j <= window.high_j for window in windows) / len(windows)


def half_width(windows: Sequence[Window]) -> float:
    """Mean half-width of the intervals."""
    return sum(window.high_j / window.predicted_j - 1.0 for window in windows) / len(windows)


def learnt_factors(estimates: Mapping[str, tuple[float, float]]) -> str:
    """As a table shows them."""
    return ", ".join(f"{name} {factor:.2f}" for name, (factor, _) in estimates.items() if name != "communication")


def repeated() -> Iterator[str]:
    """Rows of the first table."""
    for recording, config, gpu in RUNS:
        run = read(DATA / f"{recording}_steps.npz", lambda phase: phase.startswith(("mix", "closed")))
        run = joined([run] * (1 + int(REPEATED_S // run.duration_s)))
        steps, readings = run.steps, readings_of(run)
        for name, factors in OFF.items():
            model = EnergyModel(config, Deployment(gpu=gpu, vllm_release=RELEASE), off(load_profile(gpu), factors))
            lived = live(steps, readings, model)
            assert lived.learner is not None
            after = [w for w in lived.windows if w.start_s - readings[0].start_s >= LEARNING_S]
            yield (
                f"| {gpu} | {config} | {name} | {wmape(after, corrected=False):.1%} | {wmape(after):.1%} "
                f"| {inside(after):.0%} of {len(after)} | {half_width(after):.1%} "
                f"| {learnt_factors(lived.learner.estimates())} |"
            )


def unseen() -> Iterator[str]:
    """Rows of the second."""
    for recording, config, gpu in RUNS[:2]:
        run = read(DATA / f"{recording}_steps.npz")
        mixed = read(DATA / f"{recording}_steps.npz", lambda phase: phase.startswith("mix"))
        for name, factors in OFF.items():
            model = EnergyModel(config, Deployment(gpu=gpu, vllm_release=RELEASE), off(load_profile(gpu), factors))
            windows = live(run.steps, readings_of(run), model).windows
            after = [window for window in windows if window.start_s >= mixed.counter[0, 0]]
            yield (
                f"| {gpu} | {config} | {name} | {len(windows) - len(after)} | {wmape(after, corrected=False):.1%} "
                f"| {wmape(after):.1%} | {inside(after):.0%} of {len(after)} |"
            )


def on_two_gpus() -> Iterator[str]:
    """Rows of the third."""
    for recording, config, experts in TWO_GPUS:
        run = read(DATA / f"h100_vllm/{recording}_steps.npz")
        run = joined([run] * (1 + int(REPEATED_S // run.duration_s)))
        readings = [half for reading in readings_of(run) for half in halves(reading)]
        for name, factors in OFF.items():
            deployment = Deployment(
                gpu="H100-SXM", tensor_parallel_size=2, enable_expert_parallel=experts, vllm_release=RELEASE
            )
            model = EnergyModel(config, deployment, off(load_profile("H100-SXM"), factors))
            windows = live(run.steps, readings, model).windows
            after = [window for window in windows if window.start_s - readings[0].start_s >= LEARNING_S]
            yield (
                f"| {recording} | {name} | {wmape(after, corrected=False):.1%} | {wmape(after):.1%} "
                f"| {inside(after):.0%} of {len(after)} | {half_width(after):.1%} |"
            )


def halves(reading: Reading) -> tuple[Reading, Reading]:
    """Readings of two GPUs that draw the same."""
    integrated_j = None if reading.integrated_j is None else reading.integrated_j / 2
    half = replace(reading, energy_j=reading.energy_j / 2, integrated_j=integrated_j)
    return half, replace(half, gpu="1")


def main() -> None:
    print("| GPU | model | profile is off | profile | learnt | inside | interval +- | factors at the end |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in repeated():
        print(row, flush=True)
    print()
    print("| GPU | model | profile is off | windows before | profile | learnt | inside |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in unseen():
        print(row, flush=True)
    print()
    print("| on two H100s | profile is off | profile | learnt | inside | interval +- |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in on_two_gpus():
        print(row, flush=True)


if __name__ == "__main__":
    main()
