"""Which prefixes each replica should have in its cache: those of the prompts that went there, the latest.

An estimate of the router's own, in bounded memory: replicas are not asked. It forgets the blocks that were used least
recently, the ends of prompts first, as vLLM's prefix cache does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

#: Blocks kept for a replica at most: a million tokens of `prompts.BLOCK_TOKENS`, about 2 MB.
MOST_BLOCKS = 16_384


class Prefixes:
    """Blocks of prompts by replica. Not safe for several threads at once."""

    def __init__(self) -> None:
        self._seen: dict[str, OrderedDict[int, None]] = {}

    def matched(self, replica: str, blocks: Sequence[int]) -> int:
        """How many blocks from the start of a prompt the replica should have."""
        seen = self._seen.get(replica)
        if not seen:
            return 0
        for count, block in enumerate(blocks):
            if block not in seen:
                return count
        return len(blocks)

    def add(self, replica: str, blocks: Sequence[int], most: int = MOST_BLOCKS) -> None:
        """A prompt has gone to the replica, whose cache holds `most` blocks."""
        seen = self._seen.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the start is used last, so it stays longest
            seen[block] = None
            seen.move_to_end(block)
        for _ in range(len(seen) - min(most, MOST_BLOCKS)):
            seen.popitem(last=False)

    def forget(self, replica: str) -> None:
        """The replica has gone, or its cache was lost."""
        self._seen.pop(replica, None)

    def __len__(self) -> int:
        return sum(len(seen) for seen in self._seen.values())
