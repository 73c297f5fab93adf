"""The values that a round of the server works on: clients, its state, replies, what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedhl.lora import LoRA


@dataclass(frozen=True)
class Client:
    """Who takes part: an id, the rank and LoRA scale of its adapters, its number of training rows,
    the only layers that it trains (None: all), and the type that its numbers travel in (see
    `fedhl.server.payload`)."""

    id: str
    rank: int
    scale: float
    examples: int
    layers: frozenset[str] | None = None
    payload: str = "float32"


@dataclass(frozen=True)
class ServerState:
    """`layers`: each layer's method state, by layer name; `head`: trained parameters outside the
    adapters, by name; `round`: the rounds done. `clients`: what each client keeps for itself between
    rounds, by id and name; only where clients live in the server's process, and never used here."""

    round: int
    layers: Mapping[str, Any]
    head: dict[str, Tensor]
    clients: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What one client returned for round `round`: its adapter (which may be read lazily, a layer at
    a time, and lacks the layers that it did not train), its head, its mean training loss, its number
    of steps, and the distance of the bounds it estimates (see `fedhl.weighting.moment_bounds`);
    `magnitudes`: those of the frozen directions, by layer, if it was sent some."""

    client: Client
    round: int
    adapter: Mapping[str, LoRA]
    head: Mapping[str, Tensor]
    loss: float
    steps: int
    bound: float = 0.0
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What `aggregate` did: for the metrics, as plain data."""

    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    seconds: dict[str, float]
