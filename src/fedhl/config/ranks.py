"""The rank of every client, by the rule of the config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fedhl.config.inputs import LoRAConfig
from fedhl.errors import UserError
from fedhl.names import unknown
from fedhl.seeds import generator


def assign_ranks(config: LoRAConfig, clients: Sequence[str], seed: int) -> dict[str, int]:
    """The rank of every client. Raises UserError if the rule does not fit these clients."""
    rule = config.ranks
    if isinstance(rule, int):
        return dict.fromkeys(clients, rule)
    if isinstance(rule, list):
        if len(rule) != len(clients):
            raise UserError(
                f"lora.ranks: the list has {len(rule)} ranks for {len(clients)} clients; give one per "
                f"client, one rank for all, or {{shares: {{4: 0.5, 16: 0.5}}}}"
            )
        return dict(zip(clients, rule, strict=True))
    if "shares" in rule:
        return draw_ranks(rule["shares"], clients, seed)
    by_client, default = rule["clients"], rule["default"]
    for name in by_client:
        if name not in clients:
            raise UserError(f"lora.ranks.clients: {unknown('client', name, clients)}")
    missing = [name for name in clients if name not in by_client]
    if missing and default is None:
        raise UserError(f"lora.ranks: client {missing[0]!r} has no rank; name it or give a default")
    return {name: by_client.get(name, default) for name in clients}


def draw_ranks(shares: Mapping[int, float], clients: Sequence[str], seed: int) -> dict[str, int]:
    """Ranks in these shares of the clients, to the nearest client, in an order drawn by the seed."""
    total = sum(shares.values())
    quotas = {rank: share / total * len(clients) for rank, share in sorted(shares.items())}
    counts = {rank: math.floor(quota) for rank, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda rank: counts[rank] - quotas[rank])
    for rank in by_remainder[: len(clients) - sum(counts.values())]:
        counts[rank] += 1
    ranks = [rank for rank, count in counts.items() for _ in range(count)]
    order = torch.randperm(len(ranks), generator=generator(seed, "ranks")).tolist()
    return {name: ranks[k] for name, k in zip(clients, order, strict=True)}
