"""The rules by which `lora.ranks` gives every client its rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, RootModel, model_validator

from fedhl.errors import UserError
from fedhl.names import listed, unknown
from fedhl.seeds import generator
from fedhl.strict import Strict

# Every rule has `assign`, the rank of each of these clients; `named`, the ranks that occur in the rule; and
# `rank_of`, the rank of one client, or None if that depends on who the others are.


class OneRank(RootModel[PositiveInt]):
    """The same rank for all clients: `8`."""

    model_config = ConfigDict(frozen=True)

    @property
    def named(self) -> list[int]:
        return [self.root]

    def rank_of(self, client: str) -> int | None:
        return self.root

    def assign(self, clients: Sequence[str], seed: int) -> dict[str, int]:
        return dict.fromkeys(clients, self.root)


class RankList(RootModel[list[PositiveInt]]):
    """A rank for each client, in the order of the clients' ids as text: `[4, 4, 8]`."""

    model_config = ConfigDict(frozen=True)

    @property
    def named(self) -> list[int]:
        return self.root

    def rank_of(self, client: str) -> int | None:
        return None

    def assign(self, clients: Sequence[str], seed: int) -> dict[str, int]:
        """Raises UserError unless there is one rank for each client."""
        if len(self.root) != len(clients):
            raise UserError(
                f"lora.ranks: the list has {len(self.root)} ranks for {len(clients)} clients; give one per "
                f"client, one rank for all, or {{shares: {{4: 0.5, 16: 0.5}}}}"
            )
        return dict(zip(clients, self.root, strict=True))


class RankShares(Strict):
    """Ranks that are drawn for the clients by the run's seed: `{shares: {4: 0.6, 64: 0.4}}`."""

    shares: Annotated[dict[PositiveInt, PositiveFloat], Field(min_length=1)]
    """Each rank with the share of the clients that get it, to the nearest client. Shares need not sum to
    1."""

    @property
    def named(self) -> list[int]:
        return list(self.shares)

    @model_validator(mode="after")
    def finite(self) -> RankShares:
        if not math.isfinite(self.total):
            raise ValueError("the sum of the shares is beyond all numbers; give smaller shares")
        return self

    @property
    def total(self) -> float:
        return sum(self.shares.values())

    def remark(self) -> str:
        """What the shares are taken for if they do not sum to 1; "" if they do."""
        if math.isclose(self.total, 1, rel_tol=1e-6):
            return ""
        parts = (f"{share / self.total:.0%} of rank {r}" for r, share in self.shares.items())
        return (
            f"lora.ranks.shares sum to {self.total:g}, not to 1; they are taken as {listed(parts)}"
        )

    def rank_of(self, client: str) -> int | None:
        return None

    def assign(self, clients: Sequence[str], seed: int) -> dict[str, int]:
        import torch

        quotas = {r: share / self.total * len(clients) for r, share in sorted(self.shares.items())}
        counts = {rank: math.floor(quota) for rank, quota in quotas.items()}
        by_remainder = sorted(quotas, key=lambda rank: counts[rank] - quotas[rank])
        for rank in by_remainder[: len(clients) - sum(counts.values())]:
            counts[rank] += 1
        ranks = [rank for rank, count in counts.items() for _ in range(count)]
        order = torch.randperm(len(ranks), generator=generator(seed, "ranks")).tolist()
        return {name: ranks[k] for name, k in zip(clients, order, strict=True)}


class RankByClient(Strict):
    """Ranks by the ids of the clients: `{clients: {asyncio: 4}, default: 8}`."""

    clients: dict[str, PositiveInt]
    """The rank of each client that is named here."""
    default: PositiveInt | None = None
    """The rank of all other clients; null: every client must be named."""

    @property
    def named(self) -> list[int]:
        return [*self.clients.values(), *([self.default] if self.default else [])]

    def rank_of(self, client: str) -> int | None:
        """Raises UserError for a client that has no rank."""
        rank = self.clients.get(client, self.default)
        if rank is None:
            raise UserError(f"lora.ranks: client {client!r} has no rank; name it or give a default")
        return rank

    def assign(self, clients: Sequence[str], seed: int) -> dict[str, int]:
        """Raises UserError for a rank of a client that does not exist, and for a client without a rank."""
        for name in self.clients:
            if name not in clients:
                raise UserError(f"lora.ranks.clients: {unknown('client', name, clients)}")
        return {name: rank for name in clients if (rank := self.rank_of(name))}


RankRule = OneRank | RankList | RankShares | RankByClient
