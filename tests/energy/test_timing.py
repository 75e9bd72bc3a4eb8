"""Forms of kernel times: limits that hold whatever the coefficients, causes that must show, and measured kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.energy import timing
from energylens_vllm.hardware.profile import known_gpus, load_profile

SMS = 132
#: Coefficients near those of an H200, round numbers.
P: dict[str, float] = {
    "memory.bandwidth_bytes_per_s": 4.8e12,
    "compute.bfloat16.peak_flops": 1.07e15,
    "linear.bfloat16.launch_s": 2.5e-6,
    "linear.bfloat16.memory_efficiency": 0.88,
    "linear.bfloat16.compute_efficiency": 0.95,
    "linear.bfloat16.corner": 2.0,
    "linear.bfloat16.sm_load_bytes_per_s": 2e11,
    "linear.bfloat16.split_s": 3e-6,
    "linear.bfloat16.dispatch_s": 0.0,
    "linear.bfloat16.quantize_passes": 0.0,
    "experts.bfloat16.launch_s": 6e-6,
    "experts.bfloat16.memory_efficiency": 0.95,
    "experts.bfloat16.compute_efficiency": 0.46,
    "experts.bfloat16.corner": 2.3,
    "experts.bfloat16.sm_load_bytes_per_s": 7e10,
    "experts.bfloat16.row_s": 1e-9,
    "experts.bfloat16.tile_s": 1.6e-6,
    "experts.bfloat16.empty_tile_s": 2e-7,
    "experts.bfloat16.quantize_passes": 0.0,
    "attention.decode.launch_s": 9e-6,
    "attention.decode.memory_efficiency": 0.9,
    "attention.decode.compute_efficiency": 0.4,
    "attention.decode.corner": 8.0,
    "attention.decode.sequence_s": 2e-8,
    "attention.decode.sequence_head_s": 2.4e-8,
    "attention.decode.split_s": 1.6e-6,
    "attention.prefill.launch_s": 8e-6,
    "attention.prefill.memory_efficiency": 0.8,
    "attention.prefill.compute_efficiency": 0.6,
    "attention.prefill.tile_keys": 64.0,
    "attention.prefill.tile_s": 5e-7,
    "elementwise.launch_s": 2.4e-6,
    "elementwise.memory_efficiency": 0.7,
}
SHAPE = st.sampled_from([128, 768, 1024, 2048, 4096, 6144, 14336, 51200])


def gemm(rows: Any, n: int, k: int, p: Any = P, **changed: float) -> timing.Timed:
    p = {**p, **{f"linear.bfloat16.{name}": value for name, value in changed.items()}} if changed else p
    return timing.linear(p, "bfloat16", SMS, rows, n, k, 2.0 * n * k, 2.0 * rows * (n + k))


def decode(sequences: Any, context: Any, heads: int = 32, kv_heads: int = 8) -> timing.Timed:
    return timing.attention_decode(
        P, "attention.decode", SMS, sequences, sequences * context, heads=heads, kv_heads=kv_heads,
        bytes_per_key=kv_heads * 2 * 128 * 2, flops_per_pair=4 * 128 * heads,
    )  # fmt: skip


def prefill(sequences: Any, new: Any, heads: int = 32) -> timing.Timed:
    return timing.attention_prefill(
        P, SMS, sequences, sequences * new, sequences * new * (new + 1) / 2, heads=heads,
        moved_bytes=sequences * new * (heads + 8) * 128 * 4, flops_per_pair=4 * 128 * heads,
    )  # fmt: skip


def expert_gemm(
    tokens: float, tiles: list[tuple[float, float]], active: float = 128, n: int = 1536, k: int = 2048, p: Any = P
) -> timing.Timed:
    return timing.expert_gemm(p, "bfloat16", SMS, tokens * 8, active * n * k * 2.0, 0.0, tiles, n=n, k=k, total=128)


@given(st.floats(1e-7, 1e-2), st.floats(1e-7, 1e-2), st.floats(1, 8))
def test_roofline_is_between_the_longer_and_the_sum(memory: float, compute: float, corner: float) -> None:
    timed = timing.roofline(memory, compute, corner)
    assert max(memory, compute) * (1 - 1e-9) <= timed.time_s <= (memory + compute) * (1 + 1e-9)


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.floats(1, 8))
def test_clocked_part_of_the_roofline_is_its_derivative(memory: float, compute: float, corner: float) -> None:
    step = 1e-4
    slower = timing.roofline(memory, compute * (1 + step), corner).time_s
    faster = timing.roofline(memory, compute * (1 - step), corner).time_s
    assert timing.roofline(memory, compute, corner).clocked_s == pytest.approx((slower - faster) / (2 * step), rel=1e-3)


@given(st.integers(1, 40000), SHAPE, SHAPE)
def test_no_gemm_beats_the_nominal_rates(rows: int, n: int, k: int) -> None:
    timed = gemm(rows, n, k)
    assert timed.time_s > 2.0 * n * k / P["memory.bandwidth_bytes_per_s"]
    assert timed.time_s > 2.0 * rows * n * k / P["compute.bfloat16.peak_flops"]
    assert 0 <= timed.clocked_s <= timed.time_s


@given(st.integers(1, 20000), st.integers(1, 20000), SHAPE, SHAPE)
def test_more_rows_never_take_less(one: int, other: int, n: int, k: int) -> None:
    few, many = sorted((one, other))
    assert gemm(few, n, k).time_s <= gemm(many, n, k).time_s * (1 + 1e-12)


def test_arrays_give_what_scalars_give() -> None:
    rows = np.array([1.0, 63, 64, 65, 128, 1000, 8192])
    timed = gemm(rows, 4096, 14336)
    for index, each in enumerate(rows):
        alone = gemm(float(each), 4096, 14336)
        assert (timed.time_s[index], timed.clocked_s[index]) == pytest.approx((alone.time_s, alone.clocked_s))


def test_a_tile_more_than_the_sms_hold_starts_another_wave() -> None:
    """132 tiles of 128 x 256 fill the GPU once; one row more needs others, and the work hardly grew."""
    columns = 12 * 256
    tiles_s = [
        timing.gemm_tiles_s(rows, columns, 8192, SMS, 1e15, 2e11, 1.0, 2.0, 2.0) for rows in (11 * 128, 11 * 128 + 1)
    ]
    assert tiles_s[1] > 1.2 * tiles_s[0]


def test_splitting_k_helps_small_grids_only() -> None:
    def tiles_s(n: int, split_s: float) -> float:
        return float(timing.gemm_tiles_s(16, n, 16384, SMS, 1e15, 2e11, split_s, 2.0, 2.0))

    assert tiles_s(256, 3e-6) < 0.5 * tiles_s(256, 1.0)
    assert tiles_s(64 * SMS * 8, 3e-6) == tiles_s(64 * SMS * 8, 1.0)


def test_quantizing_kernels_pay_a_pass_over_their_input() -> None:
    extra = gemm(4096, 4096, 8192, quantize_passes=2.0).time_s - gemm(4096, 4096, 8192).time_s
    assert extra == pytest.approx(2 * 4096 * 8192 * 4 / 4.8e12)


def test_the_dispatch_step_is_above_128_rows() -> None:
    for rows, expected in ((128, 0.0), (129, 5e-6)):
        extra = gemm(rows, 4096, 4096, dispatch_s=5e-6).time_s - gemm(rows, 4096, 4096).time_s
        assert extra == pytest.approx(expected, abs=1e-12)


def test_a_compute_floor_counts_only_where_it_is_longer() -> None:
    def at(floor_s: float) -> float:
        return float(timing.linear(P, "bfloat16", SMS, 8192, 8192, 8192, 1.3e8, 2.7e8, compute_floor_s=floor_s).time_s)

    assert at(1e-6) == at(0.0)
    assert at(5e-3) > 5e-3


def test_tuned_experts_are_never_slower_than_one_configuration() -> None:
    for tokens in (1, 16, 64, 300, 1000, 8192):
        rows, active = tokens * 8.0, 128 * -np.expm1(tokens * np.log1p(-8 / 128))
        tiles = [(float(t), float(timing.expert_padded_rows(rows, active, t))) for t in timing.EXPERT_TILES]
        best = expert_gemm(tokens, tiles, active).time_s
        assert best == pytest.approx(min(expert_gemm(tokens, [tile], active).time_s for tile in tiles), rel=1e-9)


def test_padding_and_blocks_without_work_cost_time() -> None:
    exact, padded = expert_gemm(2048, [(128.0, 16384.0)]), expert_gemm(2048, [(128.0, 24576.0)])
    assert padded.time_s > 1.2 * exact.time_s
    without = {**P, "experts.bfloat16.empty_tile_s": 0.0}
    # 64 tokens on 128 experts, of which this GPU holds one: nearly all of the grid finds no work.
    remote = [(32.0, 32.0)]
    assert expert_gemm(64, remote, active=1).time_s > expert_gemm(64, remote, active=1, p=without).time_s + 1e-6


def test_experts_that_quantize_pay_a_pass_over_their_input() -> None:
    p = {**P, "experts.bfloat16.quantize_passes": 3.0}

    def at(rows: float | None) -> float:
        timed = timing.expert_gemm(
            p, "bfloat16", SMS, 8192.0, 1e8, 0.0, [(64.0, 8192.0)], n=1536, k=2048, total=128, quantized_rows=rows
        )
        return float(timed.time_s)

    assert at(1024.0) - at(None) == pytest.approx(3 * 1024 * 2048 * 4 / 4.8e12)


def test_experts_read_their_weights_once() -> None:
    """A decode step of 64 tokens on 128 experts of Qwen3-30B-A3B's shape is bound by HBM."""
    timed = expert_gemm(64, [(32.0, 128 * 32.0)])
    read_s = 128 * 1536 * 2048 * 2 / 4.8e12
    assert read_s < timed.time_s < 1.6 * read_s


@given(st.integers(1, 512), st.integers(1, 131072))
def test_decode_reads_its_cache(sequences: int, context: int) -> None:
    timed = decode(float(sequences), float(context))
    assert timed.time_s > sequences * context * 4096 / 4.8e12
    assert timed.time_s <= decode(float(sequences), context + 1.0).time_s


def test_sequences_beyond_one_block_an_sm_wait() -> None:
    full, more = decode(16.0, 1.0).time_s, decode(64.0, 1.0).time_s
    waiting = (64 * 8 - SMS) * P["attention.decode.sequence_head_s"]
    assert more - full == pytest.approx(waiting + 48 * 2e-8, rel=0.02)


def test_steps_without_a_phase_pay_nothing_for_it() -> None:
    for timed in (decode(np.zeros(2), np.full(2, 100.0)), prefill(np.zeros(2), np.full(2, 100.0))):
        assert np.all(timed.time_s == 0)
        assert np.all(timed.clocked_s == 0)


def test_prefill_grows_with_the_square_of_a_long_prompt() -> None:
    assert prefill(1.0, 32768.0).time_s / prefill(1.0, 16384.0).time_s == pytest.approx(4, rel=0.1)
    assert prefill(4.0, 8192.0).time_s < prefill(1.0, 32768.0).time_s


def test_a_single_head_is_bound_by_its_longest_tile() -> None:
    one, eight = prefill(1.0, 2048.0, heads=1).time_s, prefill(1.0, 2048.0, heads=8).time_s
    assert eight < 1.5 * one


def test_elementwise_is_one_pass() -> None:
    timed = timing.elementwise(P, np.array([0.0, 4.8e9 * 0.7]))
    assert timed.time_s == pytest.approx([2.4e-6, 1e-3 + 2.4e-6])
    assert np.all(timed.clocked_s == 0)


@pytest.mark.parametrize("gpu", known_gpus())
@pytest.mark.parametrize("kernel", ["bfloat16", "fp8", "fp8_block", "int8_wo", "int4_wo", "mxfp4"])
def test_shipped_profiles_time_every_format(gpu: str, kernel: str) -> None:
    p = load_profile(gpu)
    rows = np.array([1.0, 100, 8192])
    linear = timing.linear(p, kernel, p.sm_count, rows, 4096, 4096, 2.0**24, 2.0 * rows * 8192)
    grouped = timing.expert_gemm(
        p, kernel, p.sm_count, rows * 8, 2.0**28, 0.0, [(64.0, rows * 8 + 64 * 32)], n=1536, k=2048, total=128
    )  # fmt: skip
    for timed in (linear, grouped):
        assert np.all(np.diff(timed.time_s) > 0)
        assert np.all((timed.time_s > 1e-6) & (timed.time_s < 0.1))


#: Measurements (microseconds) of single operations from NVIDIA's AIConfigurator database, Apache-2.0: H200-SXM, vLLM
#: 0.22.0, bf16, timed in CUDA graphs.
GEMMS = [  # rows, n, k
    (1, 4096, 4096, 12.5),
    (33, 12288, 4096, 28.0),
    (129, 12288, 4096, 29.8),
    (1, 1024, 4096, 6.7),
    (65, 16384, 8192, 67.7),
    (16384, 128, 2048, 21.3),
]
DECODES = [(1, 1024, 11), (32, 1024, 42), (32, 8192, 254), (256, 1024, 279)]  # 32 heads of 128, 8 KV heads
PREFILLS = [(1, 1024, 27), (8, 1024, 183), (1, 4096, 238), (8, 4096, 1725)]


@pytest.mark.parametrize(("rows", "n", "k", "microseconds"), GEMMS)
def test_agrees_with_measured_gemms(rows: int, n: int, k: int, microseconds: float) -> None:
    assert gemm(rows, n, k, load_profile("H200-SXM")).time_s == pytest.approx(microseconds * 1e-6, rel=0.2)


def test_agrees_with_measured_attention() -> None:
    p = load_profile("H200-SXM")
    for sequences, context, microseconds in DECODES:
        timed = timing.attention_decode(
            p, "attention.decode", SMS, sequences, sequences * context, heads=32, kv_heads=8, bytes_per_key=4096,
            flops_per_pair=4 * 128 * 32,
        )  # fmt: skip
        assert timed.time_s == pytest.approx(microseconds * 1e-6, rel=0.2)
    for sequences, new, microseconds in PREFILLS:
        timed = timing.attention_prefill(
            p, SMS, sequences, sequences * new, sequences * new * (new + 1) / 2, heads=32,
            moved_bytes=sequences * new * 40 * 128 * 4, flops_per_pair=4 * 128 * 32,
        )  # fmt: skip
        assert timed.time_s == pytest.approx(microseconds * 1e-6, rel=0.25)
