"""How long a run will take on this machine, from a few real steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

from fedhl.federation.federation import Federation
from fedhl.federation.first_look import smallest
from fedhl.federation.local import evaluate_rows
from fedhl.federation.personal import personal_steps
from fedhl.federation.prepare import Prepared
from fedhl.model import peft
from fedhl.model.activation_cache import CachedObjective
from fedhl.model.training import batches, train
from fedhl.report.format import seconds

STEPS = 4
"""The optimizer steps that are tried. The first does not count: it sets things up."""


def duration(prepared: Prepared) -> Iterator[str]:
    """The time of a run and its parts, without the server's work, in a line of text. The steps that are
    tried have a rate of 0, and move nothing."""
    config, federation = prepared.config, prepared.federation
    read = seconds_to_read(federation)
    step, row = seconds_per_step(federation), seconds_per_row(federation)
    steps = [federation.steps_for(client.examples) for client in federation.clients]
    cohort = config.participation.size(len(steps))
    training = step * cohort * sum(steps) / len(steps)
    evaluation = row * rows_evaluated(federation)
    total = config.rounds * training + evaluation + read
    later = f", at most {seconds(read)} for the cached activations" if read else ""
    if config.personal is not None:
        alone = step * sum(personal_steps(federation, client) for client in federation.clients)
        total += alone
        later += f", {seconds(alone)} of training of personal models"
    yield (
        f"about {seconds(total)} on this machine: {config.rounds} rounds with {seconds(training)} of "
        f"training in each{later}, and {seconds(evaluation)} of evaluation in all (from {STEPS - 1} steps "
        "and one batch; the server's work comes on top)"
    )


def seconds_to_read(federation: Federation) -> float:
    """Of computing the activations that are cached, for every row, from those that the steps which are tried
    will draw; 0 without a cache."""
    cache = federation.objective
    if not isinstance(cache, CachedObjective):
        return 0.0
    rows = federation.rows[max(federation.clients, key=lambda client: client.examples).id]
    order = batches(len(rows), federation.config.training.batch_size, 0)
    known, began = len(cache.activations), perf_counter()
    for _ in range(STEPS):
        cache.batch([rows[k] for k in next(order)])
    read = len(cache.activations) - known
    return (perf_counter() - began) / max(read, 1) * len(cache.group)


def seconds_per_step(federation: Federation) -> float:
    """The median of the steps of the client with the most rows, at its rank."""
    client = max(federation.clients, key=lambda client: client.examples)
    slots, slot = federation.slots, federation.slot_of(client)
    at = [perf_counter()]
    with peft.changes(slots, slots.order if client.full else ()) as changes:
        train(
            slots.model,
            [*peft.activate(slots, slot, frozenset("" if changes else "AB")), *changes.values()],
            federation.rows[client.id],
            federation.config.training,
            objective=federation.objective,
            steps=STEPS,
            rate=lambda step: 0.0,
            autocast=federation.autocast,
            seed=0,
            on_step=lambda: at.append(perf_counter()),
        )
    return median(b - a for a, b in pairwise(at[1:]))


def seconds_per_row(federation: Federation) -> float:
    """Of evaluation, from a batch of rows that are spread over all that is evaluated; 0 if nothing is."""
    rows: Sequence[Any] = [
        *federation.held_out,
        *(row for own in federation.own.values() for row in own),
    ]
    if not rows:
        return 0.0
    some = rows[:: -(-len(rows) // federation.config.evaluation.batch_size)]
    federation.objective.batch(some)  # activations that are cached do not count
    began = perf_counter()
    evaluate_rows(federation, some)
    return (perf_counter() - began) / len(some)


def rows_evaluated(federation: Federation) -> int:
    """The forward passes of single rows in all evaluations of a run: of the full update, its truncation to
    the top rank and, at the end, to every rank; on the validation rows; of each client on its own rows, and
    of its personal model, before and after."""
    config, top = federation.config, federation.top_rank
    method, state = smallest(config)
    whole = method.delta(state) is not None
    held_out = len(federation.held_out) if whole else 0
    own = sum(map(len, federation.own.values()))
    validation = len(federation.validation) * (1 if whole else len(federation.clients))
    personal = 2 * own if config.personal is not None else 0
    times = (
        1 + config.rounds // config.evaluation.every + (config.rounds % config.evaluation.every > 0)
    )
    others = {client.rank for client in federation.clients} - {top}
    once = 0 if config.lora.start else held_out  # before training W is 0, and so is its truncation
    return times * (2 * held_out + validation + own) - once + held_out * len(others) + personal
