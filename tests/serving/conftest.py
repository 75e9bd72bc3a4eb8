"""A predictor whose answers anyone can check in the head."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.metrics import COMPONENTS
from energylens_vllm.serving.predictor import Prediction


class TokenPredictor:
    """A quarter of a joule a prefill token, half a joule a decode token, a millisecond a step."""

    def predict(self, batches: Sequence[Batch]) -> list[Prediction]:
        return [self._one(batch) for batch in batches]

    def _one(self, batch: Batch) -> Prediction:
        phases = {"prefill": (batch.num_tokens - batch.num_decode_tokens) / 4, "decode": batch.num_decode_tokens / 2}
        joules = sum(phases.values())
        components = dict.fromkeys(COMPONENTS, 0.0) | {"weights": joules}
        return Prediction(1e-3, joules, components, phases, (joules / 2, joules * 2), frozenset({"extrapolated"}))


@pytest.fixture
def predictor() -> TokenPredictor:
    """See TokenPredictor."""
    return TokenPredictor()
