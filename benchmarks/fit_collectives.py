"""Fit the interconnect profiles on measured collectives, and print how well they hold.

    python benchmarks/fit_collectives.py DATA [--write]

DATA is a folder with comm_nccl.parquet, comm_custom_allreduce.parquet, comm_deepep_normal.parquet and
comm_deepep_ll.parquet: tables of NVIDIA's AIConfigurator database (Apache-2.0), one row a measurement, latency_s or
microseconds in CUDA graphs. --write rewrites energylens_vllm/hardware/interconnects/*.json; without it nothing is
written. Needs pandas, pyarrow and scipy. Joules are those of two H200s, whose rows this repository has.

Three kinds of error: over the fitted rows; over message sizes left out (every fourth, four times); over GPU counts left
out (one at a time). Beside them the error on rows of the other NCCL or vLLM releases in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from energylens_vllm.calibrate.collectives import Row
from energylens_vllm.calibrate.collectives_fit import powered
from energylens_vllm.energy.collectives import Collectives, reached
from energylens_vllm.hardware.interconnect import INTERCONNECTS, Fit, Path, parse

KIB, MIB = 1024, 1024 * 1024
SYSTEMS = {"A100-SXM-80GB": "a100_sxm", "H100-SXM": "h100_sxm", "H200-SXM": "h200_sxm", "B200-SXM": "b200_sxm"}
CAPABILITY = {"A100-SXM-80GB": "8.0", "H100-SXM": "9.0", "H200-SXM": "9.0", "B200-SXM": "10.0"}
TABLE = "AIConfigurator (NVIDIA, Apache-2.0)"
#: What collectives between two H200s took in joules.
MEASURED = pathlib.Path(__file__).parent / "results" / "calibrate_h200_pair" / "collectives.json"
ENERGY_UNITS = {"communication_power_w": "W", "energy_per_link_byte_j": "J/B"}
BOARD_W = {"A100-SXM-80GB": 400.0, "H100-SXM": 700.0, "H200-SXM": 700.0, "B200-SXM": 1000.0, "L40S": 350.0}

#: vLLM 0.32, all_reduce_utils.py: largest buffer of the custom kernels where symmetric memory is on, capped at 8 MiB
#: by CustomAllreduce(max_size), and taken below it only (`<`); of symmetric memory (`<=`). 8 MiB where it is not.
CUSTOM_MIB = {
    "8.0": {2: 8, 4: 8, 6: 8, 8: 8},
    "9.0": {2: 8, 4: 8, 6: 0.5, 8: 0.25},
    "10.0": {2: 2, 4: 2, 6: 1, 8: 1},
}
SYMMETRIC_MIB = {"9.0": {2: 64, 4: 32, 6: 64, 8: 64}, "10.0": {2: 8, 4: 32, 6: 128, 8: 128}}
#: vLLM 0.32, symm_mem.py `_WORLD_SIZES_MULTIMEM`: GPU counts that reduce in the switch.
MULTICAST = {"9.0": (4, 6, 8), "10.0": (6, 8)}
#: vLLM 0.32, allreduce_rms_fusion.py FI_ALLREDUCE_FUSION_MAX_SIZE_MB.
FLASHINFER_MIB = {"9.0": {2: 64, 4: 2, 8: 0.5}, "10.0": {2: 64, 4: 32, 8: 1}}
#: vLLM, csrc/custom_all_reduce.cuh: below this all peers read everything (one shot), above it two shots.
ONE_SHOT_BYTES = {2: math.inf, 4: 512 * KIB, 6: 256 * KIB, 8: 256 * KIB}


@dataclass(frozen=True)
class Rows:
    """Measurements of one operation: buffer bytes, GPU count and seconds, each of shape (N,)."""

    bytes: np.ndarray
    sizes: np.ndarray
    seconds: np.ndarray

    def only(self, mask: np.ndarray) -> Rows:
        return Rows(self.bytes[mask], self.sizes[mask], self.seconds[mask])

    @classmethod
    def of(cls, table: pd.DataFrame) -> Rows:
        return cls(table.message_bytes.to_numpy(float), table.num_gpus.to_numpy(int), table.latency_s.to_numpy(float))


def predict(paths: Sequence[Path], rows: Rows) -> np.ndarray:
    """Seconds of the fastest path for each row."""
    seconds = np.full(rows.bytes.shape, np.inf)
    for size in np.unique(rows.sizes):
        at = rows.sizes == size
        for path in paths:
            if size >= path.min_size:
                line = path.fixed_s(int(size)) + path.slope_s(int(size)) * rows.bytes[at]
                seconds[at] = np.minimum(seconds[at], line)
    return seconds


def fit_paths(start: Sequence[Path], rows: Rows, tries: int = 6) -> list[Path]:
    """The paths with every non-zero number of `start` fitted to log-time, robustly (the tables have stray spikes)."""
    names = [(i, name) for i, path in enumerate(start) for name in ("latency_s", "hop_s", "byte_s", "wire_byte_s")
             if getattr(path, name) > 0]  # fmt: skip
    first = np.log([getattr(start[i], name) for i, name in names])

    def build(x: np.ndarray) -> list[Path]:
        paths = list(start)
        for (i, name), value in zip(names, np.exp(x), strict=True):
            paths[i] = replace(paths[i], **{name: float(value)})
        return paths

    rng = np.random.default_rng(0)
    best = None
    for attempt in range(tries):
        found = least_squares(
            lambda x: np.log(predict(build(x), rows) / rows.seconds),
            first + (0.4 * rng.standard_normal(len(first)) if attempt else 0.0),
            loss="soft_l1", f_scale=0.1, bounds=(first - 8, first + 4), max_nfev=300,
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    return build(best.x)


def leave_out(start: Sequence[Path], rows: Rows, out: np.ndarray) -> np.ndarray:
    """log(predicted / measured) of the rows in `out`, predicted by a fit without them."""
    return np.log(predict(fit_paths(start, rows.only(~out), 3), rows.only(out)) / rows.seconds[out])


def percent(log_error: np.ndarray) -> str:
    """MAPE and 95th percentile of |predicted / measured - 1|."""
    error = 100 * np.abs(np.expm1(log_error))
    return f"{error.mean():5.1f} {np.quantile(error, 0.95):5.1f}"


NONE = f"{'-':>5} {'-':>5}"


class Report:
    """Fits one operation, prints its line, remembers the JSON."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self.fits: dict[str, dict] = {}

    def fit(self, name: str, start: Sequence[Path], rows: Rows, source: str, others: Rows | None = None) -> None:
        counts = np.unique(rows.sizes)
        if len(counts) == 1:  # one GPU count cannot tell latency from latency per GPU
            start = [replace(path, hop_s=0.0) for path in start]
        paths = fit_paths(start, rows)
        fitted = np.log(predict(paths, rows) / rows.seconds)
        order = np.unique(rows.bytes, return_inverse=True)[1]
        folds = range(min(4, order.max() + 1))
        by_bytes = np.concatenate([leave_out(start, rows, order % 4 == fold) for fold in folds])
        # A path that exists at one GPU count only (in-switch reduction) cannot be fitted without that count.
        spare = [c for c in counts if len(counts) > 1 and all((counts[counts != c] >= p.min_size).any() for p in start)]
        by_count = percent(np.concatenate([leave_out(start, rows, rows.sizes == c) for c in spare])) if spare else NONE
        compared = others is not None and len(others.bytes) > 0
        other = percent(np.log(predict(paths, others) / others.seconds)) if compared else NONE
        parameters = sum(getattr(p, f) > 0 for p in start for f in ("latency_s", "hop_s", "byte_s", "wire_byte_s"))
        print(f"{self.gpu:14} {name:20} {len(rows.bytes):4} {parameters:2}  {percent(fitted)}  {percent(by_bytes)}  "
              f"{by_count}  {other}")  # fmt: skip
        fit = Fit(
            tuple(paths), tuple(int(c) for c in counts), float(rows.bytes.max()),
            float(f"{np.sqrt(np.mean(by_bytes**2)):.3g}"), source,
        )  # fmt: skip
        self.fits[name] = as_json(fit)


def as_json(fit: Fit) -> dict:
    """A fit as JSON: numbers to four digits, zeros left out."""
    raw = asdict(fit)
    raw["paths"] = [
        {key: (float(f"{value:.4g}") if isinstance(value, float) else value) for key, value in path.items()
         if value and (key, value) != ("min_size", 2)}
        for path in raw["paths"]
    ]  # fmt: skip
    raw["sizes"] = list(fit.sizes)
    return raw


# -- NCCL ---------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}  # fmt: skip


def nccl_start(op: str, capability: str) -> list[Path]:
    """NCCL's protocols: LL and LL128 carry flags with the data (little latency, less bandwidth), Simple does not.

    One low-latency path stands for LL and LL128 together, whose latencies differ by a microsecond.
    """
    wire = "ring_all_reduce" if op == "all_reduce" else "ring"
    twice = 2.0 if op == "all_reduce" else 1.0
    paths = [
        Path("low_latency", wire, 5e-6, twice * 0.8e-6, byte_s=twice * 5e-12),
        Path("simple", wire, 18e-6, twice * 1e-6, byte_s=1e-12, wire_byte_s=2e-12),
    ]
    if op == "all_reduce" and capability != "8.0":
        # In-switch reduction, which NCCL takes above 4 GPUs.
        paths.append(Path("nvls", "multicast", 80e-6, wire_byte_s=3e-12, min_size=5))
    return paths


def fit_nccl(report: Report, table: pd.DataFrame, capability: str) -> None:
    for label, op in OPERATIONS.items():
        # vLLM reduces bfloat16; the table's int8 rows exercise other reduction kernels. Where nothing is reduced the
        # element type does not matter, and its rows are a second measurement.
        moves = op in ("all_gather", "all_to_all")
        one = table[(table.op_name == label) & ((table.nccl_dtype == "half") | moves)]
        newest = max(one.lib_version, key=lambda v: [int(part) for part in v.split(".")])
        rows = Rows.of(one[one.lib_version == newest])
        report.fit(
            f"nccl.{op}", nccl_start(op, capability), rows,
            f"{TABLE}, comm_nccl, NCCL {newest}, half{' and int8' if moves else ''}",
            Rows.of(one[one.lib_version != newest]),
        )  # fmt: skip
    pair = Fit(**{**report.fits["nccl.all_to_all"], "paths": tuple(
        Path(**path) for path in report.fits["nccl.all_to_all"]["paths"])})  # fmt: skip
    # Sending b bytes is an all-to-all of two GPUs with a buffer of 2 b, of which half crosses the link.
    report.fits["nccl.send_recv"] = as_json(Fit(
        tuple(Path(p.name, "point_to_point", p.fixed_s(2), wire_byte_s=2 * p.slope_s(2)) for p in pair.paths),
        (), pair.max_bytes, 0.25, f"derived from the fitted all-to-all of two GPUs; {pair.source}",
    ))  # fmt: skip


# -- vLLM's and FlashInfer's all-reduce ---------------------------------------------------------------------------


def fit_all_reduce(report: Report, table: pd.DataFrame, capability: str) -> None:
    custom = CUSTOM_MIB[capability]
    graph = table[table.backend == "vllm_graph"]
    newest = max(graph.lib_version, key=lambda v: [int(part) for part in v.split(".")])
    rows, others = Rows.of(graph[graph.lib_version == newest]), Rows.of(graph[graph.lib_version != newest])
    source = f"{TABLE}, comm_custom_allreduce, vllm_graph, vLLM {newest}"

    def split(rows: Rows) -> dict[str, Rows]:
        limit = np.array([custom[n] * MIB for n in rows.sizes])
        one_shot = (rows.bytes < limit) & (rows.bytes < np.array([ONE_SHOT_BYTES[n] for n in rows.sizes]))
        two_shot = (rows.bytes < limit) & ~one_shot
        parts = {"one_shot": rows.only(one_shot), "two_shot": rows.only(two_shot)}
        if capability in SYMMETRIC_MIB:
            most = np.array([SYMMETRIC_MIB[capability][n] * MIB for n in rows.sizes])
            symmetric = (rows.bytes >= limit) & (rows.bytes <= most)
            switch = np.isin(rows.sizes, MULTICAST[capability])
            parts["symm_mem_two_shot"] = rows.only(symmetric & ~switch)
            parts["symm_mem_multicast"] = rows.only(symmetric & switch)
        return parts

    starts = {
        "one_shot": [Path("one_shot", "one_shot", 4e-6, 0.1e-6, wire_byte_s=3e-12)],
        "two_shot": [Path("two_shot", "ring_all_reduce", 6e-6, 0.5e-6, wire_byte_s=3e-12)],
        "symm_mem_two_shot": [Path("two_shot", "ring_all_reduce", 12e-6, byte_s=4e-12)],
        "symm_mem_multicast": [Path("multicast", "multicast", 8e-6, wire_byte_s=4e-12)],
    }
    other = split(others)
    for name, part in split(rows).items():
        # Older releases chose other paths at some sizes; where they differ the comparison would be of paths, not fits.
        report.fit(name, starts[name], part, source, other[name] if name != "symm_mem_multicast" else None)
    if capability in FLASHINFER_MIB:
        trtllm = table[(table.kernel_source == "TRTLLM") & (table.lib == "trtllm")]
        version = max(trtllm.lib_version)
        trt = Rows.of(trtllm[trtllm.lib_version == version])
        most = np.array([min(FLASHINFER_MIB[capability][n], 16) * MIB for n in trt.sizes])
        report.fit(
            "flashinfer",
            [Path("one_shot", "one_shot", 3e-6, 0.1e-6, wire_byte_s=3e-12),
             Path("two_shot", "ring_all_reduce", 8e-6, 1e-6, wire_byte_s=3e-12)],
            trt.only(trt.bytes <= most),
            f"{TABLE}, comm_custom_allreduce, TensorRT-LLM {version}, whose kernels FlashInfer packages",
        )  # fmt: skip


def chains(capability: str) -> dict[str, dict[str, list[list]]]:
    """Which all-reduce takes which buffers, by GPU count."""
    vllm: dict[str, list[list]] = {}
    flashinfer: dict[str, list[list]] = {}
    for size, limit in CUSTOM_MIB[capability].items():
        below = limit * MIB - 1
        steps: list[list] = []
        if ONE_SHOT_BYTES[size] < limit * MIB:
            steps += [["one_shot", ONE_SHOT_BYTES[size] - 1], ["two_shot", below]]
        else:
            steps += [["one_shot", below]]
        if capability in SYMMETRIC_MIB:
            kind = "multicast" if size in MULTICAST[capability] else "two_shot"
            steps.append([f"symm_mem_{kind}", SYMMETRIC_MIB[capability][size] * MIB])
        vllm[str(size)] = steps
        first = FLASHINFER_MIB.get(capability, {}).get(size)
        flashinfer[str(size)] = ([["flashinfer", first * MIB]] if first else []) + steps
    return {"vllm": vllm, "flashinfer": flashinfer}


def check_chain(profile: dict, table: pd.DataFrame) -> None:
    """The whole choice of backends against what vLLM took, for the newest release in the table."""
    table = table[table.lib_version == max(table.lib_version, key=lambda v: [int(part) for part in v.split(".")])]
    rows, errors, inside = Rows.of(table), [], []
    for size in np.unique(rows.sizes):
        part = rows.only(rows.sizes == size)
        timed = Collectives(parse(profile)).time_s("all_reduce", part.bytes, int(size))
        errors.append(np.log(timed.time_s / part.seconds))
        inside.append(np.abs(errors[-1]) <= 1.645 * timed.relative_std)
    print(f"{profile['name']:14} {len(rows.bytes):4}  {percent(np.concatenate(errors))}  "
          f"{100 * np.concatenate(inside).mean():.0f} %")  # fmt: skip


# -- DeepEP -------------------------------------------------------------------------------------------------------


def fit_deepep(gpu: str, normal: pd.DataFrame, low_latency: pd.DataFrame) -> dict[str, dict]:
    """Inside a node of 8. vLLM gives the high-throughput kernels 20 SMs (all2all.py)."""
    # Older rows are of one shape only, and small expert counts (one or two a rank) starve the low-latency kernel.
    normal = normal[(normal.node_num == 1) & (normal.version == "0.5.12") & (normal.dispatch_sms == 20)]
    low_latency = low_latency[
        (low_latency.node_num == 1) & (low_latency.version == "0.5.12") & (low_latency.num_experts >= 128)
    ]
    fits = {}
    for mode, table in (("high_throughput", normal), ("low_latency", low_latency)):
        work = (table.num_token * table.hidden_size).to_numpy(float)
        experts, selected = table.num_experts.to_numpy(float), table.num_topk.to_numpy(float)
        if mode == "high_throughput":
            copies = np.array([7 * reached(int(k), int(e), 8) for k, e in zip(selected, experts, strict=True)])
        else:
            copies = selected
        terms = np.stack([np.ones_like(work), experts, work, work * copies])
        start = np.log([2e-5 if mode == "high_throughput" else 1e-5, 5e-9, 1e-12, 2e-12])
        shape = table.hidden_size.to_numpy() * 100_000 + experts * 100 + selected
        for phase, element_bytes in (("dispatch", 1.0), ("combine", 2.0)):
            seconds = (
                table[f"{phase}_{'transmit_us' if mode == 'high_throughput' else 'avg_t_us'}"].to_numpy(float) * 1e-6
            )
            every = fit_terms(terms, seconds, start)
            out = np.zeros(len(seconds))
            for one in np.unique(shape):
                left = shape == one
                out[left] = np.log(fit_terms(terms[:, ~left], seconds[~left], start) @ terms[:, left] / seconds[left])
            name = f"{mode}_{phase}"
            print(f"{gpu:14} {name:26} {len(seconds):4}  {percent(np.log(every @ terms / seconds))}  {percent(out)}")
            latency_s, expert_s, element_s, copy_s = (float(f"{value:.4g}") for value in every)
            fits[name] = dict(
                latency_s=latency_s, expert_s=expert_s, element_s=element_s, copy_s=copy_s, element_bytes=element_bytes,
                std=float(f"{np.sqrt(np.mean(out**2)):.3g}"), max_tokens=float(table.num_token.max()),
                source=f"{TABLE}, comm_deepep_{'normal' if mode == 'high_throughput' else 'll'}, 0.5.12, one node of 8",
            )  # fmt: skip
    return fits


def fit_terms(terms: np.ndarray, seconds: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Non-negative coefficients c of c @ terms, fitted to log-time."""
    found = least_squares(
        lambda x: np.log(np.exp(x) @ terms / seconds), start, loss="soft_l1", f_scale=0.1, bounds=(start - 9, start + 4)
    )
    return np.exp(found.x)


def check_network(profile: dict, normal: pd.DataFrame, low_latency: pd.DataFrame) -> None:
    """What crosses nodes is never fitted: the bandwidth of the adapters alone, against DeepEP over 2, 4 and 8 nodes."""
    model = Collectives(parse(profile))
    for mode, table in (("high_throughput", normal), ("low_latency", low_latency)):
        for nodes in (2, 4, 8):
            part = table[(table.node_num == nodes) & (table.num_experts == 256)]
            if mode == "high_throughput":
                part = part[part.dispatch_sms == 20]
            if not len(part):
                continue
            for phase in ("dispatch", "combine"):
                suffix = "transmit_us" if mode == "high_throughput" else "avg_t_us"
                measured = part[f"{phase}_{suffix}"].to_numpy(float) * 1e-6
                tokens = part.num_token.to_numpy(float)
                timed = model.expert_exchange_s(f"{mode}_{phase}", tokens, 7168, 8, 256, 8 * nodes)
                error = np.log(timed.time_s / measured)
                print(f"{profile['name']:14} {mode + '_' + phase:26} {nodes} nodes {len(part):4}  {percent(error)}  "
                      f"{100 * np.mean(np.abs(error) <= 1.645 * timed.relative_std):.0f} %")  # fmt: skip


# -- what no table holds ------------------------------------------------------------------------------------------


def coefficient(value: float, std: float, unit: str, source: str) -> dict:
    return dict(value=value, std=std, unit=unit, source=source)


def coefficients(gpu: str) -> dict[str, dict]:
    """Link and network bandwidths from data sheets."""
    link = {"A100-SXM-80GB": 300e9, "H100-SXM": 450e9, "H200-SXM": 450e9, "B200-SXM": 900e9, "L40S": 32e9}[gpu]
    network = 0.84 * {"A100-SXM-80GB": 25e9, "L40S": 25e9}.get(gpu, 50e9)
    return {
        "link_bandwidth_bytes_per_s": coefficient(
            link, 0.0, "B/s", "NVIDIA data sheet: one direction, all links of a GPU"
        ),
        "network_bandwidth_bytes_per_s": coefficient(
            network, 0.3, "B/s", "one 400 Gb/s adapter a GPU (DGX H100, B200), 200 Gb/s (DGX A100, L40S servers), of "
            "which 0.84 is reached: AIConfigurator, comm_deepep_ll, 256 tokens over 2 to 8 nodes"
        ),
        "network_hop_s": coefficient(
            4e-6, 0.5, "s", "NVIDIA/nccl src/graph/tuning.cc hwLat: 2.7, 4.0, 9.6 us a network step (LL, LL128, Simple)"
        ),
    }  # fmt: skip


def energy(h200: dict) -> dict[str, dict[str, dict]]:
    """GPU -> its energy of collectives: that of two H200s, whose links and kernels an H100 has, too. Elsewhere the SMs
    that drive a collective are taken to be as much of the board's power, and a byte to cost the same."""
    rows = [Row(**row) for row in json.loads(MEASURED.read_text())]
    source = "energylens calibrate --collectives on two H200s, benchmarks/results/calibrate_h200_pair"
    unknown = {name: coefficient(0.0, 1.0, unit, "") for name, unit in ENERGY_UNITS.items()}
    node = parse(h200 | {"coefficients": h200["coefficients"] | unknown})
    measured = powered(node, rows, source).coefficients
    power, byte = (measured[name] for name in ENERGY_UNITS)
    found = {}
    for gpu, board_w in BOARD_W.items():
        if gpu == "H200-SXM":
            std, of = (power.std, byte.std), source
        elif gpu == "H100-SXM":
            std, of = (0.25, 0.25), f"{source}; for two H100s see benchmarks/calibrate_check.py"
        else:
            std, of = (0.4, 0.4 if gpu != "L40S" else 0.6), f"not measured on this GPU: {source}"
        scaled = "" if board_w == BOARD_W["H200-SXM"] else ", by the board's power"
        found[gpu] = {
            "communication_power_w": coefficient(
                round(power.value * board_w / BOARD_W["H200-SXM"], 1), std[0], "W", of + scaled
            ),
            "energy_per_link_byte_j": coefficient(float(f"{byte.value:.3g}"), std[1], "J/B", of),
        }  # fmt: skip
    return found


def pcie(a100: dict[str, dict]) -> dict[str, dict]:
    """L40S, which has no NVLink and is in no table: A100's NCCL with PCIe's latencies and bandwidth.

    Latency of a step over PCIe against NVLink: NVIDIA/nccl src/graph/tuning.cc hwLat, ring: LL 1.0 against 0.47 us,
    Simple 5.7 against 3.4 us. Bandwidth: PCIe 4.0 x16 is 32 GB/s a direction, of which a ring through the host bridge
    keeps about 20; LL spends half of it on flags.
    """
    slower = {"low_latency": (1.0 / 0.47, 2 / 20e9), "simple": (5.7 / 3.4, 1 / 20e9)}
    fits = {}
    for name, fit in a100.items():
        if not name.startswith("nccl."):
            continue
        paths = []
        for path in fit["paths"]:
            latency, wire_byte_s = slower[path["name"]]
            paths.append(Path(path["name"], path["wire"], path["latency_s"], path.get("hop_s", 0.0) * latency,
                              wire_byte_s=wire_byte_s))  # fmt: skip
        fits[name] = as_json(Fit(tuple(paths), (), 512.0 * MIB, 0.3, pcie.__doc__.split("\n\n")[1].strip()))
    one_shot = Path("one_shot", "one_shot", 8e-6, wire_byte_s=1 / 20e9)
    fits["one_shot"] = as_json(Fit((one_shot,), (), 8.0 * MIB, 0.3, "A100's custom kernel over 20 GB/s PCIe"))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--write", action="store_true", help="rewrite the interconnect profiles")
    arguments = parser.parse_args()
    nccl, custom, normal, low = (
        pd.read_parquet(arguments.data / f"comm_{name}.parquet")
        for name in ("nccl", "custom_allreduce", "deepep_normal", "deepep_ll")
    )
    print("error in %: mean and 95th percentile of |predicted / measured - 1|; n rows, c coefficients")
    print(f"{'GPU':14} {'operation':20} {'n':>4} {'c':>2}  {'fitted':^11}  {'bytes out':^11}  {'GPUs out':^11}  "
          "other releases")  # fmt: skip
    profiles = {}
    for gpu, system in SYSTEMS.items():
        report = Report(gpu)
        capability = CAPABILITY[gpu]
        fit_nccl(report, nccl[nccl.system == system], capability)
        fit_all_reduce(report, custom[custom.system == system], capability)
        profiles[gpu] = dict(
            name=gpu, link={"8.0": "NVLink 3", "9.0": "NVLink 4", "10.0": "NVLink 5"}[capability] + " through NVSwitch",
            gpus_per_node=8, measured=True, coefficients=coefficients(gpu), fits=report.fits,
            all_reduce=chains(capability), expert_exchange={},
        )  # fmt: skip
    joules = energy(profiles["H200-SXM"])
    for gpu, profile in profiles.items():
        profile["coefficients"] |= joules[gpu]
    print("\nall-reduce as vLLM chooses it, over all sizes (n rows, error, share inside the 90 % interval)")
    for gpu, system in SYSTEMS.items():
        check_chain(profiles[gpu], custom[(custom.system == system) & (custom.backend == "vllm_graph")])
    print(f"\n{'GPU':14} {'DeepEP kernel':26} {'n':>4}  {'fitted':^11}  shapes out")
    for gpu, system in SYSTEMS.items():
        if system in set(normal.system):
            tables = normal[normal.system == system], low[low.system == system]
            profiles[gpu]["expert_exchange"] = fit_deepep(gpu, *tables)
    print("\nacross nodes, not fitted (n rows, error, share inside the 90 % interval)")
    for gpu in ("H100-SXM", "H200-SXM"):
        check_network(profiles[gpu], normal[normal.system == SYSTEMS[gpu]], low[low.system == SYSTEMS[gpu]])
    profiles["L40S"] = dict(
        name="L40S", link="PCIe 4.0 x16, no NVLink", gpus_per_node=8, measured=False,
        coefficients=coefficients("L40S") | joules["L40S"], fits=pcie(profiles["A100-SXM-80GB"]["fits"]),
        expert_exchange={},
        # vLLM uses its custom kernels over PCIe for pairs only.
        all_reduce={"vllm": {"2": [["one_shot", 8 * MIB - 1]]}, "flashinfer": {"2": [["one_shot", 8 * MIB - 1]]}},
    )  # fmt: skip
    if arguments.write:
        INTERCONNECTS.mkdir(exist_ok=True)
        for gpu, profile in profiles.items():
            (INTERCONNECTS / f"{gpu}.json").write_text(json.dumps(profile, indent=1) + "\n")
        print(f"\nwrote {len(profiles)} profiles to {INTERCONNECTS}")


if __name__ == "__main__":
    main()
