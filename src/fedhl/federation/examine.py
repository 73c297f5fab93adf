"""Checks before the model is loaded: of the rows, the clients and their ranks. No tensor is needed for these
checks, so that a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedhl.config import Config
from fedhl.config.settings import Settings
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.names import unknown

POOLED = "pooled"
"""The id of the client that has the training rows of all."""

Examined = tuple[shards.Shards, dict[str, int]]
"""The rows, and the ranks of the clients."""


def examine(config: Config) -> Examined:
    """The rows and the ranks of the clients. Raises UserError for a mistake in the data, and for a setting
    that does not fit these clients."""
    data = shards.read(config)
    ranks = config.lora.ranks.assign(list(data.clients), config.seed)
    data, ranks = taking_part(config, data, ranks)
    clients = list(data.clients)
    check_count(config, len(ranks))
    refuse_unknown_clients(config, clients)
    return pooled(data, ranks) if config.participation.pooled else (data, ranks)


def check_count(config: Settings, clients: int) -> None:
    """Raises UserError if more clients should take part in a round than there are."""
    if (config.participation.count or 0) > clients:
        raise UserError(
            f"participation.count: expected at most {clients}, the number of clients, got "
            f"{config.participation.count}; lower it, or leave participation out, so that all "
            "clients take part"
        )


def taking_part(config: Config, data: shards.Shards, ranks: dict[str, int]) -> Examined:
    """The rows and ranks of the clients that `participation.only` names. Raises UserError for an id that no
    client has."""
    only = config.participation.only
    if only is None:
        return data, ranks
    for name in only:
        if name not in ranks:
            raise UserError(f"participation.only: {unknown('client', name, list(ranks))}")
    clients, held_out = (
        {id: part for id, part in parts.items() if id in only}
        for parts in (data.clients, data.client_held_out)
    )
    ranks = {id: rank for id, rank in ranks.items() if id in only}
    return replace(data, clients=clients, client_held_out=held_out), ranks


def pooled(data: shards.Shards, ranks: dict[str, int]) -> Examined:
    """All training rows at one client of the largest rank. What clients hold out stays with each."""
    everything = np.sort(np.concatenate(list(data.clients.values())))
    whole = replace(data, clients={POOLED: everything}, pooled=len(data.clients))
    return whole, {POOLED: max(ranks.values())}


def refuse_unknown_clients(config: Settings, clients: Sequence[str]) -> None:
    """Raises UserError if participation.layers names a client that is not among `clients`."""
    for name in config.participation.layers:
        if name not in clients:
            raise UserError(f"participation.layers: {unknown('client', name, clients)}")
