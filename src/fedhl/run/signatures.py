"""Failures of a federation that its metrics show: explosion, collapse of the spectrum, stagnation.

All from the lines of metrics.jsonl. docs/theory.md has the runs in which each failure was provoked, and how
often each is named in healthy runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedhl.record import training_loss

Json = dict[str, Any]

UNDONE = "the round was undone, since the loss of its model was not finite"
"""The reason for which the clients of such a round do not count."""
ROUNDS = 5
"""A collapse and a stagnation are named after this number of rounds in a row, an explosion after two."""
FASTER = 5.0
"""Weights explode if clients move this many times as far as in the first round, at equal learning rates."""
STILL = 1e-3
"""Clients stand still that move by less than this share of what they moved in the first round, likewise."""
BEYOND = 0.02
"""The spectrum has collapsed if a smaller share of `‖W‖²` than this is beyond the smallest rank."""
CUT = 0.1
"""A method cuts W if its aggregation error is above this share of the step of W."""
CANCELLED = 0.5
"""Updates cancel each other if W moves by less than this share of what unrelated updates would move it."""
LACKING = 0.1
"""Starts are far from W if they lack more than this share of `‖W‖²`."""


def first_seen(before: Sequence[Json], line: Json, period: int) -> dict[str, str]:
    """The failures that show with this line for the first time, by name, each with what it means and the way
    out. `before`: the lines of the rounds so far; `period`: the rounds of a task, with which all begins anew.

    Of a run that has exploded nothing else is told. Without the clients' drifts, as with privacy, nothing is
    known.
    """
    said = {name for earlier in before for name in earlier.get("signatures", ())}
    if "explosion" in said:
        return {}
    if any(refused["reason"] == UNDONE for refused in line["refused"]):
        return {"explosion": undone(line)}
    begun = (line["round"] - 1) // period * period
    lines = [x for x in (*before, line) if x["round"] > begun and measured(x)]
    if not lines or lines[-1] is not line:
        return {}
    if text := explosion(lines) or saturation(lines):
        return {"explosion": text}
    found = {"collapse": collapse(lines), "stagnation": stagnation(lines)}
    return {name: text for name, text in found.items() if text and name not in said}


# --- the numbers of a round ---------------------------------------------------------------------


def measured(line: Json) -> bool:
    """Whether clients counted in this round, and each one's drift and loss are known."""
    clients = line["clients"]
    return bool(clients) and all(None not in (c["drift"], c["loss"]) for c in clients)


def speed(line: Json) -> float:
    """`√(Σ p_i d_i²) / η`, with `d_i = ‖ΔW_i - ΔW(sent_i)‖`: how far clients move, by the learning rate."""
    squares = (c["weight"] * c["drift"] ** 2 for c in line["clients"])
    return math.sqrt(sum(squares)) / line["learning_rate"]


def losses(lines: Sequence[Json]) -> tuple[float, float]:
    """The mean training loss of the last of these rounds, over the clients that took part before, and that of
    the first round of each of these clients; both 0 if there is no such client. The mean over all clients
    would also move with those that happen to take part."""
    first: dict[str, float] = {}
    for line in lines[:-1]:
        for client in line["clients"]:
            first.setdefault(client["id"], client["loss"])
    again = [client for client in lines[-1]["clients"] if client["id"] in first]
    now, then = sum(c["loss"] for c in again), sum(first[c["id"]] for c in again)
    return now / max(len(again), 1), then / max(len(again), 1)


def agreement(line: Json) -> float:
    """`‖W_{t+1} - W_t‖ / √(Σ p_i² d_i²)`: 1 if the updates are orthogonal to each other, `√N_eff` if they are
    the same, 0 if they cancel; infinite if no client moved, or without a global model."""
    unrelated = math.sqrt(sum((c["weight"] * c["drift"]) ** 2 for c in line["clients"]))
    step = line["diagnostics"].get("step")
    return step / unrelated if unrelated and step is not None else math.inf


def lacking(line: Json) -> float:
    """`Σ p_i ê_i`: the share of `‖W‖²` that the clients' starts lack."""
    return sum(c["weight"] * c["error"] for c in line["clients"])


def beyond(line: Json, rank: int) -> float:
    """`1 - Σ_{j≤rank} σ_j² / ‖W‖²`, of all layers together; 1 if W = 0, or without a global model."""
    known = line["diagnostics"]
    if not known.get("energy"):
        return 1.0
    return 1 - sum(sigma**2 for sigma in known["spectrum"][:rank]) / known["energy"]


def cuts(line: Json) -> bool:
    """Whether the method keeps less of the updates than their weighted sum."""
    error, step = (line["diagnostics"].get(name) for name in ("aggregation_error", "step"))
    return error is not None and step is not None and error > CUT * step


# --- the failures -------------------------------------------------------------------------------


def undone(line: Json) -> str:
    return (
        f"the weights explode: round {line['round']} was undone, since the loss of its model was not finite; "
        "set a smaller training.learning_rate, or bound the updates of single clients with robust.clip"
    )


def explosion(lines: Sequence[Json]) -> str | None:
    """Twice in a row the clients move much faster than those of the first round, and lose more than when they
    first took part."""
    if len(lines) < 3 or not speed(lines[0]):
        return None
    times = [speed(line) / speed(lines[0]) for line in lines[-2:]]
    (now, then), (earlier, before) = losses(lines), losses(lines[:-1])
    if min(times) < FASTER or now <= then or earlier <= before:
        return None
    return (
        f"the weights explode: at equal learning rates the clients move {times[-1]:.0f} times as far as in "
        f"round {lines[0]['round']}, and their training loss is {now:.3g}, which was {then:.3g} when they "
        "first took part; set a smaller training.learning_rate"
    )


def saturation(lines: Sequence[Json]) -> str | None:
    """Twice in a row the clients hardly move, at a loss above that of the first round: the weights have
    exploded at once, and a saturated model has no gradient."""
    first, recent = lines[0], lines[-2:]
    then, now = training_loss(first), [training_loss(line) for line in recent]
    if len(lines) < 3 or then is None or any(loss is None or loss <= then for loss in now):
        return None
    if max(speed(line) for line in recent) > STILL * speed(first):
        return None
    return (
        f"the weights have exploded: the clients hardly move any more, at a training loss of {now[-1]:.3g}, "
        f"which was {then:.3g} in round {first['round']}; set a smaller training.learning_rate"
    )


def collapse(lines: Sequence[Json]) -> str | None:
    """In `ROUNDS` rounds W has hardly anything beyond the smallest rank, and the method cuts off what the
    higher ranks add."""
    recent = lines[-ROUNDS:]
    ranks = [client["rank"] for line in recent for client in line["clients"]]
    low, top = min(ranks), max(ranks)
    if len(recent) < ROUNDS or low == top:
        return None
    if not all(beyond(line, low) < BEYOND and cuts(line) for line in recent):
        return None
    return (
        f"the spectrum has collapsed: in {ROUNDS} rounds less than {BEYOND:.0%} of ‖W‖² was beyond rank "
        f"{low}, though ranks up to {top} are trained, since the method cuts off what they add; "
        f"method: fedhl_ef keeps it, and lora.ranks: {low} would cost less"
    )


def stagnation(lines: Sequence[Json]) -> str | None:
    """In `ROUNDS` rounds the updates cancelled each other, from starts that lack much of W."""
    recent = lines[-ROUNDS:]
    if len(recent) < ROUNDS:
        return None
    if not all(agreement(line) < CANCELLED and lacking(line) > LACKING for line in recent):
        return None
    return (
        f"training stagnates: in {ROUNDS} rounds the clients' updates cancelled each other, so that W moved "
        f"by {agreement(recent[-1]):.0%} of what unrelated updates would move it, and the clients' starts "
        f"lack {lacking(recent[-1]):.0%} of ‖W‖²; method: fedhl_ef, or higher ranks, let them start nearer W"
    )
