"""The one base class of every error that bad input can raise here, and what several checks share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard

LISTED = 24  #: names that a message lists in full


class EnergyLensError(ValueError):
    """Bad input. The message names the field, the value given and what is accepted."""


def is_positive_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of at least 1; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def unknown(field: str, value: object, accepted: Iterable[object], hint: str = "") -> EnergyLensError:
    """The error for a value outside a known set: names the field, the value, the nearest match and the set, or its
    nearest members if it is large."""
    names = sorted(str(name) for name in accepted)
    near = difflib.get_close_matches(str(value), names, n=5, cutoff=0.5)
    message = f"{field}: unknown value {value!r}"
    if near:
        message += f" (did you mean {near[0]!r}?)"
    if len(names) <= LISTED:
        message += f"; accepted: {', '.join(names)}"
    else:
        message += f"; accepted: {len(names)} names such as {', '.join(near or names[:5])}"
    return EnergyLensError(f"{message}. {hint}" if hint else message)
