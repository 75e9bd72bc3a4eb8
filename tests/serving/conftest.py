"""A predictor whose answers anyone can check in the head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.metrics import COMPONENTS
from energylens_vllm.serving.predictor import Predictions


class TokenPredictor:
    """A quarter of a joule a prefill token, half a joule a decode token and a quarter of that wasted, a millisecond a
    step."""

    def predict(self, batches: Sequence[Batch]) -> Predictions:
        prefill = np.array([(batch.num_tokens - batch.num_decode_tokens) / 4 for batch in batches])
        decode = np.array([batch.num_decode_tokens / 2 for batch in batches])
        joules = prefill + decode
        return Predictions(
            time_s=np.full(len(batches), 1e-3),
            energy_j=joules,
            components=dict.fromkeys(COMPONENTS, np.zeros(len(batches))) | {"weights": joules},
            phases={"prefill": prefill, "decode": decode},
            low_j=joules / 2,
            high_j=joules * 2,
            flags=frozenset({"uncalibrated_gpu"}),
            waste={"expert_imbalance": decode / 4},
        )


@pytest.fixture
def predictor() -> TokenPredictor:
    """See TokenPredictor."""
    return TokenPredictor()
