"""Predictions follow how tokens choose experts, once enough is known and without waiting for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.serving import expert_counts
from energylens_vllm.serving.expert_counts import MEMORY_TOKENS, MIN_TOKENS, Counts, LearntRouting, Reader, publish
from energylens_vllm.serving.guard import Guard
from energylens_vllm.serving.increments import Increments, Report
from energylens_vllm.serving.predictor import ModelPredictor

EXPERTS, SELECTED, LAYERS = 128, 8, 48  # of Qwen3-30B-A3B
DEPLOYMENT = Deployment(gpu="H200-SXM", tensor_parallel_size=8, enable_expert_parallel=True)
REQUESTS = [(1, 500)] * 256


def counts(tokens: int, alpha: float = 0.8, layers: Iterable[int] = range(LAYERS)) -> Counts:
    """In each layer other experts are the wanted ones."""
    numbers = np.array(list(layers))
    wanted = np.arange(1, EXPERTS + 1) ** -alpha
    shares = np.stack([np.random.default_rng(layer).permutation(wanted) for layer in numbers]) / wanted.sum()
    return Counts(numbers, np.round(shares * tokens * SELECTED).astype(np.int64), SELECTED)


class Learning:
    """A `LearntRouting` and what surrounds it; `read` is what workers have published."""

    def __init__(self, model: EnergyModel | None = None) -> None:
        self.now = 0.0
        self.published: Counts | None = None
        self.guard, self.increments = Guard(), Increments()
        self.predictor = ModelPredictor(model or EnergyModel("qwen3-30b-a3b", DEPLOYMENT))
        self.routing = LearntRouting(lambda: self.published, self.predictor, self.guard, lambda: self.now)

    def report(self, published: Counts | None = None) -> Report:
        """What two reports tell: the second takes over what the first has had learnt."""
        self.now += 60.0
        self.published = published
        self.routing([], None, self.increments)
        self.routing.wait()
        self.published = None
        self.routing([], None, self.increments)
        return self.increments.take()


def test_files_of_all_workers_are_one_table(tmp_path: Path) -> None:
    read = Reader(tmp_path)
    assert read() is None
    whole = counts(10_000)
    publish(tmp_path, 1, counts(10_000, layers=range(24, 48)))
    publish(tmp_path, 0, counts(10_000, layers=range(24)))
    found = read()
    assert found is not None
    assert found.layers.tolist() == list(range(48))
    assert found.selections.tolist() == whole.selections.tolist()
    assert found.selected == SELECTED
    assert read() is None
    publish(tmp_path, 0, counts(20_000, layers=range(24)))
    found = read()
    assert found is not None
    assert found.selections[:24].sum() > 1.9 * whole.selections[:24].sum()


def test_the_folder_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_counts.tempfile, "gettempdir", lambda: str(tmp_path))
    at = expert_counts.folder("1795715108831793384", 2)
    assert at == expert_counts.folder("1795715108831793384", 2)
    assert at.parent.stat().st_mode & 0o077 == 0
    os.utime(at, (0, 0))
    assert expert_counts.folder("1795715108831793385", 0).is_dir()
    assert not at.exists(), "of an engine that was killed long ago"
    monkeypatch.setattr(expert_counts.os, "getuid", lambda: 12345)
    (tmp_path / "energylens-12345").mkdir()
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        expert_counts.folder("1", 0)


def test_predictions_are_those_of_the_counted_routing(tmp_path: Path) -> None:
    learning, table = Learning(), counts(100_000)
    uniform = learning.predictor.model.step(REQUESTS)
    told = learning.report(table)
    np.save(tmp_path / "counts.npy", table.selections)
    given = EnergyModel(
        "qwen3-30b-a3b",
        Deployment(
            gpu="H200-SXM", tensor_parallel_size=8, enable_expert_parallel=True,
            expert_routing=str(tmp_path / "counts.npy"),
        ),
    )  # fmt: skip
    expected, learnt = given.step(REQUESTS), learning.predictor.model.step(REQUESTS)
    assert learnt.energy_j == pytest.approx(expected.energy_j, rel=2e-3)
    assert learnt.waste_j == pytest.approx(expected.waste_j, rel=5e-2)  # loads are tabulated more coarsely
    assert learnt.waste_j > 5 * uniform.waste_j
    ranks = table.selections.reshape(LAYERS, 8, -1).sum(axis=2)
    gauges = {name: value for name, _, value in told["set"]}
    assert gauges["energylens_expert_imbalance_ratio"] == pytest.approx(
        (ranks.max(axis=1) / ranks.mean(axis=1)).mean(), rel=1e-3
    )
    hottest = (table.selections.max(axis=1) / table.selections.mean(axis=1)).mean()
    assert gauges["energylens_expert_hottest_ratio"] == pytest.approx(hottest, rel=1e-3)
    assert told["add"] == [("energylens_expert_selections_total", (), float(table.selections.sum()))]


def test_few_tokens_tell_nothing() -> None:
    learning = Learning()
    before = learning.predictor.model
    told = learning.report(counts(MIN_TOKENS // 2))
    assert learning.predictor.model is before
    assert "set" not in told
    learning.report(counts(2 * MIN_TOKENS))
    assert learning.predictor.model is not before


def test_nothing_is_learnt_before_all_layers_are_counted() -> None:
    """Workers of pipeline stages publish each on its own."""
    learning = Learning()
    before = learning.predictor.model
    learning.report(counts(100_000, layers=range(24)))
    assert learning.predictor.model is before
    learning.report(counts(100_000))
    assert learning.predictor.model is not before
    assert not learning.guard.failures


def test_no_new_loads_for_what_has_hardly_changed_or_too_soon() -> None:
    learning = Learning()
    learning.report(counts(100_000))
    learnt = learning.predictor.model
    learning.report(counts(101_000))
    assert learning.predictor.model is learnt
    later = counts(101_000).selections + counts(101_000, alpha=0.0).selections
    learning.now -= 119.0  # so that it is a second after the loads were worked out
    learning.report(Counts(np.arange(LAYERS), later, SELECTED))
    assert learning.predictor.model is learnt
    learning.report(Counts(np.arange(LAYERS), later + 1, SELECTED))
    assert learning.predictor.model is not learnt


def test_what_was_counted_long_ago_is_forgotten() -> None:
    learning = Learning()
    old = counts(5 * MEMORY_TOKENS, alpha=0.5)
    learning.report(old)
    skewed = learning.predictor.model.expert_imbalance
    learning.report(Counts(old.layers, old.selections + counts(9 * MEMORY_TOKENS, alpha=0.0).selections, SELECTED))
    # Of 10 remembered tokens one is old.
    assert learning.predictor.model.expert_imbalance - 1 == pytest.approx((skewed - 1) / 10, rel=0.05)


def test_workers_that_begin_anew_are_counted_from_there() -> None:
    learning = Learning()
    learning.report(counts(100_000))
    again = counts(10_000)
    told = learning.report(again)
    assert told["add"] == [("energylens_expert_selections_total", (), float(again.selections.sum()))]


def test_counts_of_another_model_change_nothing() -> None:
    learning = Learning(EnergyModel("gpt-oss-20b", Deployment(gpu="H200-SXM")))
    before = learning.predictor.model
    told = learning.report(counts(100_000))
    assert learning.predictor.model is before
    assert dict(learning.guard.failures) == {"listen": 1}
    assert "energylens_expert_imbalance_ratio" not in {name for name, *_ in told["set"]}
