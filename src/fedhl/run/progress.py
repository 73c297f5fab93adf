"""The lines that a run prints for each round, and its progress within a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fedhl.config.settings import Settings
from fedhl.federation.federation import Federation
from fedhl.record import training_loss
from fedhl.server import ServerState
from fedhl.watch import Watcher

COLLAPSE = 0.25
"""A warning is given when the number of effective clients is below this share of the way from 1 to all."""


def steps(federation: Federation, state: ServerState, watcher: Watcher) -> Callable[[], None]:
    """The function for `run_round` to call after each optimizer step; it tells `watcher` the round's
    progress."""
    federation = federation.in_round(state.round + 1)
    round, cohort = state.round + 1, federation.cohort(state.round + 1)
    total = sum(federation.steps_for(client.examples) for client in cohort)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        watcher.step(f"round {round}: training", done, total)

    return step


def describe(line: dict[str, Any], rounds: int) -> str:
    """The metrics of one round as one line of text."""
    parts = [f"round {line['round']:>{len(str(rounds))}}/{rounds}"]
    evaluation = line["evaluation"]
    if evaluation:
        name = evaluation["metric"]
        for what, label in (("full", "full W"), ("truncated", "rank")):
            metrics = evaluation[what]
            if metrics:
                shown = f"{label} {metrics['rank']}" if what == "truncated" else label
                parts.append(f"{name} {metrics[name]:.4f} ({shown})")
        if evaluation["clients"]:
            mean, worst = evaluation["clients"]["mean"], evaluation["clients"]["worst"]
            parts.append(f"clients {mean[name]:.4f}, worst {worst[name]:.4f}")
        if tasks := evaluation.get("tasks"):
            parts.append(f"tasks {', '.join(f'{x:.4f}' for x in tasks['accuracy'])}")
    loss = training_loss(line)
    if loss is not None:
        parts.append(f"training loss {loss:.4f}")
        parts.append(f"{line['diagnostics']['effective_clients']:.1f} effective clients")
    if "epsilon" in line["diagnostics"]:
        parts.append(f"epsilon {line['diagnostics']['epsilon']:.2f}")
    parts.append(f"{line['seconds']['total']:.1f} s")
    return "  ".join(parts)


def told(line: dict[str, Any], config: Settings) -> Iterator[str]:
    """What is said of a round: its numbers, and warnings."""
    yield describe(line, config.rounds)
    for refused in line["refused"]:
        yield f"warning: client {refused['id']!r} does not count: {refused['reason']}"
    if not line["clients"] and line["round"]:
        left = "moves by the noise alone" if config.privacy else "stays as it was"
        yield f"warning: no update was accepted in this round; the model {left}"
    effective = line["diagnostics"].get("effective_clients")
    if effective is not None and effective - 1 < COLLAPSE * (len(line["clients"]) - 1):
        advice = (
            "raise weighting.epsilon, or set weighting.share"
            if config.weighting_used.name == "truncation"
            else "weighting: uniform counts them alike"
        )
        yield (
            f"warning: the weights of {len(line['clients'])} clients amount to {effective:.1f} effective "
            f"ones; {advice}"
        )
    for text in line.get("signatures", {}).values():
        yield f"warning: {text}"
