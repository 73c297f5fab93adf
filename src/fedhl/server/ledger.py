"""What each client that remembers holds in its base, as the server knows it.

A client's memory M is what its broadcasts have put into its base, per layer. A version names a memory: it is
the hash of all broadcasts that led to it, so that both ends can tell whether they hold the same bits.
Clients of the same history share one memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast

Memory = Mapping[str, Tensor]
"""M (m, n) of every layer, float32."""
BLOCK = 2**15
"""Numbers of a matrix that are added to at once: 128 KiB and as much for the product, which stay in the cache
of a core also where other work shares it; smaller blocks cost more in calls than they save."""


@dataclass(frozen=True)
class Ledger:
    """`of`: the version of each client's memory, by client id; a client that is not named holds nothing.
    `memories`: the memory of each version. The ledger moves when a client's reply was accepted, and not
    before: until then the client may not have received what it was sent."""

    of: Mapping[str, str] = field(default_factory=dict)
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def version(self, client: str) -> str | None:
        """The version that this client holds; None: nothing."""
        return self.of.get(client)

    def held(self, client: str, layer: str) -> Tensor | None:
        """M of this client and layer; None if the client holds nothing."""
        version = self.of.get(client)
        return None if version is None else self.memories[version][layer]

    def moved(self, now: Mapping[str, str], memories: Mapping[str, Memory]) -> Ledger:
        """The ledger in which these clients hold the versions `now`; `memories`: of the new versions."""
        of = {**self.of, **now}
        known = {**self.memories, **memories}
        return Ledger(of, {version: known[version] for version in sorted(set(of.values()))})

    def without(self, clients: Collection[str]) -> Ledger:
        """The ledger in which these clients hold nothing."""
        of = {id: version for id, version in self.of.items() if id not in clients}
        return Ledger(of, {version: self.memories[version] for version in sorted(set(of.values()))})


def next_version(version: str | None, sent: Mapping[str, Broadcast]) -> str:
    """The version of a client that held `version` and has received the broadcasts `sent`, by layer."""
    digest = hashlib.sha256((version or "").encode())
    for name, b in sorted(sent.items()):
        if b.base is not None:
            digest.update(f"{name} {b.base.shape}".encode())
            digest.update(b.base.detach().cpu().contiguous().numpy().tobytes())
        for lora in filter(None, (b.merged, b.lora if b.absorbed else None)):
            digest.update(f"{name} {lora.A.shape} {lora.B.shape} {lora.scale!r}".encode())
            for factor in (lora.A, lora.B):
                digest.update(factor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_of(held: Tensor | None, sent: Broadcast) -> Tensor | None:
    """`M + ΔW(merged)`, the base from which a client starts; None if it is zero. A base that is sent stands
    in place of M."""
    base = held if sent.base is None else sent.base
    return base if sent.merged is None else plus_product(base, sent.merged)


def after(held: Tensor | None, sent: Broadcast) -> Tensor:
    """What a client holds after this broadcast: the base of its start, and if `absorbed` `ΔW(lora)`, too."""
    base = base_of(held, sent)
    if sent.absorbed:
        return plus_product(base, sent.lora)
    return torch.zeros(sent.lora.shape) if base is None else base


def plus_product(M: Tensor | None, lora: LoRA) -> Tensor:
    """`M + s B A` in float32, (m, n), one component after the other; None stands for zero.

    A matrix product has other last bits with other libraries and numbers of threads. Here every entry is
    `(M + s b_1 a_1) + s b_2 a_2 ...`, each operation rounded once, so that both ends hold the same bits.
    """
    (m, n), B = lora.shape, lora.scale * lora.B.float()
    A = lora.A.float()
    total = A.new_zeros(m, n) if M is None else M.clone()
    height = max(1, BLOCK // n)
    block = A.new_empty(min(height, m), n)
    for rows, columns in zip(total.split(height), B.split(height), strict=True):
        product = block[: len(rows)]
        for b, a in zip(columns.T[:, :, None], A, strict=True):
            rows.add_(torch.mul(b, a, out=product))
    return total
