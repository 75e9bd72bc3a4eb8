"""One engine step's work, as plain lists in the order of its requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

NONE: frozenset[str] = frozenset()


@dataclass(slots=True)
class Batch:
    """What one step computes. Request i computes `new_tokens[i]` tokens on top of `computed_tokens[i]` in the KV cache.

    The lists are the scheduler's own where that saves a copy: read them, never change them.
    """

    request_ids: Sequence[str]
    new_tokens: Sequence[int]
    computed_tokens: Sequence[int] | npt.NDArray[np.int64]
    is_decode: Sequence[bool]
    num_tokens: int  #: sum of the new tokens
    num_decode_tokens: int  #: those of the requests that decode, draft tokens included
    #: request -> draft tokens of speculative decoding among its new tokens
    draft_tokens: Mapping[str, int] = field(default_factory=dict)
    #: request -> prompt tokens found in a prefix cache, for the requests that start (or start again) in this step
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    finished_request_ids: frozenset[str] = NONE  #: finished or aborted since the step before
    flags: frozenset[str] = NONE  #: names from `metrics.FLAGS`: work in it that no prediction covers

    @property
    def phase(self) -> Literal["prefill", "decode", "mixed"]:
        """What the step does as a whole."""
        if self.num_decode_tokens == self.num_tokens:
            return "decode"
        return "mixed" if self.num_decode_tokens else "prefill"
