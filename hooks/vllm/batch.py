"""SchedulerOutput -> Batch, in two parts: what the scheduler's path keeps of it, and what is made of that later."""

from __future__ import annotations

from typing import Any

from energylens_vllm.serving.batch import NONE, Batch


class Scheduled:
    """What is kept of a SchedulerOutput until it is read: references to lists that nobody changes afterwards.

    Not the whole output, which holds the images of new requests.
    """

    __slots__ = ("drafts", "encoder", "finished", "new", "num_tokens", "old", "tokens")

    def __init__(self, output: Any) -> None:
        self.tokens: dict[str, int] = output.num_scheduled_tokens
        self.num_tokens: int = output.total_num_scheduled_tokens
        self.old = output.scheduled_cached_reqs
        self.new: list[tuple[str, int, bool]] = [
            (request.req_id, request.num_computed_tokens, request.lora_request is not None)
            for request in output.scheduled_new_reqs
        ]
        self.drafts: dict[str, list[int]] = output.scheduled_spec_decode_tokens
        self.encoder: bool = bool(output.scheduled_encoder_inputs)
        self.finished: set[str] = output.finished_req_ids


class Reader:
    """Reads one engine's steps in their order; `flags` hold for all of its steps.

    A request decodes once it has output; until then it is prefill, and again while it recomputes after a preemption,
    which shows as more new tokens than one and its drafts.
    """

    def __init__(self, flags: frozenset[str] = NONE) -> None:
        self._flags = flags
        self._lora_requests: set[str] = set()

    def __call__(self, scheduled: Scheduled) -> Batch:
        """The batch of one step."""
        old, new, tokens = scheduled.old, scheduled.new, scheduled.tokens
        drafts = {request_id: len(ids) for request_id, ids in scheduled.drafts.items()}
        request_ids, computed_tokens = old.req_ids, old.num_computed_tokens
        if not new and not drafts and scheduled.num_tokens == len(tokens) and 0 not in old.num_output_tokens:
            new_tokens, is_decode, num_decode_tokens = [1] * len(tokens), [True] * len(tokens), len(tokens)
        else:
            request_ids = [*request_ids, *(request_id for request_id, _, _ in new)]
            computed_tokens = [*computed_tokens, *(computed for _, computed, _ in new)]
            new_tokens = [tokens[request_id] for request_id in request_ids]
            is_decode = [
                outputs > 0 and count <= 1 + drafts.get(request_id, 0)
                for request_id, outputs, count in zip(old.req_ids, old.num_output_tokens, new_tokens, strict=False)
            ] + [False] * len(new)
            num_decode_tokens = sum(count for count, decodes in zip(new_tokens, is_decode, strict=True) if decodes)
        return Batch(
            request_ids,
            new_tokens,
            computed_tokens,
            is_decode,
            scheduled.num_tokens,
            num_decode_tokens,
            draft_tokens=drafts,
            cached_tokens=self._cached_tokens(scheduled),
            finished_request_ids=frozenset(scheduled.finished) if scheduled.finished else NONE,
            flags=self._flags_of(scheduled),
        )

    def _cached_tokens(self, scheduled: Scheduled) -> dict[str, int]:
        """A request that starts, or starts again, with tokens computed has found them in a cache."""
        cached = {request_id: computed for request_id, computed, _ in scheduled.new if computed}
        if resumed := scheduled.old.resumed_req_ids:
            for request_id, computed in zip(scheduled.old.req_ids, scheduled.old.num_computed_tokens, strict=True):
                if computed and request_id in resumed:
                    cached[request_id] = computed
        return cached

    def _flags_of(self, scheduled: Scheduled) -> frozenset[str]:
        self._lora_requests.difference_update(scheduled.finished)
        self._lora_requests.update(request_id for request_id, _, has_lora in scheduled.new if has_lora)
        flags = self._flags
        if scheduled.encoder:
            flags |= {"multimodal_not_modelled"}
        if self._lora_requests and not self._lora_requests.isdisjoint(scheduled.tokens):
            flags |= {"lora_not_modelled"}
        return flags
