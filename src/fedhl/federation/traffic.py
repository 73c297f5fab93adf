"""Bytes that each client moves in a round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fedhl.federation.federation import Federation
from fedhl.model import peft
from fedhl.server import Client
from fedhl.server.payload import number_bytes


def bytes_per_client(
    federation: Federation,
    cohort: Sequence[Client],
    returned: Mapping[str, Collection[str]] | None = None,
    ranks: Sequence[int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Bytes down and up for each client of this cohort, by client id: adapters in the type of the payload
    (with int8 also the steps) and the head in float32, without headers.

    `returned`: the layers that each client returned, by client id; by default the layers that it trains.
    `ranks`: the ranks of the round's cohort; by default the ranks of these clients.
    """
    ranks = [client.rank for client in cohort] if ranks is None else ranks
    head = sum(p.numel() for p in federation.slots.head.values())
    shapes = peft.layers(federation.slots)
    table = {}
    for client in cohort:
        traffic = {
            name: federation.method.traffic(m, n, client.rank, ranks)
            for name, (m, n) in shapes.items()
        }
        layers = federation.layers_of(client) if returned is None else returned[client.id]
        down = sum(
            number_bytes(client.downloaded, *shapes[name]) * t.down for name, t in traffic.items()
        )
        up = sum(number_bytes(client.payload, *shapes[name]) * traffic[name].up for name in layers)
        table[client.id] = (round(down + 4 * head), round(up + 4 * head))
    return table
