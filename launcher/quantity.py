"""Kubernetes quantities as the server writes them.

The server compares what two field managers apply as text: ``0.5`` and ``500m`` are a conflict. So every quantity of a
manifest is written in its one canonical form.
"""

import math
import re
from fractions import Fraction

_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?:(?P<unit>[numkMGTPE]i?|Ki)|[eE](?P<exponent>[+-]?\d+))?")
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def amount(text: str) -> Fraction:
    """The number that a quantity means: bytes, cores. Raises ValueError for what is none."""
    match = _QUANTITY.fullmatch(text)
    unit = (match["unit"] or "") if match else "?"
    if match is None or unit not in _DECIMAL | _BINARY:
        raise ValueError(f"{text!r} is no Kubernetes quantity")
    scale = Fraction(1024) ** _BINARY[unit] if unit in _BINARY else Fraction(1000) ** _DECIMAL[unit]
    return Fraction(match["number"]) * scale * Fraction(10) ** int(match["exponent"] or 0)


def canonical(text: str) -> str:
    """The same quantity as the server writes it: ``0.5`` as ``500m``, ``1024Mi`` as ``1Gi``, ``1000`` as ``1k``."""
    value = amount(text)
    if text.endswith("i") and value >= 1024:
        return _written(Fraction(math.ceil(value)), 1024, _BINARY)
    return _written(Fraction(math.ceil(value * 10**9), 10**9), 1000, _DECIMAL)


def _written(value: Fraction, base: int, units: dict[str, int]) -> str:
    """With the largest unit that leaves a whole number."""
    for unit, power in sorted(units.items(), key=lambda item: -item[1]):
        if (value / Fraction(base) ** power).denominator == 1 and value:
            return f"{value / Fraction(base) ** power}{unit}"
    return str(value)
