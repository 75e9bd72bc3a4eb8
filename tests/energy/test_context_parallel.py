"""Steps whose contexts or tokens are split over GPUs, against counting and against how vLLM deals them out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm import Deployment, EnergyLensError, EnergyModel
from energylens_vllm.architectures import load_config
from energylens_vllm.einsum.kernel import Mask
from energylens_vllm.energy.batch import causal_pairs, keys_read, steps_from_requests

LATENT, GROUPED = "deepseek-v2-lite", "qwen3-30b-a3b"  # 4 KV heads
SPLIT: dict[str, Any] = {"tensor_parallel_size": 8, "decode_context_parallel_size": 2}
DECODES, LONG, FRESH = [(1, 1000)] * 64, [(1, 30_000)] * 32, [(4096, 0)]


def model(name: str = LATENT, release: str | None = "0.33.0", **given: Any) -> EnergyModel:
    return EnergyModel(name, Deployment(gpu="H200-SXM", vllm_release=release, **given))


@pytest.mark.parametrize("name", [LATENT, GROUPED])
def test_each_gpu_reads_its_part_of_the_cache(name: str) -> None:
    whole, split = model(name, tensor_parallel_size=8), model(name, **SPLIT)
    for batch in (DECODES, LONG):
        before, after = whole.step(batch), split.step(batch)
        assert after.components["kv_cache"] == pytest.approx(before.components["kv_cache"] / 2, rel=0.02)
        assert after.components["communication"] > before.components["communication"]
        assert sum(after.components.values()) == pytest.approx(after.energy_j)
    assert split.step(LONG).energy_j < whole.step(LONG).energy_j
    assert split.step(DECODES[:1]).time_s > whole.step(DECODES[:1]).time_s, "exchanges take their time"


def test_it_is_flagged_and_less_sure() -> None:
    whole, split = model(tensor_parallel_size=8), model(**SPLIT)
    assert "context_parallel" in split.flags
    assert "context_parallel" not in whole.flags

    def width(of: EnergyModel) -> float:
        step = of.step(DECODES)
        return step.interval_j[1] / step.interval_j[0]

    assert width(split) > width(whole)
    assert width(model(tensor_parallel_size=8, prefill_context_parallel_size=2)) > width(split)


def test_fresh_prompts_have_no_context_to_exchange() -> None:
    """Latent attention's never had; others' not from 0.32 on, unless something else in the step has a context."""
    for release, spared in (("0.25.1", False), ("0.33.0", True)):
        alone, split = (model(GROUPED, release, tensor_parallel_size=8, decode_context_parallel_size=n) for n in (1, 2))
        fresh = [each.step(FRESH).components["communication"] for each in (alone, split)]
        assert (fresh[0] == fresh[1]) == spared
        mixed = [each.step(FRESH + DECODES).components["communication"] for each in (alone, split)]
        assert mixed[1] > 1.2 * mixed[0]
    alone, split = model(tensor_parallel_size=8), model(**SPLIT)
    assert split.step(FRESH).components == pytest.approx(alone.step(FRESH).components)


def test_a_latent_cache_travels_once_for_each_context_token() -> None:
    split = model(**SPLIT)
    sent = [split.step([(512, context)]).components["communication"] for context in (0, 100_000, 200_000, 400_000)]
    assert sent[1] > sent[0]
    assert sent[3] - sent[2] == pytest.approx(2 * (sent[2] - sent[1]), rel=1e-3)


def test_steps_of_0_25_wait_for_the_host_where_they_split_grouped_contexts() -> None:
    def waits_j(name: str, release: str, **given: Any) -> float:
        steps = steps_from_requests(DECODES, [Mask()])
        return float(model(name, release, tensor_parallel_size=8, **given).predict(steps).components["host_gap"][0])

    split = {"decode_context_parallel_size": 2}
    assert waits_j(GROUPED, "0.25.1", **split) > 0
    assert waits_j(GROUPED, "0.33.0", **split) == waits_j(GROUPED, "0.25.1") == waits_j(LATENT, "0.25.1", **split) == 0


def test_options_change_what_they_are_about() -> None:
    plain, one_exchange, repeated = (
        model(**SPLIT, **given) for given in ({}, {"dcp_comm_backend": "a2a"}, {"dcp_q_replicate": True})
    )
    times = [each.step(DECODES[:1]).time_s for each in (plain, one_exchange, repeated)]
    assert max(times[1:]) < times[0], "fewer exchanges"
    assert repeated.step(FRESH).components["linear"] > plain.step(FRESH).components["linear"]
    assert one_exchange.step(FRESH).components["linear"] == plain.step(FRESH).components["linear"]


# -- tokens that are split --------------------------------------------------------------------------------------------

requests = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), min_size=1, max_size=4)


@given(requests, st.sampled_from([2, 4]))
def test_chunks_of_prompts_and_shares_of_decodes(prompts: list[tuple[int, int]], ranks: int) -> None:
    """Counted request by request; prompts are as long as their chunks are whole."""
    whole = [(new * 2 * ranks, computed) for new, computed in prompts]
    decodes = [(1, 7)] * 3 * ranks
    mine = steps_from_requests(whole + decodes, [Mask()]).chunked(ranks)
    chunks = []
    for new, computed in whole:
        size = new // (2 * ranks)
        chunks += [(size, computed + at * size) for at in (0, 2 * ranks - 1)]  # rank 0's
    (seen,) = mine.attention
    assert mine.tokens[0] == sum(new for new, _ in chunks) + 3
    assert mine.sequences[0] == len(chunks) + 3
    assert (mine.decode_tokens[0], mine.decode_sequences[0]) == (3, 3)
    assert (seen.decode_keys[0], seen.decode_pairs[0]) == (3 * 8, 3 * 8)
    assert seen.prefill_keys[0] == pytest.approx(sum(keys_read(*chunk, Mask()) for chunk in chunks))
    assert seen.prefill_pairs[0] == pytest.approx(sum(causal_pairs(*chunk, Mask()) for chunk in chunks))


@pytest.mark.vllm
@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20), st.booleans()), min_size=1, max_size=6))
def test_ranks_have_what_vllm_gives_them(given: list[tuple[int, int, bool]]) -> None:
    """`PCPManager` deals chunks out; the mean rank of ours has the mean of theirs."""
    manager_class = pytest.importorskip("vllm.v1.worker.gpu.pcp_manager").PCPManager
    ranks = 4
    batch = [(1, computed + 1) if decode else (8 * new, computed) for new, computed, decode in given]
    decoding = np.array([decode for *_, decode in given])
    manager = SimpleNamespace(pcp_world_size=ranks, dcp_world_size=1, shard_decode_requests=True)
    manager.replicated_requests = lambda *arguments: manager_class.replicated_requests(manager, *arguments)
    tokens, pairs, keys = [], [], []
    for rank in range(ranks):
        dealt = manager_class._iter_rank_chunks(manager, rank, np.array([new for new, _ in batch]), ~decoding)
        rows = [(length, batch[index][1] + offset) for index, offset, length in dealt]
        tokens.append(sum(length for length, _ in rows))
        pairs.append(sum(causal_pairs(*row, Mask()) for row in rows))
        keys.append(sum(keys_read(*row, Mask()) for row in rows))
    mine = steps_from_requests(batch, [Mask()], decoding.tolist()).chunked(ranks)
    (seen,) = mine.attention
    assert mine.tokens[0] == pytest.approx(np.mean(tokens))
    assert seen.prefill_pairs[0] + seen.decode_pairs[0] == pytest.approx(np.mean(pairs))
    assert seen.prefill_keys[0] + seen.decode_keys[0] == pytest.approx(np.mean(keys))


def test_split_tokens_take_as_many_more_gpus() -> None:
    one, two = model(), model(prefill_context_parallel_size=2, enable_expert_parallel=True)
    assert (one.deployment.num_gpus, two.deployment.num_gpus) == (1, 2)
    assert two.idle_power_w == 2 * one.idle_power_w
    for batch in (FRESH, DECODES):
        before, after = one.step(batch), two.step(batch)
        assert sum(after.components.values()) == pytest.approx(after.energy_j)
        assert after.components["communication"] > before.components["communication"] == 0
        assert after.components["experts"] == pytest.approx(before.components["experts"], rel=0.15)
    assert two.step([(8192, 0)] * 2).time_s < one.step([(8192, 0)] * 2).time_s


def test_attention_over_split_tokens_adds_up_to_that_of_one_gpu() -> None:
    one, four = model(), model(prefill_context_parallel_size=4)
    for batch in ([(8192, 0)], [(1, 4096)] * 64):
        before, after = one.step(batch).components["attention"], four.step(batch).components["attention"]
        # Clocks are not the same, and energy follows them.
        assert after == pytest.approx(before, rel=0.25)


def test_ranks_of_split_tokens_expand_contexts_each_for_itself() -> None:
    """Every rank makes keys and values of nearly twice the context, for its two chunks of each prompt."""

    def expanding_j(of: EnergyModel) -> float:
        short, long = (of.step([(64, context)]).components["linear"] for context in (20_000, 40_000))
        return long - short

    one, two = expanding_j(model()), expanding_j(model(prefill_context_parallel_size=2))
    assert two == pytest.approx(2 * 2 * one, rel=0.15)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size: 2 does not divide tensor_parallel_size 1"),
        ({"decode_context_parallel_size": 0}, "decode_context_parallel_size: 0 is not a positive integer"),
        ({"prefill_context_parallel_size": -1}, "prefill_context_parallel_size: -1 is not a positive integer"),
        ({**SPLIT, "prefill_context_parallel_size": 2},
         "decode_context_parallel_size: 2 is not modelled together with prefill_context_parallel_size 2; acc"),
        ({**SPLIT, "dcp_comm_backend": "a2b"}, "dcp_comm_backend: unknown value 'a2b' .did you mean 'a2a'"),
        ({"dcp_comm_backend": "a2a"}, "dcp_comm_backend: 'a2a' needs a decode_context_parallel_size above 1"),
        ({"dcp_q_replicate": True}, "dcp_q_replicate: True needs a decode_context_parallel_size above 1"),
        ({**SPLIT, "enable_dbo": True, "all2all_backend": "deepep_low_latency"}, "enable_dbo: vLLM has it without"),
        ({"prefill_context_parallel_size": 2, "all2all_backend": "deepep_low_latency"},
         "all2all_backend: 'deepep_low_latency' is not modelled with prefill_context_parallel_size 2; accepted: all"),
        *(({"prefill_context_parallel_size": 2, "release": release},
           "vllm_release: 0.25.1 has no prefill context parallelism; accepted: 0.32 or later")
          for release in ("0.25.1", None)),  # and what the profile was measured with
        ({"prefill_context_parallel_size": 2, "name": "llama-3.1-8b"}, "only of latent attention"),
        ({"tensor_parallel_size": 8, "decode_context_parallel_size": 2, "name": "gpt-oss-20b"}, "window or chunks"),
    ],
)  # fmt: skip
def test_what_vllm_refuses_is_one_clear_line(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnergyLensError, match=problem):
        model(**given)


def test_windows_of_single_layers_count_too() -> None:
    with pytest.raises(EnergyLensError, match="has a window or chunks"):
        EnergyModel(load_config("gemma-2-9b"), Deployment(tensor_parallel_size=16, decode_context_parallel_size=2))
