"""A federation: everything that does not change between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedhl import server
from fedhl.config.settings import Settings
from fedhl.data.label_groups import task_of
from fedhl.lora import LoRA, initial
from fedhl.method import FromBase, Method
from fedhl.model import peft
from fedhl.seeds import derive
from fedhl.server import Client, Rules, ServerState, accounting
from fedhl.server.channel import AirComp
from fedhl.server.participation import silence
from fedhl.server.privacy import Mechanism
from fedhl.server.robust import Guard
from fedhl.task.objective import Objective
from fedhl.weighting import Weighting


@dataclass(frozen=True)
class Federation:
    """Everything that does not change between rounds.

    `rows` and `own`: each client's training and held-out rows, by client id; `held_out`: the server's
    held-out rows; `objective`: what is learnt from rows, whatever they are; `validation`: the server's rows
    for the choice of settings; `tasks`: the labels of each
    task, if labels arrive over time; `pooled`: the number of clients whose training rows one client has, 0
    if each has its own; `guard`: the rule for updates that are too large; `privacy`: the mechanism that
    hides each client.
    """

    config: Settings
    method: Method[Any]
    weighting: Weighting
    clients: list[Client]
    rows: Mapping[str, Sequence[Any]]
    own: Mapping[str, Sequence[Any]]
    held_out: Sequence[Any]
    slots: peft.Slots
    objective: Objective
    device: torch.device
    channel: AirComp | None = None
    tasks: Sequence[Sequence[int]] = ()
    validation: Sequence[Any] = ()
    pooled: int = 0
    guard: Guard | None = None
    privacy: Mechanism | None = None

    @property
    def top_rank(self) -> int:
        return max(self.slots.factors)

    def slot_of(self, client: Client) -> int:
        """The slot of the rank that the client began with; its own rank may have become smaller."""
        known = (other.rank for other in self.clients if other.id == client.id)
        return next(known, client.rank)

    def steps_for(self, rows: int) -> int:
        """The optimizer steps of a client with this number of rows in a round. One that has the rows of all
        clients takes those of a whole cohort."""
        training, steps = self.config.training, self.config.training.steps_for(rows)
        if not self.pooled:
            return steps
        each = 1 if training.steps is not None else self.pooled
        return max(1, round(steps * self.config.participation.size(self.pooled) / each))

    def layers_of(self, client: Client) -> list[str]:
        """The layers that this client trains, from the input of the model to its output."""
        layers = self.slots.order
        return [name for name in layers if client.layers is None or name in client.layers]

    def labels_of(self, round: int) -> Sequence[int] | None:
        """The labels of this round's task; None: all labels."""
        return self.tasks[task_of(round, self.config.period)] if self.tasks else None

    def in_round(self, round: int) -> Federation:
        """The federation of this round: with tasks, the clients that have rows of the round's labels, with
        only these rows."""
        labels = self.labels_of(round)
        if labels is None:
            return self
        rows = {
            id: [ex for ex in theirs if ex.labels in labels] for id, theirs in self.rows.items()
        }
        clients = [replace(c, examples=len(rows[c.id])) for c in self.clients if rows[c.id]]
        return replace(self, clients=clients, rows=rows)

    def cohort(self, round: int) -> list[Client]:
        """The clients that take part in this round, sorted by id. With privacy each client is drawn on its
        own, and the cohort may be empty."""
        if self.privacy is not None:
            by_id = sorted(self.clients, key=lambda client: client.id)
            return [client for client in by_id if self.privacy.takes_part(client.id, round)]
        size = self.config.participation.size(len(self.clients))
        return server.sample(self.clients, size, self.config.seed, round)

    def rules(self, cohort: Sequence[Client], labels: Sequence[int] | None) -> Rules:
        """The server's rules for the replies of this cohort, apart from the weighted sum. `labels`: the
        labels of the round; None: all."""
        chance = self.config.participation.stragglers
        return Rules(
            guard=self.guard,
            silence=silence([self.layers_of(c) for c in cohort], chance) if chance else None,
            channel=self.channel,
            head_rows={} if labels is None else peft.label_rows(self.slots, labels),
            audience=self.clients,
        )

    def epsilon(self, rounds: int) -> float | None:
        """The ε that this number of rounds spends; None without privacy."""
        privacy, mechanism = self.config.privacy, self.privacy
        if privacy is None or mechanism is None:
            return None
        return accounting.epsilon(mechanism.rate, mechanism.noise, rounds, privacy.delta)

    def known_labels(self, labels: Sequence[int] | None) -> AbstractContextManager[None]:
        """Inside the block the model knows only these labels; None: all labels."""
        return nullcontext() if labels is None else peft.only_labels(self.slots, labels)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.compute.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def initial_state(
    federation: Federation,
    start: Mapping[str, LoRA] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The server's state before round 1: an untrained adapter of the top rank, or an adapter of the
    top rank that continues `start` (whose rank is at most that); the head of the model now, or `head`.
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
    state = server.init(federation.method, adapter, {**own_head, **(head or {})}, seed)
    return from_base(federation, state)


def from_base(federation: Federation, state: ServerState) -> ServerState:
    """The first state of a method that looks at the frozen weights; any other method's state as it is."""
    method, slots, seed = federation.method, federation.slots, federation.config.seed
    if not isinstance(method, FromBase):
        return state
    layers = {
        name: method.from_base(
            layer, peft.base_weight(slots, name), derive(seed, "from base", name)
        )
        for name, layer in state.layers.items()
    }
    return replace(state, layers=layers)


def at_current_rank(client: Client, state: ServerState) -> Client:
    """The client with its current rank, which is lower than its first one after pruning."""
    rank = state.clients.get(client.id, {}).get("rank")
    return client if rank is None else replace(client, rank=int(rank))
