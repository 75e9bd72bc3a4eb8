"""SchedulerOutput -> Batch, in two parts: what the scheduler's path keeps of it, and what is made of that later."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from energylens_vllm.serving.batch import NONE, Batch


class Scheduled:
    """What is kept of a SchedulerOutput until it is read: not the whole, which holds the images of new requests.

    Nearly all steps are one token for each of hundreds of decoding requests. Of those the counts are copied, though
    that costs more here than a reference would: a second's lists of Python integers, kept alive, would push the
    scheduler's next lists out of the CPU's caches, and reading them later would miss the caches too. If such a step
    follows another of the same requests, nothing is copied: each of them has one token more.
    """

    __slots__ = (
        "ahead", "computed", "drafts", "encoder", "finished", "first", "is_decode", "last", "new", "num_tokens",
        "outputs", "packed", "request_ids", "resumed", "tokens",
    )  # fmt: skip

    computed: list[int]
    packed: bytes  #: instead of `computed` where it is a decode: 64-bit integers,
    ahead: int  #: each to be raised by this

    def __init__(self, output: Any, before: Scheduled | None = None) -> None:
        """`before` is the step scheduled before this, where what is computed is never taken back."""
        old, tokens, new = output.scheduled_cached_reqs, output.num_scheduled_tokens, output.scheduled_new_reqs
        self.request_ids: list[str] = old.req_ids
        self.num_tokens: int = output.total_num_scheduled_tokens
        self.resumed: set[str] = old.resumed_req_ids
        self.drafts: dict[str, list[int]] = output.scheduled_spec_decode_tokens
        self.encoder: bool = bool(output.scheduled_encoder_inputs)
        self.finished: set[str] = output.finished_req_ids
        computed, outputs = old.num_computed_tokens, old.num_output_tokens
        self.is_decode = False  #: whether it is one token for each of some running requests that have output
        if (
            not new
            and not self.drafts
            and not self.resumed
            and self.num_tokens == len(tokens) == len(self.request_ids) == len(outputs) == len(computed)
        ):
            self.first, self.last = computed[0], computed[-1]
            if (
                before is not None
                and before.is_decode
                and before.first + 1 == self.first
                and before.last + 1 == self.last
                and before.request_ids == self.request_ids
            ):
                self.is_decode = True
                self.packed, self.ahead = before.packed, before.ahead + 1
            elif all(outputs):
                self.is_decode = True
                self.packed, self.ahead = struct.pack(f"{len(computed)}q", *computed), 0
        if not self.is_decode:  # references to lists that nobody changes afterwards
            self.computed, self.outputs, self.tokens = computed, outputs, tokens
        self.new: list[tuple[str, int, bool]] = [
            (request.req_id, request.num_computed_tokens, request.lora_request is not None) for request in new
        ]


class Recorder:
    """Makes a Scheduled of each of a scheduler's outputs, in their order."""

    def __init__(self, vllm_config: Any) -> None:
        # Rejected drafts and failed loads of KV blocks lower the counts of computed tokens.
        self._is_steady = vllm_config.speculative_config is None and vllm_config.kv_transfer_config is None
        self._before: Scheduled | None = None

    def __call__(self, output: Any) -> Scheduled:
        """What to keep of `output`."""
        scheduled = Scheduled(output, self._before)
        if self._is_steady:
            self._before = scheduled
        return scheduled


class Reader:
    """Reads one engine's steps in their order; `flags` hold for all of its steps.

    A request decodes once it has output; until then it is prefill, and again while it recomputes after a preemption,
    which shows as more new tokens than one and its drafts.
    """

    def __init__(self, flags: frozenset[str] = NONE) -> None:
        self._flags = flags
        self._lora_requests: set[str] = set()
        self._ones: list[int] = []
        self._trues: list[bool] = []

    def __call__(self, scheduled: Scheduled) -> Batch:
        """The batch of one step. Raises ValueError if its lists are not equally long, KeyError for a stray request."""
        request_ids, num_tokens = scheduled.request_ids, scheduled.num_tokens
        finished = frozenset(scheduled.finished) if scheduled.finished else NONE
        if scheduled.is_decode:
            if len(self._ones) != num_tokens:
                self._ones, self._trues = [1] * num_tokens, [True] * num_tokens
            computed = np.frombuffer(scheduled.packed, dtype=np.int64) + scheduled.ahead
            flags = self._flags_of(scheduled, request_ids)
            return Batch(
                request_ids,
                self._ones,
                computed,
                self._trues,
                num_tokens,
                num_tokens,
                finished_request_ids=finished,
                flags=flags,
            )
        new, tokens = scheduled.new, scheduled.tokens
        drafts = {request_id: len(ids) for request_id, ids in scheduled.drafts.items()}
        new_tokens = [tokens[request_id] for request_id in request_ids]
        is_decode = [
            produced > 0 and count <= 1 + drafts.get(request_id, 0)
            for request_id, produced, count in zip(request_ids, scheduled.outputs, new_tokens, strict=True)
        ]
        num_decode_tokens = sum(count for count, decodes in zip(new_tokens, is_decode, strict=True) if decodes)
        request_ids = [*request_ids, *(request_id for request_id, _, _ in new)]
        computed_tokens = [*scheduled.computed, *(computed for _, computed, _ in new)]
        new_tokens += [tokens[request_id] for request_id, _, _ in new]
        is_decode += [False] * len(new)
        if not len(request_ids) == len(computed_tokens) == len(tokens):
            raise ValueError(
                f"{len(request_ids)} requests, {len(computed_tokens)} counts of computed tokens, {len(tokens)} of new"
            )
        return Batch(
            request_ids,
            new_tokens,
            computed_tokens,
            is_decode,
            num_tokens,
            num_decode_tokens,
            draft_tokens=drafts,
            cached_tokens=self._cached_tokens(scheduled),
            finished_request_ids=finished,
            flags=self._flags_of(scheduled, request_ids),
        )

    def _cached_tokens(self, scheduled: Scheduled) -> dict[str, int]:
        """A request that starts, or starts again, with tokens computed has found them in a cache."""
        cached = {request_id: computed for request_id, computed, _ in scheduled.new if computed}
        if resumed := scheduled.resumed:
            for request_id, computed in zip(scheduled.request_ids, scheduled.computed, strict=True):
                if computed and request_id in resumed:
                    cached[request_id] = computed
        return cached

    def _flags_of(self, scheduled: Scheduled, request_ids: Sequence[str]) -> frozenset[str]:
        flags, lora_requests = self._flags, self._lora_requests
        if scheduled.new:
            lora_requests.update(request_id for request_id, _, has_lora in scheduled.new if has_lora)
        if lora_requests:
            lora_requests.difference_update(scheduled.finished)
            if not lora_requests.isdisjoint(request_ids):
                flags |= {"lora_not_modelled"}
        if scheduled.encoder:
            flags |= {"multimodal_not_modelled"}
        return flags
