"""Make the GPU profiles: constants, times of single kernels, then energy and the rest from whole steps.

    python benchmarks/fit_operations.py DATA/aiconfigurator --json OPERATIONS     # once; needs pandas and pyarrow
    python benchmarks/fit_profiles.py DATA OPERATIONS                             # writes hardware/profiles/*.json
    python benchmarks/accuracy.py DATA OPERATIONS                                 # the errors, fitted and held out

Three sources, each the prior of the next: data sheets and cited constants; kernel times that fit_operations.py fitted;
measured steps. H200-SXM is fitted on recordings of vLLM 0.25.1 (RUNS). H100-SXM and B200-SXM are fitted on steady
serving runs of the ML.ENERGY Benchmark v3 (vLLM 0.11.1), DATA/mlenergy_v3/calibration.csv, which is not part of this
repository; recordings of 0.25.1 on an H100 give what its profile has for releases nearer to that. A100-SXM-80GB and
L40S have no measured steps: their energy is cited or scaled, and wide.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.architectures import build, load_config
from energylens_vllm.architectures import quantization as quantization_of
from energylens_vllm.calibrate.fit import fit, weigh_groups
from energylens_vllm.calibrate.recording import load
from energylens_vllm.calibrate.windows import measured_windows
from energylens_vllm.einsum import Cascade
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.serving import ServingPrediction
from energylens_vllm.hardware.profile import PROFILES, Coefficient, GpuProfile

RECORDINGS = pathlib.Path(__file__).parents[1] / "tests" / "data"
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
EP2 = TP2 | {"enable_expert_parallel": True}
DCP2 = TP2 | {"decode_context_parallel_size": 2}
H200, MQA = RECORDINGS / "h200_vllm", str(RECORDINGS / "h200_vllm" / "llama8b-mqa.config.json")
#: GPU -> recording -> the model and what `Deployment` needs to know, of runs of vLLM 0.25.1 with random weights.
#: In the two runs "collapsed", random weights made all tokens choose the same experts (docs/accuracy.md); they are not
#: fitted.
RUNS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "H200-SXM": {
        "llama8b": ("llama-3.1-8b", {}),
        "qwen30b": ("qwen3-30b-a3b", {}),
        "llama8b-tp2": ("llama-3.1-8b", TP2),
        "qwen32b-tp2": ("qwen3-32b", TP2),
        "qwen30b-tp2": ("qwen3-30b-a3b", TP2),
        "qwen30b-ep2": ("qwen3-30b-a3b", EP2),
        "qwen30b-uneven-tp2": ("qwen3-30b-a3b", TP2 | {"expert_routing": str(H200 / "qwen30b-uneven-tp2_counts.npy")}),
        "qwen30b-uneven-ep2": ("qwen3-30b-a3b", EP2 | {"expert_routing": str(H200 / "qwen30b-uneven-ep2_counts.npy")}),
        "llama8b-pp2": ("llama-3.1-8b", {"pipeline_parallel_size": 2}),
        "llama8b-mqa-tp2": (MQA, TP2),
        "llama8b-mqa-dcp2": (MQA, DCP2),
        "deepseek-lite-tp2": ("deepseek-v2-lite", TP2),
        "deepseek-lite-dcp2": ("deepseek-v2-lite", DCP2),
    },
    "H100-SXM": {
        "llama8b": ("llama-3.1-8b", {}),
        "qwen30b": ("qwen3-30b-a3b", {}),
        "qwen14b": ("qwen3-14b", {}),
        "llama8b-eager": ("llama-3.1-8b", {"enforce_eager": True}),
        "llama8b-fp8": ("llama-3.1-8b", {"quantization": "fp8"}),
        "qwen30b-fp8": ("qwen3-30b-a3b", {"quantization": "fp8", "expert_routing": "collapsed"}),
        "gptoss20b": ("gpt-oss-20b", {"expert_routing": "collapsed"}),
        "llama8b-steady": ("llama-3.1-8b", {}),
        "qwen32b": ("qwen3-32b", {}),
        "qwen30b-routed": ("qwen3-30b-a3b", {}),
        "qwen30b-fp8-routed": ("qwen3-30b-a3b", {"quantization": "fp8"}),
        "gptoss20b-routed": ("gpt-oss-20b", {}),
        "llama8b-tp2": ("llama-3.1-8b", TP2),
        "qwen32b-tp2": ("qwen3-32b", TP2),
        "qwen30b-tp2": ("qwen3-30b-a3b", TP2),
        "qwen30b-ep2": ("qwen3-30b-a3b", EP2),
    },
}
#: Recordings that were not made on the first GPU of their kind, and on which (tests/data/README.md).
UNITS = {
    "llama8b-steady": "second", "qwen32b": "second", "qwen30b-routed": "second", "qwen30b-fp8-routed": "second",
    "gptoss20b-routed": "third",
    "llama8b-tp2": "pair", "qwen32b-tp2": "pair", "qwen30b-tp2": "pair", "qwen30b-ep2": "pair", "llama8b-pp2": "pair",
}  # fmt: skip
#: Windows, by the beginning of their names, that say nothing of the model. Under mixed load vLLM compiled kernels for
#: new sizes all the time. What random weights generate is more alike than the tokens that were counted, and so are the
#: experts of decodes. A pipeline with one request is never full, as `EnergyModel.predict` takes it to be.
UNSCORED = {
    "qwen30b-fp8": "mix", "gptoss20b": "mix", "gptoss20b-routed": "mix", "qwen30b-uneven-tp2": "decode",
    "qwen30b-uneven-ep2": "decode", "llama8b-pp2": "decode_b1_",
}  # fmt: skip
#: Recordings that are predicted only: several GPUs by a profile of one, networks that no fit has seen, split contexts,
#: experts that were counted. Of `-pp2` one coefficient is fitted apart, which nothing else shows.
UNSEEN = {
    "H200-SXM": tuple(name for name in RUNS["H200-SXM"] if name not in ("llama8b", "qwen30b")),
    "H100-SXM": (),
}  # fmt: skip
#: Of them, those that tell how far off predictions of several H200s are, where no flag says more.
TELLING = ("llama8b-tp2", "qwen32b-tp2", "qwen30b-tp2", "qwen30b-ep2", "llama8b-mqa-tp2", "deepseek-lite-tp2")
#: Relative std of the joules of one GPU of a kind from another's. Of H100s: recorded bytes cost 8 to 9 % less on the
#: second than on the first; serving runs of one cell on two nodes took 14 % more watts on one, at 4 % less time.
UNIT_STD = 0.03

# -- what is known beforehand -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A GPU by its data sheet. `flops` are dense bf16 FLOPs at the top clock: SMs x FLOPs a clock x clock."""

    memory_bytes: float  #: as the driver reports it, which is what vLLM divides
    sm_count: int
    nvlink: bool
    flops: float
    fp8_ratio: float
    bandwidth: float
    l2_bytes: float
    limit_w: float
    idle_w: float  #: before a CUDA context
    static_w: float  #: with one, at the top clock
    source: str


SHEETS = {
    "A100-SXM-80GB": Sheet(
        85.9e9, 108, True, 108 * 2048 * 1.41e9, 1.0, 2.039e12, 40e6, 400, 55, 80,
        "NVIDIA A100 data sheet (2021); idle power by clock: GPU power studies cited in docs/profiles.md",
    ),
    "H100-SXM": Sheet(
        85.52e9, 132, True, 132 * 4096 * 1.98e9, 2.0, 3.35e12, 50e6, 700, 72, 132,
        "NVIDIA H100 data sheet (2023), 1980 MHz top clock; 131-146 W with a CUDA context measured, 72 W at 900 MHz",
    ),
    "H200-SXM": Sheet(
        150.75e9, 132, True, 132 * 4096 * 1.98e9, 2.0, 4.8e12, 50e6, 700, 78, 122,
        "NVIDIA H200 data sheet (2024), 1980 MHz top clock; idle power measured: 78 W, 122 W with a CUDA context",
    ),
    "B200-SXM": Sheet(
        192.27e9, 148, True, 148 * 8192 * 1.965e9, 2.0, 8.0e12, 126e6, 1000, 140, 238,
        "NVIDIA B200 data sheet (2025), 1965 MHz top clock; static power from power-law fits of serving runs",
    ),
    "L40S": Sheet(
        48.31e9, 142, False, 142 * 1024 * 2.52e9, 2.0, 0.864e12, 96e6, 350, 35, 80,
        "NVIDIA L40S data sheet (2023); idle power: judgement, +-30 %",
    ),
}  # fmt: skip

#: name -> (value, relative std, unit, source) of what no table and no data sheet gives; fits start from these.
GUESSES = {
    "power.voltage_floor": (0.45, 0.3, "1", "voltage at the lowest clock over that at the top: fitted on the H200"),
    "power.limit_share": (0.985, 0.01, "1", "mean power of power-limited windows over the limit, H200 and H100"),
    "energy.memory_j_per_byte": (118e-12, 0.15, "J/B", "HBM3e read through to the SMs: 103-123 pJ/B, measured"),
    "energy.memory_core_share": (0.4, 0.4, "1", "share of a byte's energy spent on the GPU die, which follows V^2"),
    "energy.bfloat16.j_per_flop": (1.1e-12, 0.25, "J/FLOP", "0.4-1.1 pJ at power-limited clocks, at the top clock"),
    "energy.attention.j_per_flop": (0.9e-12, 0.4, "J/FLOP", "as bf16; P and V in registers"),
    "experts.padding_energy_share": (0.1, 0.7, "1", "energy of an empty row of a tile over that of a full one"),
    "attention.decode.tile_rows": (50.0, 0.3, "rows", "rows that a decode tile spends energy on"),
    "host.step_s": (1e-3, 0.5, "s", "host time of an empty step; hidden behind longer steps"),
    "host.sequence_s": (30e-6, 0.5, "s", "host time of a decoding request"),
    "host.prompt_s": (0.4e-3, 0.5, "s", "host time of a request in prefill: input preparation, sampling, output"),
    "host.launch_s": (48e-6, 0.5, "s", "host time to launch a kernel outside CUDA graphs"),
    "host.engine_share": (0.7, 0.3, "1", "of a step's and its requests' time, the engine's: the rest is the worker's"),
    "host.pipeline_s": (3e-3, 0.5, "s", "of a pipeline stage's worker, a step: 3.3 ms at the least on two H200s"),
    "host.attention_s": (0.2e-3, 0.5, "s", "host time of an attention call outside full CUDA graphs"),
    "host.experts_s": (0.48e-3, 0.5, "s", "host time of an expert GEMM outside CUDA graphs"),
    "host.serial_s": (1e-3, 0.5, "s", "host time between steps without asynchronous scheduling"),
    "host.serial_request_s": (15e-6, 0.5, "s", "of it, for each request"),
}
#: energy of a FLOP in a format over that in bf16: multiplier width, and what accumulation and operands cost besides.
FORMAT_ENERGY = {"fp8": 0.55, "fp8_block": 0.6, "int8_wo": 1.0, "int4_wo": 1.0, "mxfp4": 1.0}
STD = {
    "time.uncalibrated_gpu": 0.08, "energy.uncalibrated_gpu": 0.15,
    "time.uncalibrated_format": 0.06, "energy.uncalibrated_format": 0.08,
    "time.extrapolated": 0.10, "energy.extrapolated": 0.10,
    "time.eager_host": 0.1, "energy.eager_host": 0.1,
    "time.data_parallel_assumed_even": 0.05, "energy.data_parallel_assumed_even": 0.05,
}  # fmt: skip


for _kind in ("dense", "experts"):  # until held-out errors take their place
    for _phase in ("decode", "prefill"):
        STD |= {f"time.{_kind}.{_phase}": 0.05, f"energy.{_kind}.{_phase}": 0.05}


def _unthrottle(tables: dict[str, Any], hopper: dict[str, Any]) -> None:
    """The H200's tables of experts were taken at the power limit (docs/profiles.md), the H100's were not; their SMs and
    their kernels are the same, so the H100's share of the top clock's peak is the H200's too."""
    name = "experts.{}.compute_efficiency"
    ratio = hopper[name.format("bfloat16")]["value"] / tables[name.format("bfloat16")]["value"]
    for form in ("bfloat16", "fp8", "fp8_block"):
        given = tables[name.format(form)]
        given["value"] *= ratio
        given["source"] += f"; times {ratio:.2f}, as bf16 on the H100, whose table was not taken at the power limit"


def prior(gpu: str, operations: pathlib.Path) -> GpuProfile:
    """What is known of a GPU before any step was measured on it."""
    sheet = SHEETS[gpu]
    coefficients = {name: Coefficient(value, std, unit, source) for name, (value, std, unit, source) in GUESSES.items()}
    for name, value, std, unit in (
        ("memory.bandwidth_bytes_per_s", sheet.bandwidth, 0.0, "B/s"),
        ("memory.l2_bytes", sheet.l2_bytes * 0.7, 0.3, "B"),
        ("compute.bfloat16.peak_flops", sheet.flops, 0.0, "FLOP/s"),
        ("power.limit_w", sheet.limit_w, 0.0, "W"),
        ("power.static_w", sheet.static_w, 0.05, "W"),
        ("power.floor_w", sheet.idle_w, 0.1, "W"),
    ):
        coefficients[name] = Coefficient(value, std, unit, sheet.source)
    bf16 = coefficients["energy.bfloat16.j_per_flop"]
    for form, share in FORMAT_ENERGY.items():
        peak = sheet.flops * (sheet.fp8_ratio if form.startswith("fp8") else 1.0)
        coefficients[f"compute.{form}.peak_flops"] = Coefficient(peak, 0.0, "FLOP/s", sheet.source)
        coefficients[f"energy.{form}.j_per_flop"] = Coefficient(
            bf16.value * share, 0.3, "J/FLOP", f"{share} of bf16: judgement, from the operands' width"
        )
    tables = json.loads((operations / f"{gpu}.json").read_text())
    if gpu == "H200-SXM":
        _unthrottle(tables, json.loads((operations / "H100-SXM.json").read_text()))
    for name, given in tables.items():
        coefficients[name] = Coefficient(given["value"], given["std"], given["unit"], given["source"])
    return GpuProfile(
        name=gpu, memory_bytes=sheet.memory_bytes, sm_count=sheet.sm_count, nvlink=sheet.nvlink, calibrated=False,
        coefficients=coefficients, calibrated_formats=(), std=dict(STD),
    )  # fmt: skip


@cache
def cascade(model: str) -> Cascade:
    """Of a known model, built once: a fit makes thousands of `EnergyModel`s."""
    return build(load_config(model))


# -- steps recorded on the H200 -----------------------------------------------------------------------------------

#: Coefficients that recorded steps may move, with the relative std of their prior: kernels that run back to back in
#: CUDA graphs differ a little from replays of one, and energy is measured here first.
FREE = {
    "linear.bfloat16.memory_efficiency": 0.05, "linear.bfloat16.compute_efficiency": 0.05,
    "linear.bfloat16.corner": 0.2, "linear.bfloat16.launch_s": 0.2,
    "elementwise.launch_s": 0.5, "elementwise.memory_efficiency": 0.3,
    "attention.decode.memory_efficiency": 0.05, "attention.decode.launch_s": 0.3,
    "attention.decode.sequence_head_s": 0.3, "attention.decode.tile_rows": 0.5,
    "attention.prefill.compute_efficiency": 0.1, "memory.l2_bytes": 0.5,
    "energy.memory_j_per_byte": 0.2, "energy.memory_core_share": 0.5, "energy.bfloat16.j_per_flop": 0.3,
    "energy.attention.j_per_flop": 0.5, "power.static_w": 0.01, "power.voltage_floor": 0.5,
    "power.limit_share": 0.01, "power.floor_w": 0.05,
    "host.step_s": 0.7, "host.sequence_s": 0.7, "host.prompt_s": 0.5, "host.launch_s": 0.5, "host.attention_s": 0.7,
}  # fmt: skip
#: More of them, where a run has experts, or weights in 8 bits or in mxfp4.
FREE_EXPERTS = {
    "experts.bfloat16.memory_efficiency": 0.1, "experts.bfloat16.compute_efficiency": 0.2,
    "experts.bfloat16.launch_s": 0.5, "experts.bfloat16.tile_s": 0.5, "experts.bfloat16.sm_load_bytes_per_s": 0.3,
    "experts.padding_energy_share": 0.7, "host.experts_s": 0.5,
}  # fmt: skip
FREE_PARALLEL = {"host.engine_share": 0.3}
FREE_STAGES = {"host.pipeline_s": 0.5}
FREE_FORMATS = {
    "linear.fp8.memory_efficiency": 0.1, "linear.fp8.compute_efficiency": 0.15, "linear.fp8.launch_s": 0.3,
    "linear.fp8.quantize_passes": 0.5, "linear.fp8.dispatch_s": 0.5, "energy.fp8.j_per_flop": 0.3,
}  # fmt: skip


#: Experts in 8 bits and in mxfp4 (Marlin).
FREE_EXPERT_FORMATS = {
    "fp8": {
        "experts.fp8.memory_efficiency": 0.2, "experts.fp8.compute_efficiency": 0.2, "experts.fp8.launch_s": 0.5,
        "experts.fp8.quantize_passes": 0.5, "experts.fp8.sm_load_bytes_per_s": 0.3,
    },
    "mxfp4": {
        "experts.mxfp4.memory_efficiency": 0.2, "experts.mxfp4.compute_efficiency": 0.2, "experts.mxfp4.launch_s": 0.5,
        "energy.mxfp4.j_per_flop": 0.3,
    },
}  # fmt: skip


def free_coefficients(runs: Sequence[Run]) -> dict[str, float]:
    """What these runs can tell of."""
    free = dict(FREE)
    if any(run.experts for run in runs):
        free |= FREE_EXPERTS
    if any(run.deployment.quantization == "fp8" for run in runs):
        free |= FREE_FORMATS
    for form, coefficients in FREE_EXPERT_FORMATS.items():
        if any(run.deployment.quantization == form and run.experts for run in runs):
            free |= coefficients
    if any(run.deployment.tensor_parallel_size > 1 for run in runs):
        free |= FREE_PARALLEL
    return free


class Run:
    """One recording and its model."""

    def __init__(self, gpu: str, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.model, given = RUNS[gpu][name]
        recording = load(RECORDINGS / f"{gpu.partition('-')[0].lower()}_vllm" / f"{name}_steps.npz")
        sizes = recording.capture_sizes if not given.get("enforce_eager") else None
        quantization = given.get("quantization") or quantization_of(load_config(self.model))
        self.deployment = Deployment(
            gpu=gpu, vllm_release="0.25.1", max_num_seqs=512, cudagraph_capture_sizes=sizes,
            **(given | {"quantization": quantization}),
        )  # fmt: skip
        # Not EnergyModel's masks: the profile may not be made yet.
        masks = [kernel.attention.mask for kernel in cascade(self.model).kernels() if kernel.attention]
        self.windows = measured_windows(recording, list(dict.fromkeys(masks)), most_steps=60)
        self.unit = UNITS.get(name, "first")
        self.experts = any(kernel.experts for kernel in cascade(self.model).kernels())
        self.fitted = self.deployment.expert_routing != "collapsed" and name not in UNSEEN[gpu]
        left_out = UNSCORED.get(name, "none")
        self.scored = np.array([not window.startswith(left_out) for window in self.windows.names])

    def energy_model(self, profile: GpuProfile) -> EnergyModel:
        return EnergyModel(cascade(self.model), self.deployment, profile)

    def errors(self, profile: GpuProfile) -> tuple[Array, Array]:
        """log(predicted / measured) of time and energy of each window."""
        predicted, windows = self.windows.predict(self.energy_model(profile)), self.windows
        time_error = np.log(predicted.busy_s / windows.busy_s)
        energy_error = np.log(predicted.energy_j / windows.energy_j)
        return time_error[self.scored], energy_error[self.scored]

    @property
    def windows_scored(self) -> list[str]:
        return [name for name, scored in zip(self.windows.names, self.scored, strict=True) if scored]


def fit_steps(
    profile: GpuProfile, runs: Sequence[Run], near: GpuProfile | None = None, free: Mapping[str, float] | None = None
) -> GpuProfile:
    """`free`: None for all that the runs can tell of."""
    names = ", ".join(run.name for run in runs)
    units = [run.unit for run in runs for _ in run.windows_scored]
    unit_std = UNIT_STD if len(set(units)) > 1 else 0.0  # one GPU is all that is known of its kind

    def residuals(trial: GpuProfile) -> Array:
        times, energies = (np.concatenate(errors) for errors in zip(*(run.errors(trial) for run in runs), strict=True))
        return np.concatenate([times, weigh_groups(energies, units, unit_std)])

    return fit(
        profile,
        free or free_coefficients(runs),
        residuals,
        f"fitted on recorded steps of vLLM 0.25.1 on {profile.name} ({names}), tests/data",
        (near,) if near else (),
    )


# -- steady serving on H100 and B200 (ML.ENERGY Benchmark v3) -----------------------------------------------------

MLENERGY_MODELS = {
    "3.1-70B": "llama-3.1-70b", "3.1-8B": "llama-3.1-8b", "Qwen3-8B": "qwen3-8b", "Qwen3-14B": "qwen3-14b",
    "Qwen3-32B": "qwen3-32b", "235B": "qwen3-235b-a22b", "30B-A3B": "qwen3-30b-a3b", "Llama-4-Scout": "llama-4-scout",
}  # fmt: skip
MLENERGY_PROMPT = {"gpqa": 220, "lm-arena-chat": 700}
#: What serving runs can tell: kernels and energies of their GPU, their hosts, and experts in blocks of fp8. Not static
#: power, which no run of them shows alone: left free it takes on what bytes cost.
MLENERGY_FREE = {
    "linear.bfloat16.memory_efficiency": 0.05, "linear.bfloat16.compute_efficiency": 0.05,
    "attention.decode.memory_efficiency": 0.05, "energy.memory_j_per_byte": 0.2, "energy.bfloat16.j_per_flop": 0.1,
    "energy.attention.j_per_flop": 0.3, "power.voltage_floor": 0.2, "power.limit_share": 0.01,
    "host.serial_s": 0.7, "host.serial_request_s": 0.7, "host.launch_s": 0.5, "host.attention_s": 0.5,
    "host.experts_s": 0.5, "host.prompt_s": 0.5,
    "experts.bfloat16.memory_efficiency": 0.1, "experts.bfloat16.compute_efficiency": 0.2,
    "experts.bfloat16.launch_s": 0.5, "experts.bfloat16.sm_load_bytes_per_s": 0.3, "experts.padding_energy_share": 0.5,
    "experts.fp8.compute_efficiency": 0.3, "experts.fp8.sm_load_bytes_per_s": 0.3, "energy.fp8.j_per_flop": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A steady closed-queue run."""

    series: str
    gpus: int
    model: str
    deployment: Deployment
    concurrency: int
    prompt: float
    output: float
    context: float
    energy_j: float  #: of an output token
    time_s: float  #: mean between a request's tokens


def mlenergy_rows(data: pathlib.Path, gpu: str, requests_per_slot: float = 3.0) -> list[Row]:
    """The rows of one GPU that were stationary, of models that are known here."""
    rows = []
    with open(data / "mlenergy_v3" / "calibration.csv") as file:
        for row in csv.DictReader(file):
            model = next((name for part, name in MLENERGY_MODELS.items() if part in row["model"]), None)
            if model is None or f"{row['gpu']}-SXM" != gpu or float(row["requests_per_slot"]) < requests_per_slot:
                continue
            quantization = "fp8" if "fp8" in row["model"].lower() else None
            prompt = MLENERGY_PROMPT[row["task"]]
            rows.append(
                Row(
                    series=f"{row['gpu']} x{row['num_gpus']} {model} {quantization or 'bf16'} {row['task']}",
                    gpus=int(row["num_gpus"]),
                    model=model,
                    deployment=Deployment(
                        gpu=gpu, tensor_parallel_size=int(row["tp"]), data_parallel_size=int(row["dp"]),
                        enable_expert_parallel=int(row["ep"]) > 1, quantization=quantization,
                    ),
                    concurrency=round(float(row["avg_batch_size"])),
                    prompt=prompt,
                    output=float(row["mean_output_tokens"]),
                    context=prompt + float(row["mean_generated_context_tokens"]),
                    energy_j=float(row["energy_per_output_token_j"]),
                    time_s=float(row["derived_mean_time_per_token_s"]),
                )
            )  # fmt: skip
    return rows


def estimates(rows: Sequence[Row], profile: GpuProfile) -> list[ServingPrediction]:
    """What is predicted of each row."""
    models: dict[Any, EnergyModel] = {}
    found = []
    for row in rows:
        key = (row.model, row.deployment)
        if key not in models:
            models[key] = EnergyModel(cascade(row.model), row.deployment, profile)
        found.append(models[key].serving(row.concurrency, row.prompt, row.output, row.context))
    return found


def row_errors(rows: Sequence[Row], profile: GpuProfile) -> tuple[Array, Array]:
    """log(predicted / measured) of time and energy of an output token of each row."""
    loads = estimates(rows, profile)
    times = [load_.inter_token_latency_s / row.time_s for row, load_ in zip(rows, loads, strict=True)]
    energies = [load_.energy_per_output_token_j / row.energy_j for row, load_ in zip(rows, loads, strict=True)]
    return np.log(times), np.log(energies)


def fit_serving(profile: GpuProfile, rows: Sequence[Row], near: GpuProfile | None = None) -> GpuProfile:
    """Fit steady serving runs. Whole tiles make more than one optimum of 8-bit experts, so a search also starts from
    slower ones."""
    begin = near or profile
    slower = begin.with_values(
        {RELEASE_KERNEL: begin[RELEASE_KERNEL] * np.exp(-MLENERGY_FREE[RELEASE_KERNEL])}, "search"
    )
    source = (
        "fitted on serving runs of the ML.ENERGY Benchmark v3 (Chung et al., NeurIPS 2025 D&B, arXiv 2505.06371; "
        f"Apache-2.0), vLLM 0.11.1, {len(rows)} rows"
    )
    return fit(
        profile,
        MLENERGY_FREE,
        lambda trial: np.concatenate(row_errors(rows, trial)),
        source,
        (begin, slower),
    )


# -- the profiles -------------------------------------------------------------------------------------------------

#: What one Hopper GPU tells of the other, and of GPUs whose steps nobody recorded: energies on the die, the host.
TRANSFERRED = (
    "energy.memory_core_share", "energy.bfloat16.j_per_flop", "energy.attention.j_per_flop", "power.voltage_floor",
    "power.limit_share", "experts.padding_energy_share", "attention.decode.tile_rows", "elementwise.launch_s",
    "host.step_s", "host.sequence_s", "host.prompt_s", "host.launch_s", "host.attention_s", "host.experts_s",
    "host.engine_share",
)  # fmt: skip
#: Kernels in other formats were recorded on the H100 alone; the H200 has the same SMs.
HOPPER_FORMATS = tuple(
    name for free in (FREE_FORMATS, *FREE_EXPERT_FORMATS.values()) for name in free if not name.startswith("energy.")
)
#: Formats whose joules a FLOP those recordings give.
MEASURED_FORMATS = ("fp8", "mxfp4")


#: A kernel of vLLM 0.11.1 that the tables do not have: DeepGEMM's over the contiguous layout.
RELEASE_KERNEL = "experts.fp8.compute_efficiency"
#: Kernels that the measured steps of every calibrated GPU ran.
MEASURED = ("linear.bfloat16", "experts.bfloat16")
MEASURED_ON_HOPPER = (*MEASURED, "linear.fp8", "experts.fp8", "experts.mxfp4")


#: Of one held-out window or run: whether its network has experts, its phase, and errors of time and energy.
Missed = tuple[bool, str, Array, Array]


def half_width_std(errors: Array) -> float:
    """The relative std of a normal distribution of which 90 % lies within what 90 % of the errors do."""
    return round(max(float(np.expm1(np.quantile(np.abs(errors), 0.9))) / 1.645, 0.015), 4)


def recorded_runs(gpu: str) -> list[Run]:
    """The runs of a GPU that fits may use."""
    return [run for run in (Run(gpu, name) for name in RUNS[gpu]) if run.fitted]


def held_out_runs(start: GpuProfile, runs: Sequence[Run], near: GpuProfile) -> dict[str, tuple[Array, Array]]:
    """(time, energy) errors of each run, predicted from a fit on the runs of other models. `near`: the fit on all, from
    where the search for the others' optimum starts; priors are `start`'s."""
    models = list(dict.fromkeys(run.model for run in runs))
    with ProcessPoolExecutor() as pool:
        others = ([run for run in runs if run.model != model] for model in models)
        fits = dict(zip(models, pool.map(partial(fit_steps, start, near=near), others), strict=True))
    return {run.name: run.errors(fits[run.model]) for run in runs}


def held_out_rows(
    start: GpuProfile, rows: Sequence[Row], near: GpuProfile, several: bool = False
) -> dict[str, tuple[Array, Array]]:
    """(time, energy) errors of each series of rows (`several`: on several GPUs), predicted from a fit on the others;
    `near` as in `held_out_runs`."""
    names = list(dict.fromkeys(row.series for row in rows if row.gpus > 1 or not several))
    with ProcessPoolExecutor() as pool:
        rest = ([row for row in rows if row.series != name] for name in names)
        fits = list(pool.map(partial(fit_serving, start, near=near), rest))
    return {
        name: row_errors([row for row in rows if row.series == name], fitted)
        for name, fitted in zip(names, fits, strict=True)
    }


def spread(errors: Iterable[Missed]) -> dict[str, float]:
    """Relative stds by quantity, kind of network and phase, of what fits miss on models that they have not seen:
    whether it has experts, the phase or "" for mixed ones, and the errors of time and energy."""
    collected: dict[str, list[float]] = {}
    for experts, phase, times, energies in errors:
        for quantity, found in (("time", times), ("energy", energies)):
            for name in [phase] if phase else ("decode", "prefill"):
                key = f"{quantity}.{'experts' if experts else 'dense'}.{name}"
                collected.setdefault(key, []).extend(found.tolist())
    return {name: half_width_std(np.array(found)) for name, found in collected.items()}


def missed_runs(runs: Sequence[Run], held_out: Mapping[str, tuple[Array, Array]]) -> Iterator[Missed]:
    """Errors of recorded windows on models that were held out, for `spread`. Eager ones are told apart: how long Python
    takes to launch kernels differs from machine to machine."""
    for run in runs:
        if run.deployment.enforce_eager:
            continue
        for window, time, energy in zip(run.windows_scored, *held_out[run.name], strict=True):
            phase = next((phase for phase in ("decode", "prefill") if window.startswith(phase)), "")
            yield run.experts, phase, np.array([time]), np.array([energy])


def eager_std(runs: Sequence[Run], held_out: Mapping[str, tuple[Array, Array]]) -> dict[str, float]:
    """Stds of eager runs, on top of what others have."""
    errors = [held_out[run.name] for run in runs if run.deployment.enforce_eager]
    times, energies = (np.concatenate(parts) for parts in zip(*errors, strict=True))
    return {"time.eager_host": half_width_std(times), "energy.eager_host": half_width_std(energies)}


def missed_rows(held_out: Mapping[str, tuple[Array, Array]]) -> Iterator[Missed]:
    """The same of serving runs, whose series were held out."""
    for series, errors in held_out.items():
        yield "-a" in series.split()[2] or "scout" in series, "", *errors


def h100(operations: pathlib.Path, data: pathlib.Path) -> tuple[GpuProfile, GpuProfile]:
    """(the profile, and what its recorded steps give).

    Serving runs of vLLM 0.11.1 are the only ones on several GPUs, so the profile is theirs; the recorded steps of
    0.25.1 were taken on another H100, and what they gave counts for releases nearer to 0.25.1.
    """
    tables, runs = prior("H100-SXM", operations), recorded_runs("H100-SXM")
    steps = scale_formats(fit_steps(tables, runs), "fitted on this GPU", MEASURED_FORMATS)
    start = replace(start_from(steps, "H100-SXM", operations), vllm_release="0.11.1")
    rows = mlenergy_rows(data, "H100-SXM")
    fitted = fit_serving(start, rows)
    held_out = held_out_runs(tables, runs, steps)
    missed = (*missed_runs(runs, held_out), *missed_rows(held_out_rows(start, rows, fitted, several=True)))
    moved = {name: c for name, c in steps.coefficients.items() if c != fitted.coefficients[name]}
    profile = replace(
        fitted, by_release={"0.25.1": moved}, calibrated=True,
        calibrated_formats=MEASURED_ON_HOPPER, std=STD | eager_std(runs, held_out) | spread(missed),
    )  # fmt: skip
    return profile, steps


def h200(operations: pathlib.Path, hopper: GpuProfile) -> GpuProfile:
    """`hopper`: the H100's recorded steps, for what was not recorded on the H200."""
    tables, runs = prior("H200-SXM", operations), recorded_runs("H200-SXM")
    source = "fitted on recorded steps of vLLM 0.25.1 on one H100, tests/data: the same SMs"
    start = tables.with_values({name: hopper[name] for name in (*TRANSFERRED, *HOPPER_FORMATS)}, source)
    fitted = fit_steps(start, runs)
    # Arithmetic in other formats costs here what it does there, relative to bf16.
    for form in MEASURED_FORMATS:
        share = hopper[f"energy.{form}.j_per_flop"] / hopper["energy.bfloat16.j_per_flop"]
        fitted = fitted.with_values(
            {f"energy.{form}.j_per_flop": fitted["energy.bfloat16.j_per_flop"] * share},
            f"{share:.2f} of bf16, as {source}",
        )
    others = [Run("H200-SXM", name) for name in TELLING]
    missed = held_out_runs(tables, runs, fitted) | {run.name: run.errors(fitted) for run in others}
    std = STD | spread(missed_runs([*runs, *others], missed))
    fitted = fit_steps(fitted, [Run("H200-SXM", "llama8b-pp2")], free=FREE_STAGES)
    fitted = scale_formats(fitted, "fitted on this GPU", MEASURED_FORMATS)
    return replace(fitted, calibrated=True, calibrated_formats=MEASURED_ON_HOPPER, std=std)


def scale_formats(profile: GpuProfile, source: str, fitted: Sequence[str] = ()) -> GpuProfile:
    """Energies of a FLOP in formats that were not `fitted`: their share of bf16's."""
    bf16 = profile["energy.bfloat16.j_per_flop"]
    energies = {
        f"energy.{form}.j_per_flop": bf16 * share for form, share in FORMAT_ENERGY.items() if form not in fitted
    }
    return profile.with_values(energies, f"{source}; scaled from bf16 by the operands' width")


def start_from(known: GpuProfile, gpu: str, operations: pathlib.Path) -> GpuProfile:
    """The prior of a GPU with the energies and host times that were fitted on another."""
    source = f"fitted on the {known.name}, not measured on this GPU"
    start = prior(gpu, operations).with_values({name: known[name] for name in TRANSFERRED}, source)
    return scale_formats(start, source)


def with_kernels_of(start: GpuProfile, other: GpuProfile, operations: pathlib.Path) -> GpuProfile:
    """`start` with what serving runs of vLLM 0.11.1 on another GPU say of its kernels for experts: how fast 8-bit ones
    are, against the table of that GPU's, and what rows cost that are empty or in 8 bits (as other energies on the die,
    the same on both). Each GPU has one series of 8-bit experts and few of others."""
    tables = prior(other.name, operations)
    ratio = other[RELEASE_KERNEL] / tables[RELEASE_KERNEL]
    return start.with_values(
        {
            RELEASE_KERNEL: start[RELEASE_KERNEL] * ratio,
            "energy.fp8.j_per_flop": other["energy.fp8.j_per_flop"],
            "experts.padding_energy_share": other["experts.padding_energy_share"],
        },
        f"as vLLM 0.11.1 had it on the {other.name}, kernels relative to its table",
    )


def b200(operations: pathlib.Path, data: pathlib.Path, known: GpuProfile, hopper: GpuProfile) -> GpuProfile:
    rows = mlenergy_rows(data, "B200-SXM")
    start = replace(start_from(known, "B200-SXM", operations), vllm_release="0.11.1")
    start = with_kernels_of(start, hopper, operations)
    fitted = fit_serving(start, rows)
    std = STD | spread(missed_rows(held_out_rows(start, rows, fitted, several=True)))
    return replace(fitted, calibrated=True, calibrated_formats=(*MEASURED, "experts.fp8"), std=std)


def unmeasured(operations: pathlib.Path, gpu: str, known: GpuProfile) -> GpuProfile:
    """A GPU whose steps nobody measured here: the intervals of the H200's and, with the flag, much wider ones."""
    return replace(start_from(known, gpu, operations), std=known.std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="folder with mlenergy_v3/calibration.csv")
    parser.add_argument("operations", type=pathlib.Path, help="folder that fit_operations.py --json wrote")
    args = parser.parse_args()
    profile, hopper = h100(args.operations, args.data)
    known = h200(args.operations, hopper)
    made = [profile, known, b200(args.operations, args.data, known, profile)]
    made += [unmeasured(args.operations, gpu, known) for gpu in ("A100-SXM-80GB", "L40S")]
    for each in made:
        path = PROFILES / f"{each.name}.json"
        path.write_text(json.dumps(each.to_json(), indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
