"""How tokens choose experts: counted in vLLM's workers, learnt in the engine's process.

Workers are other processes than the engine, and nothing of vLLM carries numbers from one to the other beside a step's
outputs. So each worker that counts puts its table into a file now and then (`publish`), in a folder that both name
after vLLM's instance, and the engine reads those files when it reports (`LearntRouting`). Neither waits for the other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from energylens_vllm.files import whole

if TYPE_CHECKING:  # workers load this module, too
    from energylens_vllm.energy import EnergyModel
    from energylens_vllm.serving.guard import Guard
    from energylens_vllm.serving.increments import Increments
    from energylens_vllm.serving.observer import StepObserver
    from energylens_vllm.serving.predictor import ModelPredictor

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

FORGOTTEN_S = 7 * 24 * 3600.0
#: Tokens of a layer that have to be counted before predictions follow: an expert that one in 16 selects has 256 then.
MIN_TOKENS = 4096
#: Tokens that are remembered: what was counted before counts ever less, so that a change of traffic is followed.
MEMORY_TOKENS = 1_000_000
#: Share of the choices that have to be others than those predicted for (total variation, mean of the layers) before
#: the loads are worked out anew, which takes a second of a thread's time; and no sooner than so many seconds later.
LEAST_CHANGE = 0.01
LEAST_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Selections of each expert, of shape (layers, experts), since counting began; `selected` by each token."""

    layers: Integers  #: numbers of the layers, ascending
    selections: Integers
    selected: int

    @classmethod
    def joined(cls, parts: list[Counts]) -> Counts:
        """The layers of several workers, each of which has some (pipeline stages)."""
        layers = np.concatenate([part.layers for part in parts])
        order = np.argsort(layers)
        return cls(layers[order], np.concatenate([part.selections for part in parts])[order], parts[0].selected)


def folder(instance: str, engine: int) -> Path:
    """Where the workers of one engine put their counts: a folder that only this user can enter. `instance` is vLLM's
    name for all of its processes. Folders that nobody has written to for a week are removed: their engines were killed.
    """
    base = Path(tempfile.gettempdir()) / f"energylens-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to somebody else")
    for other in base.iterdir():
        if time.time() - other.stat().st_mtime > FORGOTTEN_S:
            shutil.rmtree(other, ignore_errors=True)
    path = base / f"{instance}-{engine}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def publish(into: Path, worker: int, counts: Counts) -> None:
    """Put a worker's counts where the engine looks; readers find the old ones or these, nothing between."""
    into.mkdir(mode=0o700, exist_ok=True)
    with whole(into / f"{worker}.npz", "wb") as file:
        np.savez(file, layers=counts.layers, selections=counts.selections, selected=np.array(counts.selected))


class Reader:
    """Reads what the workers of one engine have published."""

    def __init__(self, at: Path) -> None:
        self._at = at
        self._seen: list[tuple[str, int]] = []

    def __call__(self) -> Counts | None:
        """All workers' counts, None if there is nothing new."""
        paths = sorted(self._at.glob("*.npz"))
        seen = [(path.name, path.stat().st_mtime_ns) for path in paths]
        if not paths or seen == self._seen:
            return None
        found = Counts.joined([_load(path) for path in paths])
        self._seen = seen
        return found


def _load(path: Path) -> Counts:
    with np.load(path, allow_pickle=False) as stored:
        return Counts(stored["layers"], stored["selections"], int(stored["selected"]))


def follow(observer: StepObserver, at: Path) -> None:
    """Have an engine's predictions follow how tokens choose experts, as workers publish it in the folder `at`."""
    from energylens_vllm.serving.predictor import ModelPredictor

    if isinstance(observer.predictor, ModelPredictor):
        observer.listeners.append(LearntRouting(Reader(at), observer.predictor, observer.guard, observer.clock))


class LearntRouting:
    """Has the predictor follow what was counted. One of the observer's listeners.

    The loads of experts are worked out by a thread of their own; until they are, predictions go on with the old ones.
    """

    def __init__(
        self,
        read: Callable[[], Counts | None],
        predictor: ModelPredictor,
        guard: Guard,
        clock: Callable[[], float],
    ) -> None:
        self._read, self._predictor, self._guard, self._clock = read, predictor, guard, clock
        self._before: Counts | None = None
        self._recent: Array | None = None
        self._used: Array | None = None  #: chances that the predictor knows, or is about to
        self._used_s = float("-inf")
        self._learning: threading.Thread | None = None
        self._learnt: EnergyModel | None = None  #: set by that thread

    def __call__(self, steps: Any, predictions: Any, increments: Increments) -> None:
        """Look for new counts, and take over what has been learnt of earlier ones."""
        self._take_over(increments)
        counts = self._read()
        if counts is None:
            return
        new = self._new(counts)
        increments.add("energylens_expert_selections_total", float(new.sum()))
        recent = self._remember(new, counts.selected)
        if len(recent) < self._predictor.model.cascade.expert_layers:
            return  # another pipeline stage's worker has yet to publish
        if recent.sum(axis=1).min() < MIN_TOKENS * counts.selected:
            return
        # One more of each: an expert that was never chosen has a chance all the same.
        chances = (recent + 1) / (recent + 1).sum(axis=1, keepdims=True)
        increments.set("energylens_expert_hottest_ratio", float(chances.max(axis=1).mean()) * chances.shape[1])
        if self._is_new(chances):
            self._used, self._used_s = chances, self._clock()
            self._learning = threading.Thread(
                target=self._learn, args=(recent + 1,), name="energylens-routing", daemon=True
            )
            self._learning.start()

    def wait(self) -> None:
        """Until what is being learnt has been."""
        if self._learning is not None:
            self._learning.join()

    def _new(self, counts: Counts) -> Integers:
        """Selections since the last counts; all of them if a worker has begun anew."""
        before, self._before = self._before, counts
        if before is None or before.selections.shape != counts.selections.shape:
            return counts.selections
        new = counts.selections - before.selections
        return counts.selections if new.min(initial=0) < 0 else new

    def _remember(self, new: Integers, selected: int) -> Array:
        recent = new.astype(np.float64)
        if self._recent is not None and self._recent.shape == recent.shape:
            recent += self._recent
        most = recent.sum(axis=1).max() / (MEMORY_TOKENS * selected)
        self._recent = recent / max(most, 1.0)
        return self._recent

    def _is_new(self, chances: Array) -> bool:
        if self._learning is not None or self._clock() - self._used_s < LEAST_INTERVAL_S:
            return False
        if self._used is None or self._used.shape != chances.shape:
            return True
        return float(np.abs(chances - self._used).sum(axis=1).mean()) / 2 > LEAST_CHANGE

    def _learn(self, counts: Array) -> None:
        with self._guard.at("listen"):
            model = self._predictor.model.with_expert_counts(counts)
            model.step([(1, 1)])  # works the loads out
            self._learnt = model

    def _take_over(self, increments: Increments) -> None:
        if self._learning is None or self._learning.is_alive():
            return
        self._learning, model = None, self._learnt
        if model is not None:
            self._predictor.model, self._learnt = model, None
            increments.set("energylens_expert_imbalance_ratio", model.expert_imbalance)
