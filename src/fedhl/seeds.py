"""Seeds by name: every random draw of a run follows from one root seed and a path of names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(root: int, *path: str | int) -> int:
    """A 63-bit seed for the draw named by `path`, e.g. `derive(0, "batches", round, client)`.

    Independent of the order in which draws happen, of the platform and of hash randomisation,
    so a resumed run draws what an uninterrupted one would have drawn.
    """
    names = [part if isinstance(part, str) else int(part) for part in (root, *path)]
    digest = hashlib.blake2b(ascii(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(root: int, *path: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive(root, *path)`."""
    import torch

    return torch.Generator().manual_seed(derive(root, *path))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside the block, the global state untouched after it."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        before = torch.mps.get_rng_state() if device.type == "mps" else None
        if before is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if before is not None:
                torch.mps.set_rng_state(before)
