"""Bytes that each client moves in a round: counted, and foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedhl.federation.federation import Federation
from fedhl.method import Broadcast
from fedhl.model import peft
from fedhl.server import Client, Reply
from fedhl.server.payload import bytes_received, bytes_returned, number_bytes


def bytes_moved(sent: Mapping[str, Broadcast], reply: Reply) -> tuple[int, int]:
    """Bytes down and up of a client that was sent these broadcasts, as they travel, and gave this reply: all
    tensors of the two messages, without headers. The head travels as float32, both ways."""
    client, head = reply.client, 4 * sum(x.numel() for x in reply.head.values())
    down = sum(bytes_received(b, client.downloaded) for b in sent.values())
    up = sum(bytes_returned(sent[name], client.payload) for name in reply.adapter)
    return down + head, up + head


def bytes_expected(
    federation: Federation, clients: Sequence[Client], ranks: Sequence[int]
) -> dict[str, tuple[int, int]]:
    """Bytes down and up of each client in a usual round whose cohort has these ranks, by client id:
    `Method.traffic`, and the head. Nothing moves if the rows are at one place."""
    if federation.pooled:
        return {client.id: (0, 0) for client in clients}
    head = 4 * sum(p.numel() for p in federation.slots.head.values())
    shapes = peft.layers(federation.slots)
    table = {}
    for client in clients:
        traffic = {
            name: federation.method.traffic(m, n, client.rank, ranks)
            for name, (m, n) in shapes.items()
        }
        down = sum(
            number_bytes(client.downloaded, *shapes[name]) * t.down for name, t in traffic.items()
        )
        up = sum(
            number_bytes(client.payload, *shapes[name]) * traffic[name].up
            for name in federation.layers_of(client)
        )
        table[client.id] = (round(down) + head, round(up) + head)
    return table
