"""Speculative decoding: drafts of some tokens, verified in one step.

With k drafts and each accepted with chance a, independently, a step yields 1 + a + .. + a^k tokens (Leviathan, Kalman
and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, equation 1), and computes k + 1
whatever comes of them. A draft model adds k decode steps of its own, one after another, and the prompts' prefill;
n-gram lookup and the like (`draft` None) add nothing on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from energylens_vllm.errors import EnergyLensError, is_positive_whole

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel
    from energylens_vllm.energy.serving import Lengths


@dataclass(frozen=True)
class Speculation:
    """`num_speculative_tokens` as vLLM's `--speculative-config` has it; `acceptance_rate`: the chance that a draft is
    kept if those before it were; `draft`: the draft model on the same GPUs. Raises EnergyLensError outside of range."""

    num_speculative_tokens: int
    acceptance_rate: float
    draft: EnergyModel | None = None

    def __post_init__(self) -> None:
        count = self.num_speculative_tokens
        if not is_positive_whole(count):
            raise EnergyLensError(f"num_speculative_tokens: {count!r} is not a positive whole number")
        if not 0 <= self.acceptance_rate <= 1:
            raise EnergyLensError(f"acceptance_rate: {self.acceptance_rate!r}; accepted: 0 to 1")

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request gains in a step, in the mean."""
        return sum(self.acceptance_rate**i for i in range(self.num_speculative_tokens + 1))

    @property
    def flags(self) -> frozenset[str]:
        return frozenset({"acceptance_assumed"}) | (self.draft.flags if self.draft is not None else frozenset())


def drafting(model: EnergyModel, drafts: Speculation, batch: float, lengths: Lengths) -> tuple[float, float]:
    """Seconds and joules that drafting adds to a mean step of a data-parallel rank with `batch` requests."""
    from energylens_vllm.energy.serving import mixture  # which imports this module

    if drafts.draft is None:
        return 0.0, 0.0
    if drafts.draft.deployment.num_gpus != model.deployment.num_gpus:
        raise EnergyLensError(
            f"speculation: the draft model is on {drafts.draft.deployment.num_gpus} GPUs; accepted: the "
            f"{model.deployment.num_gpus} of the model that it drafts for"
        )
    # The first draft comes with what the last verification kept and with new prompts, as the target's step does; the
    # others are pure decodes, which is what a mixture's first entry (no starting request) is.
    first, after = mixture(drafts.draft, batch, lengths, drafts), mixture(drafts.draft, batch, lengths)
    more = drafts.num_speculative_tokens - 1
    return (
        float(first.mean(first.predicted.time_s)[0]) + more * float(after.predicted.time_s[0]),
        float(first.mean(first.predicted.energy_j)[0]) + more * float(after.predicted.energy_j[0]),
    )
