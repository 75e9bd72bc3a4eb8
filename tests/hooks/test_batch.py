"""Batches as the scheduler describes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.hooks.vllm.batch import Reader, Recorder, Scheduled


def old(name: str, new: int, computed: int, outputs: int, resumed: bool = False) -> dict[str, Any]:
    return {"name": name, "new": new, "computed": computed, "outputs": outputs, "resumed": resumed}


def fresh(name: str, new: int, computed: int = 0, lora: bool = False) -> dict[str, Any]:
    return {"name": name, "new": new, "computed": computed, "lora": lora}


def output(
    cached: Sequence[dict[str, Any]] = (),
    fresh: Sequence[dict[str, Any]] = (),
    drafts: dict[str, int] | None = None,
    finished: Sequence[str] = (),
    images: Sequence[str] = (),
) -> Any:
    """What vLLM's scheduler would give for these requests."""
    # vLLM adds to this dict in the order of scheduling, which need not be that of the lists
    tokens = {request["name"]: request["new"] for request in (*reversed(fresh), *cached)}
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[request["name"] for request in cached],
            num_computed_tokens=[request["computed"] for request in cached],
            num_output_tokens=[request["outputs"] for request in cached],
            resumed_req_ids={request["name"] for request in cached if request["resumed"]},
        ),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=request["name"],
                num_computed_tokens=request["computed"],
                lora_request=object() if request["lora"] else None,
            )
            for request in fresh
        ],
        scheduled_spec_decode_tokens={name: [-1] * count for name, count in (drafts or {}).items()},
        scheduled_encoder_inputs={name: [0] for name in images},
        finished_req_ids=set(finished),
    )


def test_decode() -> None:
    batch = Reader()(Scheduled(output([old("a", 1, 100, 1), old("b", 1, 7, 3)], finished=["z"])))
    assert (batch.phase, batch.num_tokens, batch.num_decode_tokens) == ("decode", 2, 2)
    assert list(zip(batch.request_ids, batch.new_tokens, batch.computed_tokens, batch.is_decode, strict=True)) == [
        ("a", 1, 100, True),
        ("b", 1, 7, True),
    ]
    assert batch.finished_request_ids == {"z"}
    assert not batch.flags


def test_chunked_prefill_beside_decode() -> None:
    step = output([old("a", 1, 100, 1), old("b", 500, 512, 0)], [fresh("c", 30), fresh("d", 9, computed=16)])
    batch = Reader()(Scheduled(step))
    assert (batch.phase, batch.num_tokens, batch.num_decode_tokens) == ("mixed", 540, 1)
    assert batch.request_ids == ["a", "b", "c", "d"]
    assert list(batch.new_tokens) == [1, 500, 30, 9]
    assert list(batch.computed_tokens) == [100, 512, 0, 16]
    assert list(batch.is_decode) == [True, False, False, False]
    assert batch.cached_tokens == {"d": 16}  # b's 512 were computed in an earlier chunk


def test_the_last_token_of_a_prompt_is_prefill() -> None:
    batch = Reader()(Scheduled(output([old("a", 1, 512, 0)])))
    assert (batch.phase, batch.num_decode_tokens) == ("prefill", 0)


def test_drafts_are_decode_work() -> None:
    batch = Reader()(Scheduled(output([old("a", 4, 100, 2), old("b", 1, 7, 3)], drafts={"a": 3})))
    assert (batch.phase, batch.num_decode_tokens, batch.draft_tokens) == ("decode", 5, {"a": 3})


def test_recomputing_after_a_preemption_is_prefill() -> None:
    batch = Reader()(Scheduled(output([old("a", 90, 16, 5, resumed=True), old("b", 1, 7, 3)])))
    assert (batch.phase, batch.num_decode_tokens) == ("mixed", 1)
    assert batch.cached_tokens == {"a": 16}


def test_work_that_is_not_modelled_is_flagged() -> None:
    reader = Reader(frozenset({"draft_model_not_modelled"}))
    always = {"draft_model_not_modelled"}
    assert reader(Scheduled(output([], [fresh("a", 9)], images=["a"]))).flags == always | {"multimodal_not_modelled"}
    assert reader(Scheduled(output([], [fresh("b", 9, lora=True)]))).flags == always | {"lora_not_modelled"}
    assert reader(Scheduled(output([old("a", 1, 9, 1)]))).flags == always
    assert reader(Scheduled(output([old("a", 1, 9, 1), old("b", 1, 9, 1)]))).flags == always | {"lora_not_modelled"}
    assert reader(Scheduled(output([old("a", 1, 10, 2)], finished=["b"]))).flags == always


@pytest.mark.parametrize("count", [1, 256])
def test_what_is_kept_of_a_decode_does_not_change_with_the_schedulers_lists(count: int) -> None:
    step = output([old(str(i), 1, 1000 + i, 1) for i in range(count)])
    scheduled = Scheduled(step)
    step.scheduled_cached_reqs.num_computed_tokens[0] = 0
    batch = Reader()(scheduled)
    assert list(batch.computed_tokens) == list(range(1000, 1000 + count))
    assert (len(batch.new_tokens), batch.num_decode_tokens) == (count, count)


def recorded(steady: bool, *steps: Any) -> list[list[int]]:
    """The computed tokens of each step, read after all were recorded."""
    record = Recorder(SimpleNamespace(speculative_config=None if steady else object(), kv_transfer_config=None))
    kept = [record(step) for step in steps]
    return [list(map(int, Reader()(scheduled).computed_tokens)) for scheduled in kept]


def decodes(*computed: int, names: str = "abcdef") -> Any:
    return output([old(name, 1, count, 1) for name, count in zip(names, computed, strict=False)])


@pytest.mark.parametrize("steady", [True, False])
def test_decode_steps_in_a_row(steady: bool) -> None:
    rows = [
        (10, 20, 30), (11, 21, 31), (12, 22, 32),  # the same requests
        (13, 23), (14, 24),  # one has ended
        (25, 14), (26, 15),  # counts that do not follow: other requests at the ends
        (90, 15), (91, 16),
    ]  # fmt: skip
    assert recorded(steady, *(decodes(*row) for row in rows)) == [list(row) for row in rows]


def test_others_at_the_same_counts() -> None:
    assert recorded(True, decodes(10, 20, 30), decodes(11, 50, 31, names="axc")) == [[10, 20, 30], [11, 50, 31]]


def test_where_drafts_may_be_rejected_every_step_is_read() -> None:
    assert recorded(False, decodes(10, 20, 30), decodes(11, 18, 31)) == [[10, 20, 30], [11, 18, 31]]


def test_after_a_step_with_prefill_a_decode_step_is_read() -> None:
    mixed = output([old("a", 1, 10, 1), old("b", 1, 19, 0)])
    assert recorded(True, mixed, decodes(11, 20), decodes(12, 21)) == [[10, 19], [11, 20], [12, 21]]


def test_a_resumed_request_with_one_token_left_to_compute() -> None:
    batch = Reader()(Scheduled(output([old("a", 1, 31, 5, resumed=True)])))
    assert (batch.phase, batch.cached_tokens) == ("decode", {"a": 31})


@pytest.mark.parametrize("name", ["num_computed_tokens", "num_output_tokens", "req_ids"])
@pytest.mark.parametrize("count", [1, 2])
def test_lists_of_different_lengths_are_an_error(name: str, count: int) -> None:
    step = output([old("a", 1, 9, 1), old("b", count, 9, 1)])
    getattr(step.scheduled_cached_reqs, name).pop()
    with pytest.raises((ValueError, struct.error)):
        Reader()(Scheduled(step))
