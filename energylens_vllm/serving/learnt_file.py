"""What was learnt of a GPU, kept over restarts: one small JSON file for each engine of each deployment."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.files import whole
from energylens_vllm.serving.learning import Learner

if TYPE_CHECKING:
    from energylens_vllm.energy import EnergyModel

logger = logging.getLogger(__name__)

FORMAT = 1
#: What is read is less sure by this: the engine may have another GPU of the kind now, or a warmer one.
WIDER_STD = 0.02


class LearntFile:
    """The file of one engine in `folder`. It is for one profile, network and deployment; any other is not used."""

    def __init__(self, folder: Path, model: EnergyModel, engine: int = 0) -> None:
        """`engine` is the engine's index among data-parallel ones."""
        self._of = {
            "gpu": model.profile.name,
            "deployment": repr(model.deployment),
            "engine": engine,
            "profile": _digest(json.dumps(model.profile.to_json(), sort_keys=True)),
            "kernels": _digest(repr(model.kernels)),
        }
        self.path = folder / f"{model.profile.name}-{_digest(json.dumps(self._of))[:12]}.json"
        self._works = True

    def load(self, learner: Learner) -> bool:
        """Have `learner` go on from the file; whether it does. A file that cannot be used is logged, once."""
        try:
            kept: Any = json.loads(self.path.read_text())
            if not isinstance(kept, dict) or kept.get("format") != FORMAT or kept.get("of") != self._of:
                raise EnergyLensError("it is of another format, profile, network or deployment")
            learner.restore(kept["learnt"], WIDER_STD)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError) as error:  # EnergyLensError and JSON's are ValueErrors
            logger.warning("energylens does not use what it has learnt before, in %s: %s", self.path, error)
            return False
        logger.info(
            "energylens goes on from %d windows that it has learnt from before, in %s", learner.windows, self.path
        )
        return True

    def save(self, learner: Learner) -> None:
        """Write the file, whole or not at all. If that fails it is logged, and not tried again."""
        if not self._works:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"format": FORMAT, "saved_at": time.time(), "of": self._of, "learnt": learner.to_json()}
            with whole(self.path) as file:
                json.dump(kept, file, indent=1)
        except OSError as error:
            self._works = False
            logger.warning("energylens cannot keep what it learns: %s", error)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
