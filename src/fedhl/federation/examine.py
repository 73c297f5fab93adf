"""Checks before the model is loaded: of the rows, the clients and their ranks. No tensor is needed for these
checks, so that a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence

from fedhl.config import Config
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.names import unknown

Examined = tuple[shards.Shards, dict[str, int]]
"""The rows, and the ranks of the clients."""


def examine(config: Config) -> Examined:
    """The rows and the ranks of the clients. Raises UserError for a mistake in the data, and for a setting
    that does not fit these clients."""
    data = shards.read(config)
    clients = list(data.clients)
    ranks = config.lora.ranks.assign(clients, config.seed)
    if (config.participation.count or 0) > len(ranks):
        raise UserError(
            f"participation.count: expected at most {len(ranks)}, the number of clients, got "
            f"{config.participation.count}; lower it, or leave participation out, so that all "
            "clients take part"
        )
    refuse_unknown_clients(config, clients)
    return data, ranks


def refuse_unknown_clients(config: Config, clients: Sequence[str]) -> None:
    """Raises UserError if participation.layers names a client that is not among `clients`."""
    for name in config.participation.layers:
        if name not in clients:
            raise UserError(f"participation.layers: {unknown('client', name, clients)}")
