"""A federation in one process: the loop to read first, and the oracle for every other engine.

One base model stays in memory with one adapter slot per distinct rank. A client is a set of rows
and a rank: what it is sent is copied into the slot of its rank, trained there, and copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedhl import peft, server
from fedhl.config import Config
from fedhl.data.prompts import Example
from fedhl.evaluation import Metrics, evaluate
from fedhl.lora import LoRA, dense, initial
from fedhl.method import Broadcast, Method
from fedhl.seeds import derive
from fedhl.server import Client, Reply, Round, ServerState
from fedhl.training import learning_rate, train
from fedhl.weighting import Weighting

BYTES = 4
"""Bytes per number on the wire: adapters travel as float32."""


@dataclass(frozen=True)
class Federation:
    """Everything that does not change between rounds.

    `rows` and `own`: each client's training and held-out rows; `held_out`: the server's rows.
    """

    config: Config
    method: Method[Any]
    weighting: Weighting
    clients: list[Client]
    rows: Mapping[str, Sequence[Example]]
    own: Mapping[str, Sequence[Example]]
    held_out: Sequence[Example]
    slots: peft.Slots
    pad_id: int
    device: torch.device

    @property
    def top_rank(self) -> int:
        return max(self.slots.factors)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.compute.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def initial_state(
    federation: Federation,
    start: Mapping[str, LoRA] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The server's state before round 1: an untrained adapter of the top rank, or one that continues
    the adapter `start` (of at most that rank); the head that the model has now, or `head`.
    """
    rank, seed = federation.top_rank, federation.config.seed
    scale = peft.scale(federation.slots, rank)
    adapter = {
        name: initial(m, n, rank, scale, derive(seed, "initial adapter", name))
        for name, (m, n) in peft.layers(federation.slots).items()
    }
    for name, given in (start or {}).items():
        fresh = adapter[name]
        B = given.B.float() * (given.scale / scale)
        adapter[name] = LoRA(
            torch.cat([given.A.float(), fresh.A[given.rank :]]),
            torch.cat([B, fresh.B[:, given.rank :]], dim=1),
            scale,
        )
    own_head = peft.read_head(federation.slots)
    return server.init(federation.method, adapter, {**own_head, **(head or {})}, seed)


def run_round(
    federation: Federation, state: ServerState, on_step: Callable[[], None] = lambda: None
) -> tuple[ServerState, Round]:
    """One round: sample a cohort, send, train each client in turn, aggregate.

    Returns the next state and what happened, with bytes per client and seconds per phase.
    """
    config, method, seed = federation.config, federation.method, federation.config.seed
    round = state.round + 1
    size = config.participation.size(len(federation.clients))
    cohort = server.sample(federation.clients, size, seed, round)
    seconds = dict.fromkeys(("broadcast", "train", "compute"), 0.0)
    replies = []
    for client in cohort:
        start = perf_counter()
        sent = server.broadcast(method, state, client, seed)
        seconds["broadcast"] += perf_counter() - start
        start = perf_counter()
        reply, compute = train_client(federation, client, sent, state.head, round, on_step)
        seconds["train"] += perf_counter() - start
        seconds["compute"] += compute
        replies.append(reply)
    following, outcome = server.aggregate(method, federation.weighting, state, replies, seed)
    traffic = bytes_per_client(federation, cohort)
    for record in (*outcome.clients, *outcome.refused):
        record["bytes_down"], record["bytes_up"] = traffic[record["id"]]
    return following, replace(outcome, seconds=seconds | outcome.seconds)


def train_client(
    federation: Federation,
    client: Client,
    sent: Mapping[str, Broadcast],
    head: Mapping[str, Tensor],
    round: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Reply, float]:
    """What one client does in a round, and its seconds in forward, backward and optimizer."""
    config, slots = federation.config, federation.slots
    rows = federation.rows[client.id]
    steps = config.training.steps_for(len(rows))
    with deployed(federation, client.rank, sent, head):
        (factors,) = {broadcast.train for broadcast in sent.values()}
        trained = train(
            slots.model,
            peft.activate(slots, client.rank, factors),
            rows,
            config.training,
            steps=steps,
            rate=lambda k: learning_rate(
                config.training, config.rounds, round - 1 + (k + 0.5) / steps
            ),
            pad_id=federation.pad_id,
            autocast=federation.autocast,
            seed=derive(config.seed, "training", round, client.id),
            on_step=on_step,
        )
    adapter, new_head = peft.read(slots, client.rank), peft.read_head(slots)
    return Reply(client, round, adapter, new_head, trained.loss, trained.steps), trained.seconds


@contextmanager
def deployed(
    federation: Federation, rank: int, sent: Mapping[str, Broadcast], head: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside the block the model is `W0 + base + ΔW(lora)` with this head, in the slot of `rank`."""
    slots = federation.slots
    if any(broadcast.keep for broadcast in sent.values()):
        raise NotImplementedError("factors that stay with the client are not supported yet")
    peft.write(slots, rank, {name: broadcast.lora for name, broadcast in sent.items()})
    peft.write_head(slots, head)
    peft.activate(slots, rank, frozenset())
    bases = {name: b.base for name, b in sent.items() if b.base is not None}
    with peft.offset(slots, bases):
        yield


def bytes_per_client(
    federation: Federation, cohort: Sequence[Client]
) -> dict[str, tuple[int, int]]:
    """Bytes down and up for each client of this cohort: adapters and head, in float32."""
    ranks = [client.rank for client in cohort]
    head = sum(p.numel() for p in federation.slots.head.values())
    shapes = peft.layers(federation.slots).values()
    table = {}
    for client in cohort:
        layers = [federation.method.traffic(m, n, client.rank, ranks) for m, n in shapes]
        down, up = sum(t.down for t in layers), sum(t.up for t in layers)
        table[client.id] = (BYTES * (down + head), BYTES * (up + head))
    return table


def evaluate_global(federation: Federation, state: ServerState) -> Metrics | None:
    """Metrics of the model with the full-rank update; None without one, or without held-out rows."""
    deltas = {name: federation.method.delta(layer) for name, layer in state.layers.items()}
    full = {name: dense(delta) for name, delta in deltas.items() if delta is not None}
    if not full or not federation.held_out:
        return None
    slots = federation.slots
    with ExitStack() as stack:
        peft.write_head(slots, state.head)
        stack.enter_context(peft.offset(slots, full))
        stack.enter_context(peft.base_only(slots))
        return measure(federation, federation.held_out)


def evaluate_rank(federation: Federation, state: ServerState, rank: int) -> Metrics | None:
    """Metrics of what a client of `rank` is sent, on the server's held-out rows (None without)."""
    if not federation.held_out:
        return None
    client = Client("evaluation", rank, peft.scale(federation.slots, rank), 0)
    return evaluate_client(federation, state, client, federation.held_out)


def evaluate_client(
    federation: Federation, state: ServerState, client: Client, rows: Sequence[Example]
) -> Metrics:
    """Metrics of what this client is sent, on these rows."""
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    with deployed(federation, client.rank, sent, state.head):
        return measure(federation, rows)


def evaluate_clients(federation: Federation, state: ServerState) -> dict[str, Any] | None:
    """Each client's metrics on its own held-out rows, their mean, and the worst; None without such rows."""
    if not federation.own:
        return None
    by_client = {
        client.id: evaluate_client(federation, state, client, federation.own[client.id])
        for client in federation.clients
    }
    names = [name for name in ("loss", "accuracy") if name in next(iter(by_client.values()))]
    mean = {
        name: sum(metrics[name] for metrics in by_client.values()) / len(by_client)
        for name in names
    }
    # the worst client: by accuracy where there is one, by loss among equals
    worst = min(
        by_client, key=lambda id: (by_client[id].get("accuracy", 0.0), -by_client[id]["loss"])
    )
    return {"mean": mean, "worst": {"client": worst, **by_client[worst]}, "by_client": by_client}


def evaluate_round(federation: Federation, state: ServerState, every_rank: bool) -> dict[str, Any]:
    """The full update, its truncation to the top rank, the clients' own rows; and every deployed
    rank, if asked for."""
    top = federation.top_rank
    full, truncated = evaluate_global(federation, state), evaluate_rank(federation, state, top)
    ranks = sorted({client.rank for client in federation.clients})
    return {
        "metric": "accuracy"
        if federation.config.task.kind == "sequence-classification"
        else "loss",
        "full": full,
        "truncated": truncated and {"rank": top, **truncated},
        "ranks": {
            str(rank): truncated if rank == top else evaluate_rank(federation, state, rank)
            for rank in ranks
        }
        if every_rank and truncated
        else {},
        "clients": evaluate_clients(federation, state),
    }


def measure(federation: Federation, rows: Sequence[Example]) -> Metrics:
    """Metrics of the model as it is now."""
    return evaluate(
        federation.slots.model,
        rows,
        batch_size=federation.config.evaluation.batch_size,
        pad_id=federation.pad_id,
        device=federation.device,
        autocast=federation.autocast,
    )
