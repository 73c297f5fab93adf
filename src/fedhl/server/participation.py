"""Clients that train only part of a model: which layers they return, and the server's correction for it.

A layer is averaged over the clients that returned it, with their weights renormalised. Dividing by
all clients instead would damp exactly the layers that few reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedhl.lora import LoRA
from fedhl.method import Update, scaled
from fedhl.seeds import generator


def matching(layers: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The layers whose dotted name contains one of `parts`, e.g. `layer.4` or `query`.

    Raises ValueError for a part that matches no layer.
    """
    found = {part: [name for name in layers if f".{part}." in f".{name}."] for part in parts}
    for part, names in found.items():
        if not names:
            raise ValueError(
                f"{part!r} is part of no layer's name; the last layer is {layers[-1]!r}"
            )
    return [name for name in layers if any(name in names for names in found.values())]


def reached(layers: Sequence[str], chance: float, seed: int) -> list[str]:
    """The layers that a client reaches: all, or, if it is a straggler (with probability `chance`), the last D
    layers, D uniform on 1..L: backpropagation begins at the output.

    `layers` in the order of the forward pass. Source: SALF, arXiv 2403.18375.
    """
    g = generator(seed, "straggler")
    late = float(torch.rand((), generator=g, dtype=torch.float64)) < chance
    depth = int(torch.randint(1, len(layers) + 1, (), generator=g))
    return list(layers[-depth:]) if late else list(layers)


def silence(cohort: Sequence[Sequence[str]], chance: float) -> dict[str, float]:
    """For each layer, the probability that no client of the cohort returns it.

    `cohort`: each client's own layers in the order of the forward pass. Client i misses the layer
    that has j others behind it with probability `chance · P(D <= j) = chance · j / L_i`.
    """
    together: dict[str, float] = {}
    for name in sorted({name for layers in cohort for name in layers}):
        p = 1.0
        for layers in cohort:
            if name in layers:
                behind = len(layers) - 1 - layers.index(name)
                p *= chance * behind / len(layers)
        together[name] = p
    return together


def corrected(update: Update, silence: float, products: bool) -> Update:
    """The update enlarged by `c = 1/(1 - silence)`, since with probability `silence` no client returns the
    layer (SALF). If clients are weighted alike and train equally many layers, the expectation over the
    rounds is the same as without stragglers.

    `products`: for a method that sums products, `ΔW ← ΔW_sent + c (ΔW - ΔW_sent)`, as one adapter of
    twice the rank. For other methods each factor moves, `F ← F_sent + c (F - F_sent)`, and so do the
    magnitudes: exact for the product if one factor is trained, to first order in the change if several are.
    """
    if silence == 0:
        return update
    sent, lora, c = update.sent.lora, update.lora, 1 / (1 - silence)
    if products:
        return scaled(update, c)
    A, B = (torch.lerp(x.to(y), y, c) for x, y in ((sent.A, lora.A), (sent.B, lora.B)))
    before, magnitudes = update.sent.magnitudes, update.magnitudes
    if before is not None and magnitudes is not None:
        magnitudes = torch.lerp(before.to(magnitudes), magnitudes, c)
    return replace(update, lora=LoRA(A, B, lora.scale), magnitudes=magnitudes)
