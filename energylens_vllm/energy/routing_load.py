"""Load that top-k routing puts on experts and on expert-parallel ranks: expectations in closed form.

A token selects `selected` distinct experts; expert i with chance c_i (the chances sum to `selected`), tokens
independently. Then, for T tokens, an expert's rows are binomial(T, c_i), and everything the step model needs follows:
experts awake, rows padded to the fused kernel's tiles, rows of the hottest rank. Tests check each against simulation.

All functions take arrays of token counts; `LoadTable` tabulates them, so that a lookup costs microseconds.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.timing import expert_tile_rows
from energylens_vllm.errors import EnergyLensError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Routing:
    """`chance`: probability that a token selects each expert, of shape (layers, experts); each row sums to `selected`.

    One row stands for all layers where they are alike.
    """

    chance: Array
    selected: int

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.chance.shape[1])

    @classmethod
    def uniform(cls, experts: int, selected: int) -> Routing:
        """Every expert alike, as a balanced router aims for."""
        return cls.of_counts(np.ones(experts), selected)

    @classmethod
    def zipf(cls, experts: int, selected: int, alpha: float) -> Routing:
        """The i-th most popular expert is selected in proportion to i^-alpha; alpha 0 is uniform.

        Which expert is how popular is a fixed shuffle: popularity knows nothing of an expert's number.
        """
        if not (math.isfinite(alpha) and alpha >= 0):
            raise EnergyLensError(f"routing: zipf exponent {alpha!r} is not a number of at least 0")
        order = np.random.default_rng(0).permutation(experts)
        return cls.of_counts((1.0 + order) ** -alpha, selected)

    @classmethod
    def of_counts(cls, counts: npt.ArrayLike, selected: int) -> Routing:
        """From how often each expert was selected: shape (experts,) or (layers, experts), in any unit.

        No expert is selected twice by one token, so none has a chance above 1: what exceeds it is spread over the
        others in proportion. Raises EnergyLensError for counts that are negative, not finite, or name fewer experts
        than a token selects.
        """
        weights = np.atleast_2d(np.asarray(counts, dtype=np.float64))
        if weights.ndim != 2 or not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise EnergyLensError(
                "routing: counts must be finite numbers of at least 0, of shape (experts,) or (layers, experts)"
            )
        if np.any(np.count_nonzero(weights, axis=1) < selected):
            raise EnergyLensError(f"routing: fewer experts with a count above 0 than the {selected} a token selects")
        chance = np.zeros_like(weights)
        for row, weight in zip(chance, weights, strict=True):
            certain = np.zeros(len(weight), dtype=bool)
            while True:
                rest = weight * ~certain
                row[:] = np.where(certain, 1.0, rest * ((selected - certain.sum()) / max(rest.sum(), 1e-300)))
                if not np.any(row > 1 + 1e-12):
                    break
                certain |= row >= 1
        return cls(np.minimum(chance, 1.0), selected)

    @classmethod
    def parse(cls, spec: str | os.PathLike[str], experts: int, selected: int, layers: int) -> Routing:
        """From a setting: "uniform", "zipf:1.2", "collapsed" (all tokens choose the same experts, as random weights
        may), or the path of a file of counts (see `read_counts`) of a model with so many `layers` of experts."""
        text = os.fspath(spec)
        if text == "uniform":
            return cls.uniform(experts, selected)
        if text == "collapsed":
            return cls.of_counts(np.arange(experts) < selected, selected)
        if text.startswith("zipf:"):
            try:
                alpha = float(text.removeprefix("zipf:"))
            except ValueError:
                raise EnergyLensError(f'routing: {text!r} has no number after "zipf:"') from None
            return cls.zipf(experts, selected, alpha)
        return cls.counted(read_counts(text), experts, selected, layers, text)

    @classmethod
    def counted(
        cls, counts: npt.ArrayLike, experts: int, selected: int, layers: int, where: str = "the table"
    ) -> Routing:
        """`of_counts` for a model of so many experts in so many layers: a row for each layer, or one for all. Raises
        EnergyLensError, with `where`, for other numbers."""
        table = np.atleast_2d(np.asarray(counts, dtype=np.float64))
        if table.shape[-1] != experts:
            raise EnergyLensError(f"routing: {where} counts {table.shape[-1]} experts, the model has {experts}")
        if len(table) not in (1, layers):
            raise EnergyLensError(
                f"routing: {where} counts {len(table)} layers, the model has {layers} with experts; accepted: a row "
                "for each of them, or one for all"
            )
        return cls.of_counts(table, selected)

    def active_experts(self, tokens: npt.ArrayLike) -> Array:
        """Expected number of experts that T tokens wake, averaged over layers."""
        count = np.asarray(tokens, dtype=np.float64)
        asleep = np.exp(np.multiply.outer(count, _log_missed(self.chance)))
        mean: Array = (1 - asleep).sum(axis=-1).mean(axis=-1)
        return mean


def read_counts(path: str | os.PathLike[str]) -> Array:
    """Selections of each expert, of shape (layers, experts), from a file: a .npy array, or JSON (a list of numbers, or
    a list of them for each layer). Raises EnergyLensError naming the file."""
    file = pathlib.Path(path)
    try:
        counts = np.load(file, allow_pickle=False) if file.suffix == ".npy" else json.loads(file.read_text())
        return np.atleast_2d(np.asarray(counts, dtype=np.float64))
    except FileNotFoundError:
        raise EnergyLensError(
            f'routing: no file {os.fspath(path)!r}; accepted: "uniform", "zipf:ALPHA", "collapsed", or a file of counts'
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise EnergyLensError(
            f"routing: {file} is no file of counts (.npy, or a JSON list of numbers): {error}"
        ) from error


@dataclass(frozen=True, eq=False)
class Placement:
    """Which experts lie on which rank. `logical`: of shape (layers, slots), the expert in each slot, rank by rank;
    an expert with several slots has replicas that share its tokens. `slots`: of shape (ranks,), slots of each rank."""

    logical: Integers
    slots: Integers

    @property
    def ranks(self) -> int:
        return len(self.slots)

    def by_rank(self, values: Array) -> Array:
        """Sums over the slots (last axis) of each rank."""
        starts = np.concatenate([[0], np.cumsum(self.slots)[:-1]])
        summed: Array = np.add.reduceat(values, starts, axis=-1)
        return summed

    @classmethod
    def linear(cls, experts: int, ranks: int) -> Placement:
        """Contiguous blocks, the first ranks one expert longer where it does not divide (vLLM's default)."""
        _check_ranks(experts, ranks)
        sizes = [len(part) for part in np.array_split(np.arange(experts), ranks)]
        return cls(np.arange(experts)[None, :], np.array(sizes))

    @classmethod
    def round_robin(cls, experts: int, ranks: int) -> Placement:
        """Expert i on rank i mod ranks (vLLM's `expert_placement_strategy="round_robin"`)."""
        _check_ranks(experts, ranks)
        parts = [np.arange(rank, experts, ranks) for rank in range(ranks)]
        return cls(np.concatenate(parts)[None, :], np.array([len(part) for part in parts]))

    @classmethod
    def balanced(cls, routing: Routing, ranks: int, redundant: int = 0) -> Placement:
        """What vLLM's load balancer makes of loads in proportion to `routing` (EPLB, `num_redundant_experts`).

        Replicas go, one by one, to the expert with the most load per replica; replicas, heaviest first, to the rank
        with the least load that has a slot free. Source: vllm/distributed/eplb/policy/default.py, on one node.
        """
        slots, rest = divmod(routing.experts + redundant, ranks)
        if redundant < 0 or rest:
            raise EnergyLensError(
                f"redundant experts: {redundant} with {routing.experts} experts do not fill {ranks} ranks evenly"
            )
        rows = [_pack(*_replicate(chance, redundant), ranks, slots) for chance in routing.chance]
        return cls(np.stack(rows), np.full(ranks, slots))


def _check_ranks(experts: int, ranks: int) -> None:
    if not 1 <= ranks <= experts:
        raise EnergyLensError(f"expert-parallel ranks: {ranks}; accepted: 1 to {experts}, the number of experts")


def _replicate(load: Array, redundant: int) -> tuple[Integers, Array]:
    """Experts of all slots, and each slot's load."""
    logical, replicas = list(range(len(load))), np.ones(len(load))
    for _ in range(redundant):
        heaviest = int(np.argmax(load / replicas))
        logical.append(heaviest)
        replicas[heaviest] += 1
    return np.array(logical), (load / replicas)[logical]


def _pack(logical: Integers, load: Array, ranks: int, slots: int) -> Integers:
    """Experts rank by rank."""
    ranks_load, taken = np.zeros(ranks), [[] for _ in range(ranks)]  # type: tuple[Array, list[list[int]]]
    for slot in np.argsort(-load):
        rank = int(np.argmin(ranks_load))
        taken[rank].append(int(logical[slot]))
        ranks_load[rank] = ranks_load[rank] + load[slot] if len(taken[rank]) < slots else np.inf
    return np.array([expert for rank in taken for expert in rank])


class RankLoads(NamedTuple):
    """Load of one layer's experts on a rank, for each token count; means over layers. Rows are (token, expert) pairs.

    Energy follows the mean rank, for every rank's work counts; time follows the hottest, for the others wait. Which
    rank is hottest differs by what bounds the kernel, so each `hottest` is the expected maximum of its own quantity.
    """

    active: Array  #: experts awake on the mean rank
    rows: Array
    padded_rows: Array  #: rows with each expert's rounded up to whole tiles
    hottest_active: Array
    hottest_rows: Array
    hottest_padded_rows: Array

    @property
    def imbalance(self) -> Array:
        """Rows of the hottest rank over those of the mean rank: 1 is balance, the excess is waiting."""
        ratio: Array = np.divide(self.hottest_rows, self.rows, out=np.ones_like(self.rows), where=self.rows > 0)
        return ratio


def rank_loads(routing: Routing, placement: Placement, tokens: npt.ArrayLike, tile_rows: npt.ArrayLike) -> RankLoads:
    """Expected loads for T tokens of the whole expert-parallel group. `tile_rows`: rows of the fused-MoE kernel's block
    for each T (Triton's BLOCK_SIZE_M)."""
    count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
    tile = np.broadcast_to(np.asarray(tile_rows, dtype=np.int64), count.shape)
    chance = _slot_chances(routing, placement)
    by_rank = placement.by_rank
    awake = 1 - np.exp(np.multiply.outer(count, _log_missed(chance)))  # (N, layers, slots)
    tiles = [_tiles(chance, n, int(t)) for n, t in zip(count, tile, strict=True)]
    rows = np.multiply.outer(count, chance)
    mean_tiles, tile_variance = (np.stack(column) for column in zip(*tiles, strict=True))
    per_tile = tile[:, None, None].astype(np.float64)
    most = float(placement.slots.max())
    moments: tuple[tuple[Array, Array, Array], ...] = (  # mean, variance, and the most that a rank can have
        (awake, awake * (1 - awake), np.full(len(count), most)),
        (rows, rows * (1 - chance), count * min(most, routing.selected)),
        (mean_tiles * per_tile, tile_variance * per_tile**2, np.full(len(count), np.inf)),
    )
    # Selections of one token without repetition are independent ones conditioned on their sum, and so are the ranks'
    # rows. Where ranks are alike, conditioning on the sum leaves the expected maximum as it is without.
    repeat = routing.experts / max(routing.experts - 1, 1) if routing.selected > 1 else 1.0
    mean, hottest = [], []
    for expected, variance, limit in moments:
        ranks = by_rank(expected)  # (N, layers, ranks)
        peak = _expected_maximum(ranks, np.sqrt(by_rank(variance) * repeat)) if placement.ranks > 1 else ranks[..., 0]
        mean.append(ranks.mean(axis=(1, 2)))
        hottest.append(np.minimum(peak, limit[:, None]).mean(axis=1))
    return RankLoads(*mean, *hottest)


def imbalance(routing: Routing, placement: Placement) -> float:
    """Rows of the hottest rank over those of the mean rank, averaged over layers, in steps of so many tokens that
    chance evens out: 1 is balance."""
    sums = placement.by_rank(_slot_chances(routing, placement))
    return float((sums.max(axis=1) / sums.mean(axis=1)).mean())


def _slot_chances(routing: Routing, placement: Placement) -> Array:
    """Chance that a token goes to each slot, of shape (layers, slots): an expert's is shared by its replicas."""
    logical = np.broadcast_to(placement.logical, (len(routing.chance), placement.logical.shape[1]))
    replicas = np.stack([np.bincount(row, minlength=routing.experts) for row in logical])
    chance: Array = np.take_along_axis(routing.chance / np.maximum(replicas, 1), logical, axis=1)
    return chance


def _log_missed(chance: Array) -> Array:
    """log(1 - chance), finite also where the chance is 1."""
    missed: Array = np.log1p(-np.minimum(chance, 1 - 1e-12))
    return missed


#: Chances at which the expected tiles are evaluated when there are more different ones than this.
_CHANCES = 256


def _tiles(chance: Array, tokens: float, tile: int) -> tuple[Array, Array]:
    """Mean and variance of the tiles that binomial(tokens, chance) rows take, exactly.

    With D = (-N) mod b, ceil(N / b) = (N + D) / b, and D is a finite Fourier sum over the b-th roots of unity w, for
    which the binomial has E[w^N] = (1 - c + c w)^T and E[N w^N] = T c w (1 - c + c w)^(T - 1).
    """
    values, index = np.unique(chance, return_inverse=True)
    if len(values) > _CHANCES:
        grid = np.geomspace(max(values[0], 1e-9), values[-1], _CHANCES)
        mean, variance = _tiles(grid, tokens, tile)
        return np.interp(chance, grid, mean), np.interp(chance, grid, variance)
    gap = (-np.arange(tile)) % tile
    waves, square_waves = np.fft.rfft(gap) / tile, np.fft.rfft(gap**2) / tile
    twice = np.full(len(waves), 2.0)  # a wave and its conjugate
    twice[0] = 1.0
    if tile % 2 == 0:
        twice[-1] = 1.0
    roots = np.exp(2j * np.pi * np.arange(len(waves)) / tile)
    base = 1 - values[:, None] + values[:, None] * roots
    moments = base**tokens
    rows = tokens * values
    row_moments = rows[:, None] * roots * base ** max(tokens - 1, 0)
    waste = (moments * (waves * twice)).real.sum(axis=1)
    square = (moments * (square_waves * twice)).real.sum(axis=1)
    cross = (row_moments * (waves * twice)).real.sum(axis=1)
    mean = (rows + waste) / tile
    second = (rows * (1 - values) + rows**2 + 2 * cross + square) / tile**2
    variance = np.maximum(second - mean**2, 0.0)
    return mean[index].reshape(chance.shape), variance[index].reshape(chance.shape)


def _expected_maximum(mean: Array, std: Array) -> Array:
    """E[max] over the last axis of independent normals, by integrating its distribution function."""
    std = np.maximum(std, 1e-9)
    low = (mean - 6 * std).max(axis=-1)
    high = (mean + 6 * std).max(axis=-1)
    steps = np.linspace(0, 1, 65)
    at = low[..., None] + (high - low)[..., None] * steps  # (..., 65)
    below = np.ones_like(at)
    for rank in range(mean.shape[-1]):
        below *= _normal_cdf((at - mean[..., rank, None]) / std[..., rank, None])
    above = 1 - below
    maximum: Array = low + (high - low) / 64 * (above.sum(axis=-1) - (above[..., 0] + above[..., -1]) / 2)
    return maximum


def _normal_cdf(x: Array) -> Array:
    """Within 3e-4 of the normal distribution function (the approximation that gives GELU its tanh form)."""
    cdf: Array = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return cdf


@dataclass(frozen=True, eq=False)
class LoadTable:
    """`rank_loads` tabulated over token counts, interpolated between: exact up to 128 tokens, within 1 % above."""

    tokens: Array
    loads: RankLoads

    @classmethod
    def build(
        cls,
        routing: Routing,
        placement: Placement,
        tile_rows: Callable[[Array], Array] = expert_tile_rows,
        max_tokens: int = 65536,
        every: int = 1,
    ) -> LoadTable:
        """Takes tens of milliseconds where layers are alike, seconds where each of 48 has its own counts. `every` n-th
        entry alone, and those about a change of tiles, makes it as much faster: within 1 % of the whole table."""
        grid = np.unique(np.concatenate([np.arange(129), [512, 513], np.geomspace(128, max_tokens, 160).round()]))
        tile = tile_rows(grid)
        changes = np.append(tile[1:] != tile[:-1], True)
        grid = grid[(np.arange(len(grid)) % every == 0) | (grid <= 16) | changes | np.roll(changes, 1)]
        loads = rank_loads(routing, placement, grid, tile_rows(grid))
        return cls(grid.astype(np.float64), loads)

    def __call__(self, tokens: npt.ArrayLike) -> RankLoads:
        """Loads for any number of token counts; beyond the table rows grow in proportion."""
        count = np.asarray(tokens, dtype=np.float64)
        beyond = np.maximum(count / self.tokens[-1], 1.0)
        found = RankLoads(*(np.interp(count, self.tokens, values) for values in self.loads))
        return found._replace(
            rows=found.rows * beyond, padded_rows=found.padded_rows * beyond,
            hottest_rows=found.hottest_rows * beyond, hottest_padded_rows=found.hottest_padded_rows * beyond,
        )  # fmt: skip
