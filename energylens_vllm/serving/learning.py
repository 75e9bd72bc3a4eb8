"""What an engine's own meter teaches of its GPUs: a few factors on the profile's coefficients, within bounds.

Each compared window says what the counter advanced by, and how its prediction would change with each factor: so many
joules for 1 % more static power, so many for 1 % dearer bytes. A Kalman filter (recursive least squares with a prior
and forgetting) takes from that what the window can tell, and no more: factors that a load does not show stay as they
are.

- The prior is that GPUs of one kind differ by 10 % (bytes cost 125 to 147 pJ on the H100s that were measured), and what
  the profile says of its own coefficients.
- Forgetting is a random walk of each factor, as far as a window shows it; a factor is never less known than at first.
- A window that surprises by more than two standard deviations counts less (Huber), one beyond six not at all, and both
  make the factors that they show less sure. So what goes on being said is believed after a while, unless it is beyond
  what GPUs of a kind differ by: that stays rejected, and while most windows are, the state is `implausible`.
- Factors stay within 0.6 to 1.4. When half of the energy hangs on factors at their bounds, the state is `bounded`. In
  it and in `implausible` the profile or the meter is wrong in a way that no factor mends, and predictions are the
  profile's own until that is over.
- Step times are measured too, of steps with prompts and without: two factors that take nothing from the meter.

Nothing is learnt of single steps, so there is no way for a factor to follow noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.metrics import LEARNING_OUTCOMES

if TYPE_CHECKING:
    from energylens_vllm.energy import EnergyModel
    from energylens_vllm.energy.factors import Factors

Array = npt.NDArray[np.float64]
Outcome = Literal["learnt", "outlier", "rejected"]

#: Factors on energy, in the order of slopes. `idle`: power without work, in which a GPU may clock down.
ENERGY = ("static", "memory", "compute", "communication", "limit", "idle")
TIME = ("decode_time", "prefill_time")  #: factors on the time of steps without prompts, and with
NAMES = (*ENERGY, *TIME)
#: What a window's energy goes to; how well each is predicted is learnt apart.
KINDS = ("idle", "decode", "prefill")

#: One standard deviation of coefficients from unit to unit of one kind of GPU.
UNIT_STD = 0.10
#: The power limit is regulated; what differs is how near to it the mean comes, or that it was set lower.
LIMIT_STD = 0.05
#: Idle GPUs differ more: some clock down.
IDLE_STD = 0.20
#: Time depends on the host as well.
TIME_STD = 0.15
#: Lowest and highest factor, in the order of `ENERGY`. Idle power is what most surely is measured, and of least harm.
BOUNDS = ((0.6,) * 5 + (0.3,), (1.4,) * 5 + (1.7,))
TIME_BOUNDS = ((0.5,) * 2, (2.0,) * 2)
#: A factor is as good as at its bound from this part of the way to it.
NEAR_BOUND = 0.9
#: Windows over which it is looked at how much of the energy hangs on factors at their bounds, and how many are
#: rejected; and how much of either is too much, and little enough again.
LOOKED_AT, FROM, TO = 6.0, 0.5, 0.25
#: Random walk of a factor in one window that is all its own. With a scatter of 2 % the last 10 windows say most.
DRIFT_STD = 0.002
HUBER, REJECTED = 2.0, 6.0
#: What a factor becomes less sure by in a window that surprises so, and is all its own.
SURPRISED_STD = 0.04
#: Windows before anything is corrected: one alone may be odd.
FIRST = 2
#: How many windows the profile's own scatter counts for, and the most that measured ones do.
SCATTER_WINDOWS = (4.0, 40.0)
LEAST_SCATTER = 0.01
HALF_WIDTH_90 = 1.645  #: of a 90 % interval, in standard deviations


class Filter:
    """Factors x of a quantity that is a + h x, with noise: their mean and covariance."""

    def __init__(
        self, std: Sequence[float], bounds: tuple[Sequence[float], Sequence[float]], drift: float = DRIFT_STD
    ) -> None:
        self.prior = np.square(np.asarray(std, dtype=np.float64))
        self.low, self.high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
        self.drift = drift
        self.factors = np.ones(len(self.prior))
        self.covariance = np.diag(self.prior)
        self.is_bounded = self.is_implausible = False
        self._bounded_share = self._rejected_share = 0.0
        self._surprise: float | None = None  # the last one, relative

    def learn(self, measured: float, intercept: float, slopes: Array, noise: float) -> tuple[Outcome, float]:
        """What one measurement of a + h x teaches, whose noise has this variance: (what came of it, a sample of that
        variance). The sample is from the difference of two surprises in a row, for what they share is no noise: the
        factors are not there yet."""
        size = abs(intercept) + float(np.abs(slopes).sum())
        if not (0.0 < measured < math.inf and 0.0 < size < math.inf and noise > 0.0):
            return "rejected", noise
        shares = np.abs(slopes) / size
        self._walk(self.drift * shares)
        surprise = measured - intercept - float(slopes @ self.factors)
        known = float(slopes @ self.covariance @ slopes)
        deviations = abs(surprise) / math.sqrt(known + noise)
        self._rejected_share += (float(deviations > REJECTED) - self._rejected_share) / LOOKED_AT
        self.is_implausible = self._rejected_share > (TO if self.is_implausible else FROM)
        if deviations > REJECTED:
            self._walk(SURPRISED_STD * shares)
            return "rejected", noise
        weighted = noise * max(1.0, deviations / HUBER)
        gain = self.covariance @ slopes / (known + weighted)
        left = np.eye(len(gain)) - np.outer(gain, slopes)
        self.covariance = left @ self.covariance @ left.T + np.outer(gain, gain) * weighted  # Joseph: stays positive
        self.factors = np.clip(self.factors + gain * surprise, self.low, self.high)
        if deviations > HUBER:
            self._walk(SURPRISED_STD * shares)
        self._look_at_bounds(np.abs(slopes * self.factors))
        relative = max(-2 * HUBER, min(surprise / math.sqrt(known + noise), 2 * HUBER)) * math.sqrt(noise)
        sample = noise if self._surprise is None else (relative - self._surprise * size) ** 2 / 2
        self._surprise = relative / size
        return ("outlier" if deviations > HUBER else "learnt"), sample

    def _look_at_bounds(self, parts: Array) -> None:
        """`parts` of the quantity hang on each factor."""
        near = (self.factors - 1.0 > NEAR_BOUND * (self.high - 1.0)) | (
            1.0 - self.factors > NEAR_BOUND * (1.0 - self.low)
        )
        self._bounded_share += (float(parts[near].sum() / max(parts.sum(), 1e-30)) - self._bounded_share) / LOOKED_AT
        self.is_bounded = self._bounded_share > (TO if self.is_bounded else FROM)

    def _walk(self, std: Array) -> None:
        """Each factor may have moved by this."""
        self._spread(np.diag(std**2))

    def widen(self, std: float) -> None:
        """Add so much to each factor's standard deviation, up to that of the prior."""
        self._spread(np.eye(len(self.prior)) * std**2)

    def _spread(self, more: Array) -> None:
        covariance = self.covariance + more
        most = np.sqrt(np.minimum(self.prior / np.diag(covariance), 1.0))
        self.covariance = covariance * np.outer(most, most)

    @property
    def std(self) -> Array:
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Factors by name, and their covariance in that order."""
        return {"factors": _named(names, self.factors), "covariance": self.covariance.tolist()}

    def read(self, kept: Mapping[str, Any], names: Sequence[str], wider: float) -> Filter:
        """A filter like this one that goes on from what `to_json` gave. Raises ValueError for what cannot be."""
        other = copy.deepcopy(self)
        other.factors = _numbers([kept["factors"][name] for name in names], self.factors.shape)
        covariance = _numbers(kept["covariance"], self.covariance.shape)
        other.covariance = (covariance + covariance.T) / 2
        if ((other.factors < self.low) | (other.factors > self.high)).any():
            raise ValueError(f"factors {kept['factors']} are out of bounds")
        if np.linalg.eigvalsh(other.covariance).min() < -1e-12:
            raise ValueError("not a covariance")
        other.widen(wider)
        return other


class Scatter:
    """How far measurements lie from predictions once the factors are right, relative, for kinds of work."""

    def __init__(self, std: npt.ArrayLike) -> None:
        self.variance = np.square(np.asarray(std, dtype=np.float64))
        self.windows = np.full(len(self.variance), SCATTER_WINDOWS[0])

    def of(self, shares: Array) -> Array:
        """The variance of work that is so much of each kind; `shares` of shape (..., kinds)."""
        return np.asarray(np.maximum(shares @ self.variance, LEAST_SCATTER**2))

    def learn(self, shares: Array, variance: float) -> None:
        """One more window, `shares` of which are of each kind."""
        self.windows = np.minimum(self.windows + shares, SCATTER_WINDOWS[1])
        self.variance = self.variance + shares / self.windows * (variance - self.variance)

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Standard deviations by name, and how many windows they are of."""
        return {"std": _named(names, np.sqrt(self.variance)), "windows": _named(names, self.windows)}

    def read(self, kept: Mapping[str, Any], names: Sequence[str]) -> Scatter:
        """What `to_json` gave. Raises ValueError for what cannot be."""
        other = Scatter(_numbers([kept["std"][name] for name in names], self.variance.shape))
        other.windows = np.clip(
            _numbers([kept["windows"][name] for name in names], self.windows.shape), *SCATTER_WINDOWS
        )
        return other


def _named(names: Sequence[str], values: Array) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _numbers(values: Any, shape: tuple[int, ...]) -> Array:
    numbers = np.array(values, dtype=np.float64)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(f"{values!r} are not {shape} finite numbers")
    return numbers


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one window tells: joules measured, and predicted as `intercept_j` + `slopes_j` x, with x as in `ENERGY`."""

    measured_j: float
    intercept_j: float
    slopes_j: Array
    shares: Array  #: of the predicted joules, those of each of `KINDS`


class Learner:
    """Learns the factors of one engine's GPUs. Only the thread that reports may use it."""

    def __init__(self, model: EnergyModel) -> None:
        prior, scatter, time_scatter = _priors(model)
        self.energy = Filter(prior, BOUNDS)
        self.scatter = Scatter(scatter)
        self.time = Filter([TIME_STD] * len(TIME), TIME_BOUNDS)
        self.time_scatter = Scatter(time_scatter)
        self.windows = 0  #: that were learnt from
        self.outcomes = dict.fromkeys(LEARNING_OUTCOMES, 0)  #: windows by what came of them

    def learn(self, evidence: Evidence) -> Outcome:
        """Take one compared window."""
        predicted_j = evidence.intercept_j + float(evidence.slopes_j @ self.energy.factors)
        noise = float(self.scatter.of(evidence.shares))
        outcome, variance = self.energy.learn(
            evidence.measured_j, evidence.intercept_j, evidence.slopes_j, noise * predicted_j**2
        )
        self.outcomes[outcome] += 1
        if outcome != "rejected":
            self.windows += 1
            self.scatter.learn(evidence.shares, variance / predicted_j**2)
        return outcome

    def learn_time(self, measured_s: float, predicted_s: Array) -> None:
        """Steps took so long together; predicted was so long for those of each kind of `TIME`, times its factor."""
        total_s = float(predicted_s @ self.time.factors)
        shares = predicted_s / predicted_s.sum()
        noise = float(self.time_scatter.of(shares))
        outcome, variance = self.time.learn(measured_s, 0.0, predicted_s, noise * total_s**2)
        if outcome != "rejected":
            self.time_scatter.learn(shares, variance / total_s**2)

    @property
    def state(self) -> str:
        """One of `metrics.LEARNING_STATES`, but "off"."""
        if self.energy.is_bounded:
            return "bounded"
        if self.energy.is_implausible:
            return "implausible"
        return "learning" if self.windows >= FIRST else "waiting"

    @property
    def is_applied(self) -> bool:
        """Whether predictions are corrected."""
        return self.state == "learning"

    @property
    def factors(self) -> Array:
        """The factors that predictions are to be corrected by, in the order of `ENERGY`."""
        return self.energy.factors if self.is_applied else np.ones(len(ENERGY))

    @property
    def on_energy(self) -> Factors:
        """The same for the step model."""
        from energylens_vllm.energy.factors import Factors

        return Factors(*self.factors[: ENERGY.index("idle")].tolist())

    @property
    def on_idle(self) -> float:
        return float(self.factors[ENERGY.index("idle")])

    @property
    def idle_std(self) -> float:
        """One relative standard deviation of idle energy."""
        return math.hypot(
            float(self.energy.std[ENERGY.index("idle")]) / self.on_idle, math.sqrt(self.scatter.variance[0])
        )

    @property
    def on_time(self) -> Array:
        """Factors on step times, in the order of `TIME`."""
        return self.time.factors if self.is_applied and not self.time.is_bounded else np.ones(len(TIME))

    def estimates(self) -> dict[str, tuple[float, float]]:
        """What is known of each factor, whether it is applied or not: (factor, standard deviation)."""
        values = [*self.energy.factors.tolist(), *self.time.factors.tolist()]
        stds = [*self.energy.std.tolist(), *self.time.std.tolist()]
        return dict(zip(NAMES, zip(values, stds, strict=True), strict=True))

    # -- to be kept over restarts ---------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All that was learnt."""
        return {
            "windows": self.windows,
            "energy": self.energy.to_json(ENERGY) | {"scatter": self.scatter.to_json(KINDS)},
            "time": self.time.to_json(TIME) | {"scatter": self.time_scatter.to_json(TIME)},
        }

    def restore(self, learnt: Mapping[str, Any], wider: float) -> None:
        """Go on from what `to_json` gave, each factor being less sure by `wider`.

        Raises EnergyLensError, and changes nothing, if it is not of that form or not possible.
        """
        try:
            energy, time, windows = learnt["energy"], learnt["time"], int(learnt["windows"])
            found = (
                self.energy.read(energy, ENERGY, wider), self.scatter.read(energy["scatter"], KINDS),
                self.time.read(time, TIME, wider), self.time_scatter.read(time["scatter"], TIME),
            )  # fmt: skip
        except (TypeError, ValueError, KeyError, OverflowError, IndexError) as error:
            raise EnergyLensError(f"learnt factors: {type(error).__name__}: {error}") from None
        self.energy, self.scatter, self.time, self.time_scatter = found
        self.windows = max(windows, 0)


def unlearnt_idle_std(model: EnergyModel) -> float:
    """How sure idle power is by the profile alone: one relative standard deviation."""
    return math.hypot(model.profile.coefficients["power.static_w"].std, UNIT_STD)


def _priors(model: EnergyModel) -> tuple[list[float], list[float], list[float]]:
    """Standard deviations: of the factors on energy, and of energy and time when the factors are right."""
    from energylens_vllm.energy.interval import COMMUNICATION_STD
    from energylens_vllm.energy.precision import format_of, kernel_format

    profile, form = model.profile, format_of(model.quantization)
    formats = {kernel_format(form, kernel) for kernel in model.kernels if kernel.gemm is not None}
    known = {
        "static": profile.coefficients["power.static_w"].std,
        "memory": profile.coefficients["energy.memory_j_per_byte"].std,
        "compute": max((profile.coefficients[f"energy.{each}.j_per_flop"].std for each in formats), default=0.0),
        "communication": COMMUNICATION_STD,
        "limit": profile.coefficients["power.limit_share"].std,
        "idle": profile.coefficients["power.static_w"].std,
    }
    least = dict.fromkeys(ENERGY, UNIT_STD) | {"limit": LIMIT_STD, "idle": IDLE_STD}
    of_kind = [profile.std[f"energy.{flag}"] for flag in model.flags if f"energy.{flag}" in profile.std]
    prior = [math.hypot(known[name], least[name], *(of_kind if name != "limit" else ())) for name in ENERGY]
    kind = "experts" if any(kernel.experts for kernel in model.kernels) else "dense"
    scatter = [profile.std[f"energy.{kind}.{phase}"] for phase in ("decode", "prefill")]
    time_scatter = [profile.std[f"time.{kind}.{phase}"] for phase in ("decode", "prefill")]
    return prior, [scatter[0], *scatter], time_scatter
