"""Evaluation of a federation's state: of the full update, its truncations, each client, each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedhl import server
from fedhl.data.label_groups import task_of
from fedhl.errors import UserError
from fedhl.federation.engine import IN_PROCESS, Engine, InProcess
from fedhl.federation.federation import Federation
from fedhl.federation.local import evaluate_rows
from fedhl.lora import LoRA, dense, prefix, truncate
from fedhl.model import peft
from fedhl.model.evaluation import Metrics
from fedhl.record import Unit
from fedhl.server import ServerState, side_by_side
from fedhl.task.intervals import wilson
from fedhl.task.objective import Objective


def evaluate_global(federation: Federation, state: ServerState) -> Metrics | None:
    """Metrics of the model with the full-rank update; None without a global model, or without held-out
    rows."""
    return evaluate_change(federation, state, full_update(federation, state))


def full_update(federation: Federation, state: ServerState) -> dict[str, Tensor]:
    """W of every layer; {} if there is no global model."""
    return {name: dense(delta) for name, delta in server.deltas(federation.method, state).items()}


def evaluate_rank(
    federation: Federation,
    state: ServerState,
    rank: int,
    cut: Mapping[str, LoRA] | None = None,
) -> Metrics | None:
    """Metrics of the model with `T_rank(W)` in every layer, as `fedhl export --rank` writes it; None as in
    `evaluate_global`.

    `cut`: a truncation to at least this rank, if there is one already: its prefix is used.
    """
    cut = truncation(federation, state, rank) if cut is None else cut
    change = {name: prefix(lora, rank, 1.0).delta() for name, lora in cut.items()}
    return evaluate_change(federation, state, change)


def truncation(federation: Federation, state: ServerState, rank: int) -> dict[str, LoRA]:
    """`T_rank(W)` of every layer; {} if there is no global model."""
    return truncations(server.deltas(federation.method, state), rank)


def truncations(deltas: Mapping[str, Tensor | LoRA], rank: int) -> dict[str, LoRA]:
    """The best approximation of this rank of each of `deltas`, or of the rank of its layer if that is
    less."""
    cut = side_by_side.side_by_side(
        lambda _, delta: truncate(delta, min(rank, *delta.shape)), deltas
    )
    return dict(cut)


def model_of_rank(
    federation: Federation, state: ServerState, rank: int | None
) -> tuple[str, dict[str, Tensor]]:
    """The name and the change of one model: of the full-rank update, or (with a rank) of its truncation.
    Raises UserError without a global model."""
    if rank is None:
        name, change = "full-rank update", full_update(federation, state)
    else:
        name = f"update truncated to rank {rank}"
        cut = truncation(federation, state, rank)
        change = {layer: lora.delta() for layer, lora in cut.items()}
    if not change:
        raise UserError(f"method {federation.config.method.name!r} has no global model to look at")
    return name, change


def evaluate_change(
    federation: Federation, state: ServerState, change: Mapping[str, Tensor]
) -> Metrics | None:
    """Metrics of the base model with this change, on the server's held-out rows; None without a change or
    without rows."""
    if not change or not federation.held_out:
        return None
    with changed(federation, state, change):
        return evaluate_rows(federation, federation.held_out)


@contextmanager
def changed(
    federation: Federation, state: ServerState, change: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside the block the model is the base with this change, and with the head of `state`."""
    slots = federation.slots
    with peft.offset(slots, change), peft.base_only(slots):
        peft.write_head(slots, state.head)
        yield


def evaluate_clients(
    federation: Federation, state: ServerState, engine: Engine = IN_PROCESS
) -> dict[str, Any] | None:
    """Each client's metrics on its own held-out rows, their mean, and those of the worst client; None without
    such rows."""
    by_client = engine.evaluate(federation, state)
    judge = federation.objective
    return over_clients(by_client, judge.metric, judge.greater, judge.unit) if by_client else None


def over_clients(
    by_client: Mapping[str, Metrics], metric: str, greater: bool, unit: Unit
) -> dict[str, Any]:
    """The mean of each metric over the clients, and the worst client by `metric`, of which more is better if
    `greater`: the client that may be the least good, as `at_best` judges it."""
    names = [name for name in next(iter(by_client.values())) if name != "examples"]
    mean = {name: sum(m[name] for m in by_client.values()) / len(by_client) for name in names}

    def good(id: str) -> tuple[float, float]:
        """The metric, and the loss among equals; nothing is worse than NaN."""
        value, loss = at_best(by_client[id], metric, greater, unit), -by_client[id]["loss"]
        return tuple(-math.inf if math.isnan(x) else x for x in (value, loss))  # pyright: ignore

    worst = min(by_client, key=good)
    return {"mean": mean, "worst": {"client": worst, **by_client[worst]}, "by_client": by_client}


def at_best(metrics: Metrics, metric: str, greater: bool, unit: Unit) -> float:
    """How good a client may be, the larger the better: the better end of the Wilson interval of a share of
    rows, since one wrong row of one is no evidence; any other metric as it was measured, with the sign of
    `greater`."""
    value = metrics[metric]
    if unit == "share of rows" and 0 <= value <= 1:  # what somebody calls so may be anything
        low, high = wilson(value, metrics["examples"])
        return high if greater else -low
    return value if greater else -value


def evaluate_tasks(federation: Federation, state: ServerState) -> dict[str, Any] | None:
    """The task of the last round, and the accuracy of the full update on the server's held-out rows of each
    task so far, among all labels so far. None before the first round, without a global model, and without
    held-out rows of the server's."""
    if state.round == 0:
        return None
    tasks = federation.tasks[: task_of(state.round, federation.config.period) + 1]
    accuracy = []
    with federation.known_labels([label for labels in tasks for label in labels]):
        for labels in tasks:
            rows = [example for example in federation.held_out if example.labels in labels]
            part = replace(federation, held_out=rows)
            metrics = evaluate_global(part, state)
            if metrics is None:
                return None
            accuracy.append(metrics["accuracy"])
    return {"current": len(tasks), "accuracy": accuracy}


def evaluate_round(
    federation: Federation, state: ServerState, every_rank: bool, engine: Engine = IN_PROCESS
) -> dict[str, Any]:
    """The evaluation of a round, as in the metrics: of the full update, of its truncation to the top rank, on
    the clients' own rows; with `every_rank`, at every deployed rank; with tasks, of each task so far."""
    top, W = federation.top_rank, full_update(federation, state)
    full = evaluate_change(federation, state, W)
    learnt = any(bool(change.any()) for change in W.values())
    cut = truncation(federation, state, top) if learnt and federation.held_out else {}

    def at(rank: int) -> Metrics | None:
        # every truncation of W = 0 is the same model
        return evaluate_rank(federation, state, rank, cut) if learnt else full

    truncated = at(top)
    ranks = sorted({client.rank for client in federation.clients})
    return (
        {
            "metric": federation.objective.metric,
            "greater": federation.objective.greater,
            "unit": federation.objective.unit,
            "full": full,
            "truncated": truncated and {"rank": top, **truncated},
            "ranks": {str(rank): truncated if rank == top else at(rank) for rank in ranks}
            if every_rank and truncated
            else {},
            "clients": evaluate_clients(federation, state, engine),
        }
        | evaluate_validation(federation, state, engine)
        | ({"tasks": evaluate_tasks(federation, state)} if federation.tasks else {})
    )


def evaluate_validation(
    federation: Federation, state: ServerState, engine: Engine = IN_PROCESS
) -> dict[str, Any]:
    """Metrics on the validation rows: of the full update, or, without a global model, the mean over the
    clients' models, if the clients are in this process; {} without validation rows."""
    rows = federation.validation
    if not rows:
        return {}
    metrics = evaluate_global(replace(federation, held_out=rows), state)
    if metrics is None and not isinstance(engine, InProcess):
        return {}
    if metrics is None:
        every = replace(federation, own={client.id: rows for client in federation.clients})
        metrics = (evaluate_clients(every, state) or {})["mean"]
    return {"validation": metrics}


STAGES = ("global", "personal")
"""The models that are evaluated on a client's own rows: the one from which it goes on, and its own."""


def over_models(records: Mapping[str, dict[str, Any]], objective: Objective) -> dict[str, Any]:
    """The record of all personal models, from that of each client: the `mean` of the metrics over the
    clients, before and after, and how many clients `gained`, `lost` or `stayed` by the metric of the task. A
    client whose metric is not finite has lost."""
    metric, sign = objective.metric, 1 if objective.greater else -1
    gains = [
        sign * (record["personal"][metric] - record["global"][metric])
        for record in records.values()
    ]
    gained, stayed = sum(gain > 0 for gain in gains), gains.count(0)
    means = {
        stage: over_clients(
            {id: record[stage] for id, record in records.items()},
            metric,
            objective.greater,
            objective.unit,
        )["mean"]
        for stage in STAGES
    }
    return {
        "metric": metric,
        "mean": means,
        "gained": gained,
        "lost": len(gains) - gained - stayed,
        "stayed": stayed,
        "clients": dict(records),
    }


def said(personal: Mapping[str, Any]) -> str:
    """The record of all personal models as one line of text."""
    name = personal["metric"]
    before, after = (personal["mean"][stage][name] for stage in STAGES)
    texts = ["–" if x is None or not math.isfinite(x) else f"{x:.4f}" for x in (before, after)]
    return (
        f"personal models: mean {name} {texts[0]} before, {texts[1]} after, on the clients' own rows; "
        f"{personal['gained']} gained, {personal['lost']} lost, {personal['stayed']} stayed"
    )
