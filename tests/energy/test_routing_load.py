"""Expert loads: every closed form against simulation of routers that pick distinct experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.energy.routing_load import LoadTable, Placement, RankLoads, Routing, rank_loads, read_counts
from energylens_vllm.energy.timing import expert_tile_rows
from energylens_vllm.errors import EnergyLensError


def simulate(scores: np.ndarray, selected: int, placement: Placement, tokens: int, tile: int, runs: int) -> RankLoads:
    """Means over runs of a router that adds Gumbel noise to `scores` and takes the top `selected`."""
    rng = np.random.default_rng(7)
    logical, experts = placement.logical[0], len(scores)
    rank = np.repeat(np.arange(placement.ranks), placement.slots)
    replicas = np.bincount(logical, minlength=experts)
    first = np.cumsum(replicas) - replicas
    by_expert = np.argsort(logical, kind="stable")  # slots grouped by expert
    seen = []
    for _ in range(runs):
        noisy = scores + rng.gumbel(size=(tokens, experts))
        chosen = np.argpartition(-noisy, selected - 1, axis=1)[:, :selected].ravel()
        slot = by_expert[first[chosen] + rng.integers(replicas[chosen])]  # one replica, at random
        rows = np.bincount(slot, minlength=len(logical))
        ranks = [np.bincount(rank, v, placement.ranks) for v in (rows > 0, rows, -(-rows // tile) * tile)]
        seen.append([*(v.mean() for v in ranks), *(v.max() for v in ranks)])
    return RankLoads(*np.mean(seen, axis=0))


def chances(scores: np.ndarray, selected: int) -> Routing:
    """How often that router takes each expert, over many tokens."""
    noisy = scores + np.random.default_rng(3).gumbel(size=(100_000, len(scores)))
    chosen = np.argpartition(-noisy, selected - 1, axis=1)[:, :selected]
    return Routing.of_counts(np.bincount(chosen.ravel(), minlength=len(scores)), selected)


MODELS = {  # experts, selected, ranks, exponent, redundant experts
    "qwen3-moe": (128, 8, 8, 0.0, 0),
    "qwen3-moe-skewed": (128, 8, 8, 0.8, 0),
    "qwen3-moe-balanced": (128, 8, 8, 0.8, 16),
    "mixtral": (8, 2, 4, 0.3, 0),
    "gpt-oss": (32, 4, 4, 0.5, 0),
    "deepseek": (256, 8, 16, 0.6, 0),
}


@pytest.mark.parametrize("tokens", [4, 24, 128, 640])
@pytest.mark.parametrize("name", MODELS)
def test_closed_forms_agree_with_simulation(name: str, tokens: int) -> None:
    experts, selected, ranks, alpha, redundant = MODELS[name]
    scores = -alpha * np.log1p(np.random.default_rng(5).permutation(experts))
    routing = chances(scores, selected)
    placement = Placement.balanced(routing, ranks, redundant) if redundant else Placement.linear(experts, ranks)
    tile = int(expert_tile_rows(tokens))
    predicted = rank_loads(routing, placement, tokens, tile)
    simulated = simulate(scores, selected, placement, tokens, tile, 120 if tokens > 500 else 400)
    for quantity, tolerance in zip(RankLoads._fields, (0.01, 1e-9, 0.015, 0.08, 0.06, 0.08), strict=True):
        value = getattr(predicted, quantity)[0]
        assert value == pytest.approx(float(getattr(simulated, quantity)), rel=tolerance), quantity


def test_one_token_is_the_hard_case_and_still_within_a_fifth() -> None:
    """8 selections of 256 experts over 16 ranks: counts of 0, 1, 2, 3 are no normal distribution."""
    routing, placement = Routing.uniform(256, 8), Placement.linear(256, 16)
    predicted = rank_loads(routing, placement, 1, 16)
    simulated = simulate(np.zeros(256), 8, placement, 1, 16, 3000)
    assert predicted.hottest_rows[0] == pytest.approx(float(simulated.hottest_rows), rel=0.2)


def test_uniform_active_experts_is_the_known_formula() -> None:
    tokens = np.array([0, 1, 10, 100])
    assert Routing.uniform(128, 8).active_experts(tokens) == pytest.approx(128 * (1 - (1 - 8 / 128) ** tokens))


@given(
    experts=st.integers(8, 64),
    selected=st.integers(1, 8),
    alpha=st.floats(0, 3),
    ranks=st.integers(1, 8),
    tokens=st.integers(0, 2000),
    tile=st.sampled_from([16, 64, 128]),
)
def test_loads_keep_their_bounds(experts: int, selected: int, alpha: float, ranks: int, tokens: int, tile: int) -> None:
    routing = Routing.zipf(experts, selected, alpha)
    assert routing.chance.sum() == pytest.approx(selected)
    assert np.all((routing.chance >= 0) & (routing.chance <= 1))
    loads = rank_loads(routing, Placement.linear(experts, ranks), tokens, tile)
    tolerance = 1e-6 * max(tokens, 1) + 1e-3
    assert loads.rows[0] * ranks == pytest.approx(tokens * selected)
    assert loads.active[0] * ranks == pytest.approx(routing.active_experts(tokens), abs=1e-9)
    assert loads.padded_rows[0] >= max(loads.rows[0], tile * loads.active[0]) - tolerance
    assert loads.padded_rows[0] <= loads.rows[0] + tile * loads.active[0] + tolerance
    assert loads.hottest_rows[0] >= loads.rows[0] - tolerance
    assert loads.hottest_rows[0] <= tokens * selected + tolerance
    assert loads.hottest_active[0] <= -(-experts // ranks) + tolerance


def test_an_expert_that_every_token_selects_has_every_token() -> None:
    routing = Routing.of_counts([1000, 1, 1, 1], 2)
    assert routing.chance[0] == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    loads = rank_loads(routing, Placement.linear(4, 2), 48, 16)
    assert loads.hottest_rows[0] == pytest.approx(48 + 16, rel=0.02)


def test_layers_average() -> None:
    counts = np.array([[4.0, 1, 1, 1], [1.0, 1, 1, 1]])
    both = rank_loads(Routing.of_counts(counts, 1), Placement.linear(4, 2), [64, 256], 16)
    each = [rank_loads(Routing.of_counts(row, 1), Placement.linear(4, 2), [64, 256], 16) for row in counts]
    for quantity in RankLoads._fields:
        assert getattr(both, quantity) == pytest.approx(np.mean([getattr(one, quantity) for one in each], axis=0))


def test_a_table_says_what_the_formulas_say() -> None:
    routing, placement = Routing.zipf(64, 6, 0.7), Placement.linear(64, 8)
    table = LoadTable.build(routing, placement)
    tokens = np.array([0, 1, 33, 97, 300, 512, 513, 1000, 9000])
    direct = rank_loads(routing, placement, tokens, expert_tile_rows(tokens))
    for found, exact in zip(table(tokens), direct, strict=True):
        assert found == pytest.approx(exact, rel=0.01)
    assert table(2 * 65536).rows == pytest.approx(2 * table(65536).rows)
    assert table(100.0).imbalance.shape == ()


def test_many_layers_of_different_counts_use_a_grid_of_chances_as_good_as_exact() -> None:
    counts = np.random.default_rng(0).gamma(2.0, size=(6, 128))
    together = rank_loads(Routing.of_counts(counts, 8), Placement.linear(128, 8), [50, 700], [32, 128])
    alone = [rank_loads(Routing.of_counts(row, 8), Placement.linear(128, 8), [50, 700], [32, 128]) for row in counts]
    exact = np.mean([one.padded_rows for one in alone], axis=0)
    assert together.padded_rows == pytest.approx(exact, rel=0.005)


def test_placements_of_vllm() -> None:
    assert Placement.linear(10, 4).slots.tolist() == [3, 3, 2, 2]
    robin = Placement.round_robin(5, 2)
    assert robin.logical[0].tolist() == [0, 2, 4, 1, 3]
    assert robin.slots.tolist() == [3, 2]


@pytest.mark.vllm
@pytest.mark.parametrize("redundant", [0, 8, 32])
def test_balancing_is_vllms(redundant: int) -> None:
    torch = pytest.importorskip("torch")
    policy = pytest.importorskip("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
    routing = Routing.of_counts(np.random.default_rng(1).gamma(1.0, size=(3, 64)), 6)
    ours = Placement.balanced(routing, 8, redundant)
    theirs = policy.rebalance_experts(torch.tensor(routing.chance), 64 + redundant, 1, 1, 8).numpy()
    assert np.sort(ours.logical.reshape(3, 8, -1)).tolist() == np.sort(theirs.reshape(3, 8, -1)).tolist()


def test_balancing_lowers_the_hottest_rank() -> None:
    routing = Routing.zipf(128, 8, 1.0)
    imbalance = [
        rank_loads(routing, placement, 4096, 128).imbalance[0]
        for placement in (Placement.linear(128, 8), Placement.balanced(routing, 8), Placement.balanced(routing, 8, 32))
    ]
    assert imbalance[0] > 1.2
    assert imbalance[0] > imbalance[1] > imbalance[2] >= 1.0
    assert imbalance[2] < 1.05


def test_settings_and_files(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([3, 1, 0, 4]))
    np.save(tmp_path / "layers.npy", np.arange(8).reshape(2, 4))
    assert read_counts(tmp_path / "one.json").tolist() == [[3, 1, 0, 4]]
    assert Routing.parse(tmp_path / "layers.npy", 4, 2, 2).chance.shape == (2, 4)
    assert Routing.parse(tmp_path / "one.json", 4, 2, 2).chance.shape == (1, 4), "one row stands for all layers"
    assert Routing.parse("uniform", 4, 2, 2).chance.tolist() == [[0.5] * 4]
    assert Routing.parse("zipf:0", 4, 2, 2).chance.tolist() == [[0.5] * 4]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipf:much", 'no number after "zipf:"'),
        ("zipf:-1", "exponent -1.0 is not a number of at least 0"),
        ("unifrom", "no file 'unifrom'.*uniform.*zipf:ALPHA"),
        ("bad.json", "bad.json is no file of counts"),
        ("few.json", "few.json counts 3 experts, the model has 4"),
        ("dead.json", "fewer experts with a count above 0 than the 2 a token selects"),
        ("negative.json", "at least 0"),
        ("layers.json", "layers.json counts 2 layers, the model has 3 with experts; accepted: a row for each"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"a": 1}')
    Path("few.json").write_text("[1, 2, 3]")
    Path("dead.json").write_text("[1, 0, 0, 0]")
    Path("negative.json").write_text("[1, 2, -3, 4]")
    Path("layers.json").write_text("[[1, 2, 3, 4], [4, 3, 2, 1]]")
    with pytest.raises(EnergyLensError, match=message):
        Routing.parse(spec, 4, 2, 3)


def test_bad_placements_are_named() -> None:
    with pytest.raises(EnergyLensError, match=r"ranks: 9; accepted: 1 to 8"):
        Placement.linear(8, 9)
    with pytest.raises(EnergyLensError, match="3 with 8 experts do not fill 4 ranks evenly"):
        Placement.balanced(Routing.uniform(8, 2), 4, 3)
