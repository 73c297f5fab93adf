"""Numbers as text for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedhl.record import Unit

MINUS = "\u2212"


def general(value: float) -> str:
    """Three significant digits; whole numbers in full."""
    text = (
        f"{value:,.0f}"
        if float(value).is_integer() and abs(value) < 1e9
        else f"{value:#.3g}".rstrip(".")
    )
    mantissa, _, exponent = text.partition("e")
    if exponent:
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa}×10{power}"
    return text.replace("-", MINUS)


def shortest(value: float) -> str:
    """A setting as its owner would type it: 0.001, 1e-05."""
    return f"{value:g}"


def three_decimals(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)


def amount(value: float) -> str:
    """One decimal below a hundred, none above."""
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", MINUS)


def seconds(value: float) -> str:
    if value < 99.5:
        return f"{value:.3g} s"
    minutes, hours = round(value / 60, 1), value / 3600
    return f"{hours:.1f} h" if minutes >= 99.5 else f"{minutes:.1f} min"


# --- a metric: shares in percent, everything else with three decimals ---------------------------


def metric_text(unit: Unit, value: float) -> str:
    return three_decimals(value) if unit == "number" else percent(value)


def change_text(unit: Unit, change: float) -> str:
    sign = "+" if change >= 0 else MINUS
    number = f"{abs(change):.3f}" if unit == "number" else f"{100 * abs(change):.1f} points"
    return sign + number


def spread_text(unit: Unit, mean: float | None, half: float | None) -> str:
    """77.7 ± 0.8% or 0.459 ± 0.065; a dash for what was not measured."""
    if mean is None:
        return "–"
    factor, digits, sign = (1, 3, "") if unit == "number" else (100, 1, "%")
    spread = "" if half is None else f" ± {factor * half:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}{sign}".replace("-", MINUS)


def difference_text(unit: Unit, mean: float, half: float | None) -> str:
    """The spread of a difference: +1.2 ± 0.8 points."""
    sign = "" if mean < 0 else "+"
    return sign + spread_text(unit, mean, half).replace("%", " points")


# --- settings -----------------------------------------------------------------------------------


def settings(choice: Mapping[str, Any]) -> str:
    """{"name": "truncation", "power": 2, "share": None} as "power 2": settings that are off or unset are left
    out."""
    said = {k: x for k, x in choice.items() if k != "name" and x is not None and x is not False}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def call(choice: Any) -> str:
    """{"name": "truncation", "power": 2} as "truncation (power 2)"."""
    if not isinstance(choice, dict):
        return str(choice)
    said = settings(choice)
    return f"{choice.get('name')} ({said})" if said else str(choice.get("name"))


def span(ranks: Sequence[int]) -> str:
    """4 to 64, or 8."""
    return " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "–"
