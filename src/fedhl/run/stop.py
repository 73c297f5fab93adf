"""When a run ends before its last round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhl.config.conduct import StopConfig
from fedhl.names import plural

Json = dict[str, Any]


def why(rule: StopConfig, lines: Sequence[Json], best: Json | None) -> str | None:
    """The reason to end a run after these lines of its metrics, of whose rounds `best` is the best so far;
    None to go on."""
    hours = sum(line["seconds"]["total"] for line in lines) / 3600
    if rule.hours is not None and hours >= rule.hours:
        return f"the rounds have taken {hours:.3g} hours, and stop.hours is {rule.hours:g}"
    later = [
        line for line in lines if line["evaluation"] and best and line["round"] > best["round"]
    ]
    if best and rule.patience is not None and len(later) >= rule.patience:
        return (
            f"{plural(len(later), 'evaluation')} in a row {'was' if len(later) == 1 else 'were'} no better "
            f"than that of round {best['round']}"
        )
    return None


def stopped(lines: Sequence[Json]) -> str | None:
    """The reason why a run with these metrics has ended before its last round; None if it has not."""
    return lines[-1].get("stopped") if lines else None
