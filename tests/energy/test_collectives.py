"""Collectives: the choice of kernels is vLLM's, the numbers are the measured ones, what is not measured says so."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.einsum.kernel import CollectiveShape, Kernel
from energylens_vllm.energy.batch import steps_from_requests
from energylens_vllm.energy.collectives import OPERATIONS, Collectives, reached
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware.interconnect import INTERCONNECTS, known_interconnects, load_interconnect, parse

KIB, MIB = 1024, 1024 * 1024
GPUS = ("A100-SXM-80GB", "B200-SXM", "H100-SXM", "H200-SXM", "L40S")
MEASURED = tuple(gpu for gpu in GPUS if gpu != "L40S")

#: Measurements (microseconds) from NVIDIA's AIConfigurator database, Apache-2.0.
SPOTS = [
    ("H200-SXM", "all_reduce", 8, 8 * KIB, "vllm", 5.1),
    ("H200-SXM", "all_reduce", 8, 1 * MIB, "vllm", 14.1),
    ("H200-SXM", "all_reduce", 4, 2 * MIB, "vllm", 17.8),
    ("H200-SXM", "all_reduce", 8, 256 * MIB, "vllm", 1052.4),
    ("H200-SXM", "all_reduce", 8, 8 * KIB, "nccl", 16.7),
    ("H200-SXM", "all_reduce", 8, 8 * KIB, "flashinfer", 3.5),
    ("H100-SXM", "all_gather", 8, 64 * MIB, "vllm", 208.1),
    ("H100-SXM", "reduce_scatter", 4, 16 * KIB, "vllm", 7.9),
    ("B200-SXM", "all_reduce", 4, 16 * KIB, "vllm", 7.4),
    ("B200-SXM", "all_to_all", 8, 128 * MIB, "vllm", 236.6),
    ("A100-SXM-80GB", "all_reduce", 2, 1 * MIB, "vllm", 10.7),
    ("A100-SXM-80GB", "all_reduce", 8, 64 * MIB, "vllm", 594.2),
]


@pytest.mark.parametrize(("gpu", "op", "size", "message", "backend", "microseconds"), SPOTS)
def test_agrees_with_measurements(
    gpu: str, op: str, size: int, message: int, backend: str, microseconds: float
) -> None:
    timed = Collectives.load(gpu).time_s(op, message, size, backend)
    assert timed.time_s == pytest.approx(microseconds * 1e-6, rel=0.10)
    assert not timed.extrapolated


@pytest.mark.parametrize(
    ("gpu", "size", "limit", "below", "above"),
    [
        ("H200-SXM", 4, 512 * KIB, 3, 1.5),  # one shot, two shots (csrc/custom_all_reduce.cuh)
        ("H200-SXM", 8, 256 * KIB, 7, 1),  # one shot, symmetric memory reduced in the switch
        ("A100-SXM-80GB", 8, 256 * KIB, 7, 1.75),
        ("B200-SXM", 2, 2 * MIB, 1, 1),
        ("B200-SXM", 8, 1 * MIB, 1.75, 1),
    ],
)
def test_all_reduce_changes_kernel_where_vllm_does(gpu: str, size: int, limit: int, below: float, above: float) -> None:
    """Bytes sent per byte reduced tell the algorithm; the custom kernels take sizes strictly below their limit."""
    wire = Collectives.load(gpu).time_s("all_reduce", [limit - 1, limit], size).wire_bytes / [limit - 1, limit]
    assert wire == pytest.approx([below, above])


@pytest.mark.vllm
def test_limits_are_those_of_the_installed_vllm() -> None:
    root = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]  # vllm is installed

    def table(path: str, name: str) -> dict[str, dict[int, float]]:
        tree = ast.parse((root / path).read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                    code = compile(ast.Expression(node.value), path, "eval")
                    return eval(code, {"MiB": MIB, "KiB": KIB})  # type: ignore[no-any-return]  # a literal of vLLM's
        raise AssertionError(f"{path} has no {name}")

    utils = "distributed/device_communicators/all_reduce_utils.py"
    custom, symmetric = table(utils, "CUSTOM_ALL_REDUCE_MAX_SIZES"), table(utils, "SYMM_MEM_ALL_REDUCE_MAX_SIZES")
    fused = table("compilation/passes/fusion/allreduce_rms_fusion.py", "FI_ALLREDUCE_FUSION_MAX_SIZE_MB")
    for gpu, capability in (("H100-SXM", "9.0"), ("H200-SXM", "9.0"), ("B200-SXM", "10.0")):
        chains = load_interconnect(gpu).all_reduce
        for size, steps in chains["vllm"].items():
            limits = {name.split("_")[0]: limit for name, limit in steps}  # one, two, symm: the last of each
            assert limits.get("two", limits["one"]) == min(custom[capability][size], 8 * MIB) - 1
            assert limits["symm"] == symmetric[capability][size]
        flashinfer = {size: steps[0][1] for size, steps in chains["flashinfer"].items() if steps[0][0] == "flashinfer"}
        published = fused[int(float(capability) * 10)]  # type: ignore[index]  # this table has integer keys
        assert flashinfer == {size: limit * MIB for size, limit in published.items() if size <= 8}


@given(
    gpu=st.sampled_from(GPUS),
    op=st.sampled_from(OPERATIONS),
    size=st.integers(2, 24),
    backend=st.sampled_from(["vllm", "flashinfer", "nccl"]),
    message=st.floats(1, 1e10),
)
def test_a_curve_is_the_fastest_path_of_the_library_that_is_asked(
    gpu: str, op: str, size: int, backend: str, message: float
) -> None:
    node = load_interconnect(gpu)
    timed = Collectives.load(gpu).time_s(op, message, size, backend)
    name = f"nccl.{op}"
    if op == "all_reduce" and size <= 8:
        name = next((n for n, most in node.all_reduce.get(backend, {}).get(size, ()) if message <= most), name)
    fastest = min(
        path.fixed_s(size) + message * max(path.slope_s(size), path.wire_factor(size) / 1e30)
        for path in node.fits[name].usable(size)
    )
    if size <= 8:
        assert timed.time_s == pytest.approx(fastest, rel=1e-9) or timed.time_s > fastest  # the link's own limit
    else:
        assert timed.time_s > fastest
    assert timed.time_s >= timed.wire_bytes / node["link_bandwidth_bytes_per_s"]
    assert timed.relative_std >= node.fits[name].std
    if size not in node.fits[name].sizes or message > node.fits[name].max_bytes:
        assert timed.extrapolated


@given(
    gpu=st.sampled_from(GPUS),
    op=st.sampled_from(OPERATIONS),
    size=st.integers(2, 24),
    messages=st.lists(st.floats(0, 1e10), min_size=2),
)
def test_nccl_never_gets_faster_with_more_bytes_or_gpus(gpu: str, op: str, size: int, messages: list[float]) -> None:
    collectives, ordered = Collectives.load(gpu), np.sort(messages)
    times = collectives.time_s(op, ordered, size, "nccl").time_s
    assert np.all(np.diff(times) >= -1e-12)
    if op != "all_reduce":  # the switch's reduction makes 5 GPUs faster than 4
        assert np.all(collectives.time_s(op, ordered, size + 1, "nccl").time_s >= times - 1e-12)


def test_vectorised_over_any_shape_and_equal_to_one_by_one() -> None:
    curve = Collectives.load("H100-SXM").curve("all_reduce", 8)
    messages = np.geomspace(256, 1 << 31, 60).reshape(3, 20)
    together = curve(messages)
    assert together.time_s.shape == together.extrapolated.shape == (3, 20)
    assert together.time_s.ravel().tolist() == [float(curve(one).time_s) for one in messages.ravel()]


def test_what_is_not_measured_is_flagged_and_wider() -> None:
    h200 = Collectives.load("H200-SXM")
    known = h200.time_s("all_reduce", 1 * MIB, 8)
    for unknown in (
        h200.time_s("all_reduce", 1 * MIB, 6),
        h200.time_s("all_reduce", 1 * MIB, 16),
        h200.time_s("all_reduce", 4096 * MIB, 8),
        Collectives.load("L40S").time_s("all_reduce", 1 * MIB, 8),
        Collectives.load("a GPU of next year").time_s("all_reduce", 1 * MIB, 8),
    ):
        assert unknown.extrapolated
        assert unknown.relative_std > 2 * known.relative_std


def test_an_unknown_gpu_without_nvlink_is_taken_for_a_pcie_one() -> None:
    pcie = Collectives.load("RTX", nvlink=False).time_s("all_gather", 64 * MIB, 4)
    nvlink = Collectives.load("RTX").time_s("all_gather", 64 * MIB, 4)
    assert pcie.time_s > 5 * nvlink.time_s


def test_across_nodes_the_adapters_bound_an_all_to_all() -> None:
    """256 MiB among 16 GPUs: half of it leaves the node, over one 400 Gb/s adapter a GPU."""
    h100 = Collectives.load("H100-SXM")
    across = h100.time_s("all_to_all", 256 * MIB, 16)
    bandwidth = h100.interconnect["network_bandwidth_bytes_per_s"]
    assert across.time_s == pytest.approx(128 * MIB / bandwidth, rel=0.01)
    assert across.time_s > 3 * h100.time_s("all_to_all", 256 * MIB, 8).time_s


def test_one_gpu_needs_no_collective() -> None:
    timed = Collectives.load("H100-SXM").time_s("all_reduce", [0, 1e6], 1)
    assert timed.time_s.tolist() == timed.wire_bytes.tolist() == [0, 0]


def test_energy_is_power_over_the_time_and_energy_per_byte_sent() -> None:
    h100 = Collectives.load("H100-SXM")
    node = h100.interconnect
    timed = h100.time_s("all_gather", 64 * MIB, 4)
    energy = h100.energy_j(timed)
    expected = node["communication_power_w"] * timed.time_s + node["energy_per_link_byte_j"] * 48 * MIB
    assert energy.energy_j == pytest.approx(float(expected))
    # Measured on two H200s and taken over: less sure than there, surer than where no such GPU was measured.
    stds = []
    for gpu in ("H200-SXM", "H100-SXM", "B200-SXM"):
        other = Collectives.load(gpu)
        stds.append(float(other.energy_j(other.time_s("all_gather", 64 * MIB, 4)).relative_std))
    assert 0.03 < stds[0] < stds[1] < 0.3 < stds[2]
    fitted = Collectives(node.with_values({"communication_power_w": 0.0, "energy_per_link_byte_j": 0.0}, "test"))
    assert fitted.energy_j(timed).energy_j == 0
    assert fitted.energy_j(timed).relative_std == 0


def test_a_kernel_costs_what_its_collective_does() -> None:
    h100 = Collectives.load("H100-SXM")
    shape = CollectiveShape("all_reduce", "tp", 4)
    kernel = Kernel("layer.reduce", "collective", 32, collective=shape)
    seconds, joules = h100.kernel(kernel, np.array([1e4, 1e6]))
    timed = h100.time_s("all_reduce", np.array([1e4, 1e6]), 4)
    assert seconds.tolist() == timed.time_s.tolist()  # of one launch, not of 32
    assert joules.tolist() == h100.energy_j(timed).energy_j.tolist()
    with pytest.raises(EnergyLensError, match=r"layer.mlp.*not a collective"):
        h100.kernel(Kernel("layer.mlp", "linear", 1), 1.0)


def test_reached_is_the_share_of_tokens_that_need_a_rank() -> None:
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((20_000, 64)), axis=1)[:, :6]  # 6 of 64 experts, 8 on each of 8 ranks
    assert reached(6, 64, 8) == pytest.approx(np.mean(np.any(chosen < 8, axis=1)), abs=0.01)
    assert reached(8, 8, 8) == 1.0
    assert reached(1, 8, 1) == pytest.approx(1 / 8)


def test_expert_exchange_grows_with_tokens_and_experts_chosen() -> None:
    h200 = Collectives.load("H200-SXM")
    tokens = np.array([1, 128, 4096])
    for kernel in h200.interconnect.expert_exchange:
        few = h200.expert_exchange_s(kernel, tokens, 7168, 2, 256, 8)
        many = h200.expert_exchange_s(kernel, tokens, 7168, 8, 256, 8)
        assert np.all(np.diff(many.time_s) > 0)
        assert np.all(many.time_s > few.time_s)
        across = h200.expert_exchange_s(kernel, tokens, 7168, 8, 256, 32)
        assert np.all(across.time_s > many.time_s)
        assert across.extrapolated.all()
    # Measured: 494 us for 4096 tokens of 7168, 8 of 256 experts; the fit is within its own spread.
    dispatch = h200.expert_exchange_s("high_throughput_dispatch", 4096, 7168, 8, 256, 8)
    assert dispatch.time_s == pytest.approx(494e-6, rel=0.2)


def test_bad_arguments_are_named() -> None:
    h100 = Collectives.load("H100-SXM")
    with pytest.raises(EnergyLensError, match=r"collective.*'allreduce'.*did you mean 'all_reduce'"):
        h100.time_s("allreduce", 1, 8)
    with pytest.raises(EnergyLensError, match=r"backend.*'gloo'.*accepted: flashinfer, nccl, vllm"):
        h100.time_s("all_reduce", 1, 8, "gloo")
    with pytest.raises(EnergyLensError, match=r"size: 0"):
        h100.time_s("all_reduce", 1, 0)
    with pytest.raises(EnergyLensError, match=r"kernel.*low_latency_dispatch"):
        h100.expert_exchange_s("low_latency", 1, 7168, 8, 256, 8)
    with pytest.raises(EnergyLensError, match=r"coefficient of interconnect H100-SXM.*communication_power_w"):
        h100.interconnect.with_values({"communication_power": 1.0}, "test")


@pytest.mark.parametrize("gpu", GPUS)
def test_every_number_has_a_source(gpu: str) -> None:
    node = load_interconnect(gpu)
    assert known_interconnects() == sorted(GPUS)
    assert node.measured == (gpu in MEASURED)
    assert {f"nccl.{op}" for op in OPERATIONS} <= set(node.fits)
    for coefficient in node.coefficients.values():
        assert coefficient.value > 0
        assert coefficient.source
        assert coefficient.unit
    for fit in node.fits.values():
        assert fit.source
        assert 0 < fit.std < 0.6
    chained = {name for by_size in node.all_reduce.values() for steps in by_size.values() for name, _ in steps}
    assert chained <= set(node.fits)


def test_a_profile_with_a_field_missing_is_refused() -> None:
    raw = json.loads((INTERCONNECTS / "H100-SXM.json").read_text())
    parse(raw)
    for name in raw:
        with pytest.raises(KeyError, match=name):
            parse({key: value for key, value in raw.items() if key != name})
    raw["fits"]["one_shot"]["paths"][0]["wire"] = "ringg"
    with pytest.raises(EnergyLensError, match=r"wire of path one_shot.*did you mean 'ring'"):
        parse(raw)


@pytest.mark.parametrize(
    ("gpu", "ranks", "outside"), [("H100-SXM", 8, False), ("H100-SXM", 16, True), ("L40S", 2, True), ("L40S", 1, False)]
)
def test_steps_with_collectives_that_nobody_measured_say_so(gpu: str, ranks: int, outside: bool) -> None:
    model = EnergyModel("llama-3.1-70b", Deployment(gpu=gpu, tensor_parallel_size=ranks))
    assert ("extrapolated" in model.flags) == outside


def test_intervals_are_wider_where_collectives_are_extrapolated() -> None:
    model = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=16))
    step = model.predict(steps_from_requests([(1, 1000)] * 64, model.masks))
    curve = Collectives.load("H100-SXM").curve("all_reduce", 16)
    share = step.communication_s / step.time_s
    assert np.all(step.high_s / step.time_s - 1 > 1.645 * curve.relative_std[0] * share)
    assert share > 0.3
