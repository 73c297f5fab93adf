"""What is known of a round once it is done: its evaluation, and its line of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from fedhl import server
from fedhl.data.label_groups import begins
from fedhl.federation.engine import IN_PROCESS, Engine
from fedhl.federation.federation import Federation
from fedhl.federation.scores import evaluate_round
from fedhl.model.training import learning_rate
from fedhl.record import better, sound
from fedhl.run.signatures import UNDONE, first_seen
from fedhl.run.stop import why
from fedhl.server import Outcome, ServerState
from fedhl.watch import SILENT, Watcher

Json = dict[str, Any]


class Done(NamedTuple):
    """A round that is done: the state after it, its line of metrics, and the best round so far."""

    state: ServerState
    line: Json
    best: Json | None


def untrained(
    federation: Federation,
    state: ServerState,
    watcher: Watcher = SILENT,
    engine: Engine = IN_PROCESS,
) -> Done:
    """Round 0: the evaluation of the state before any training."""
    return finish(federation, state, None, Outcome([], [], {}, {}), [], None, watcher, engine)


def finish(
    federation: Federation,
    state: ServerState,
    previous: ServerState | None,
    outcome: Outcome,
    before: Sequence[Json],
    best: Json | None,
    watcher: Watcher = SILENT,
    engine: Engine = IN_PROCESS,
) -> Done:
    """Evaluate `state`, to which a round with this outcome led from `previous`, and sum the round up. A round
    after which the loss is not finite is undone, if it is finite for `previous`.

    `before`: the lines of the rounds so far, by which `stop` decides, and which show whether the federation
    fails; `best`: the best round so far.
    """
    config, round = federation.config, state.round
    seconds = {**outcome.seconds}
    began = perf_counter()
    evaluation = None
    if round % config.evaluation.every == 0 or round % config.period == 0:  # the end of a task
        watcher.step(f"round {round}: evaluating", 0, 1)
        last = round == config.rounds
        evaluation = evaluate_round(federation, state, every_rank=last, engine=engine)
        if previous is not None and not sound(evaluation):
            kept, nothing = undone(federation, previous, outcome)
            again = evaluate_round(federation, kept, every_rank=last, engine=engine)
            if sound(again):
                state, outcome, evaluation = kept, nothing, again
        best = better(best, evaluation, round)
    seconds["evaluate"] = perf_counter() - began
    reason = None
    if config.stop is not None and 0 < round < config.rounds:
        now = {"round": round, "evaluation": evaluation, "seconds": {"total": sum_of(seconds)}}
        reason = why(config.stop, [*before, now], best)
    if reason is not None:
        watcher.say(f"ending after round {round} of {config.rounds}: {reason}")
        began = perf_counter()
        evaluation = evaluate_round(federation, state, every_rank=True, engine=engine)
        best = better(best, evaluation, round)
        seconds["evaluate"] += perf_counter() - began
    began = perf_counter()
    spectra = server.spectra(federation.method, state, federation.top_rank)
    seconds["diagnostics"] = seconds.get("diagnostics", 0.0) + perf_counter() - began
    seconds["total"] = sum_of(seconds)
    epsilon = federation.epsilon(round)
    spent = {} if epsilon is None else {"epsilon": epsilon}
    line = {
        "round": round,
        "learning_rate": learning_rate(
            config.training, config.period, (round - 1) % config.period + 0.5
        )
        if round
        else None,
        "evaluation": evaluation,
        "clients": outcome.clients,
        "refused": outcome.refused,
        "diagnostics": outcome.diagnostics | spectra | spent,
        "bytes": {
            way: sum(record[f"bytes_{way}"] for record in (*outcome.clients, *outcome.refused))
            for way in ("down", "up")
        },
        "seconds": seconds,
    } | ({} if reason is None else {"stopped": reason})
    signatures = first_seen(before, line, config.period)
    line |= {"signatures": signatures} if signatures else {}
    return Done(state, line, best)


def undone(
    federation: Federation, before: ServerState, outcome: Outcome
) -> tuple[ServerState, Outcome]:
    """The state after a round that changes nothing, and the outcome in which no client counts."""
    round = before.round + 1
    if federation.tasks and begins(round, federation.config.period):
        before = server.next_task(federation.method, before)
    refused = [
        {"id": c["id"], "reason": UNDONE, **{w: c[w] for w in ("bytes_down", "bytes_up")}}
        for c in outcome.clients
    ]
    outcome = replace(outcome, clients=[], refused=[*outcome.refused, *refused], diagnostics={})
    return replace(before, round=round), outcome


def sum_of(seconds: Mapping[str, float]) -> float:
    """The seconds of a round before it is on disk."""
    phases = ("broadcast", "train", "aggregate", "diagnostics", "evaluate")
    return sum(seconds.get(phase, 0.0) for phase in phases)
