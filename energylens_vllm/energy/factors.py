"""Factors on the few coefficients in which one GPU differs from another of its kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Factors:
    """What a profile's coefficients are multiplied by; 1 is as the profile says.

    They act before the clock is found that the power limit allows, so a GPU whose bytes cost more throttles earlier.
    """

    static: float = 1.0  #: static power: leakage, fans and clock trees differ from unit to unit and with temperature
    memory: float = 1.0  #: energy of a byte through HBM
    compute: float = 1.0  #: energy of arithmetic
    communication: float = 1.0  #: energy of collectives
    limit: float = 1.0  #: mean power at the power limit

    def is_neutral(self) -> bool:
        """Whether nothing is changed."""
        return self == Factors()
