"""The values that a round of the server works on: clients, the server's state, replies, and the outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Method, TaskSequence
from fedhl.seeds import derive, generator
from fedhl.server.ledger import Ledger


@dataclass(frozen=True)
class Client:
    """A client: its id, the rank and LoRA scale of its adapters, its number of training rows, the layers that
    it trains (None: all), and the types in which its numbers travel: `payload` to the server, `download` to
    the client (None: the same; see `fedhl.server.payload`). `full`: whether it trains whole weights, and
    returns their changes as `min(m, n)` components beside those of its adapter."""

    id: str
    rank: int
    scale: float
    examples: int
    layers: frozenset[str] | None = None
    payload: str = "float32"
    download: str | None = None
    full: bool = False

    @property
    def downloaded(self) -> str:
        """The type in which numbers travel to the client."""
        return self.download or self.payload


@dataclass(frozen=True)
class ServerState:
    """`layers`: each layer's method state, by layer name; `head`: trained parameters outside the
    adapters, by name; `round`: the rounds done. `clients`: the tensors that each client keeps for itself
    between rounds, by client id and name; only if the clients are in the server's process, and never used
    by the server. `ledger`: what each client holds in its base, if the method's clients remember.
    """

    round: int
    layers: Mapping[str, Any]
    head: dict[str, Tensor]
    clients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    @cached_property
    def built(self) -> dict[Any, Broadcast]:
        """The broadcasts of this state to clients that remember, so that each is computed once."""
        return {}


@dataclass(frozen=True)
class Reply:
    """One client's reply in round `round`: its adapter (which may be read lazily, a layer at
    a time, and lacks the layers that it did not train), its head, its mean training loss, its number
    of steps, and the distance of the bounds it estimates (see `fedhl.weighting.moment_bounds`);
    `magnitudes`: of the frozen directions, by layer, if it was sent any; `version`: the memory that it holds
    now, if the method's clients remember (see `fedhl.server.ledger`)."""

    client: Client
    round: int
    adapter: Mapping[str, LoRA]
    head: Mapping[str, Tensor]
    loss: float
    steps: int
    bound: float = 0.0
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    version: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a round, as plain data for the metrics: a record of each accepted and of each refused
    client, diagnostics, and seconds by phase."""

    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    seconds: dict[str, float]


def init(
    method: Method[Any], adapter: Mapping[str, LoRA], head: Mapping[str, Tensor], seed: int
) -> ServerState:
    """The state before round 1, from the initial adapter at the top rank and the initial head."""
    layers = {
        name: method.init(adapter[name], derive(seed, "layer", name)) for name in sorted(adapter)
    }
    return ServerState(0, layers, {name: head[name] for name in sorted(head)})


def sample(clients: Sequence[Client], size: int, seed: int, round: int) -> list[Client]:
    """`size` of the clients, drawn without replacement for this round, sorted by id.

    The draw goes by id: it does not depend on the order of the list.
    """
    by_id = sorted(clients, key=lambda client: client.id)
    order = torch.randperm(len(by_id), generator=generator(seed, "cohort", round)).tolist()
    return [by_id[k] for k in sorted(order[:size])]


def forget(state: ServerState, clients: Collection[str]) -> ServerState:
    """The state in which these clients hold nothing: they have lost their memory."""
    if not any(id in state.ledger.of for id in clients):
        return state
    return with_ledger(state, state.ledger.without(clients))


def with_ledger(state: ServerState, ledger: Ledger) -> ServerState:
    """The state with this ledger, whose memories are those of `state`. A broadcast that is built already is
    for a version, whoever holds it, and stays."""
    following = replace(state, ledger=ledger)
    following.built.update(state.built)
    return following


def next_task(method: Method[Any], state: ServerState) -> ServerState:
    """The state in which a new task begins: the same state, unless the method has its own `next_task`."""
    if not isinstance(method, TaskSequence):
        return state
    return replace(state, layers={n: method.next_task(x) for n, x in state.layers.items()})
