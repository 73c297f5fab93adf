"""Dropout of the base model: one probability in place of those of its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fedhl.errors import UserError
from fedhl.model.training import training_mode
from fedhl.seeds import seeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

DRAWS = 4
"""How often a model is run to see whether it draws random numbers."""


def set_dropout(model: nn.Module, p: float) -> None:
    """Give every dropout of `model` the probability `p`: its modules, and the numbers that other modules and
    configs hold in place of one. At 0 no layer is dropped either."""
    places: list[dict[str, Any]] = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = p
        places.append(vars(module))
        if hasattr(module, "config"):
            places.append(vars(module.config))
    for values in places:
        for name, value in values.items():
            if is_probability(name, value) and (p == 0 or "layer" not in name):
                values[name] = p


def is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 1 and "drop" in name


def refuse_random(model: PreTrainedModel, logits: Callable[[], Tensor], source: str) -> None:
    """Raises UserError if the logits of a row differ from one forward pass in training mode to the next."""
    with training_mode(model):
        first, *others = (drawn(model, logits, seed) for seed in range(DRAWS))
    rounding = 8 * torch.finfo(first.dtype).eps * first.abs().max()
    if any((other - first).abs().max() > rounding for other in others):
        raise UserError(
            f"model.dropout: a {type(model).__name__} ({source!r}) draws random numbers in training that are "
            "not those of a dropout, so that it cannot be switched off; leave model.dropout out, to train "
            "as the checkpoint says"
        )


def drawn(model: PreTrainedModel, logits: Callable[[], Tensor], seed: int) -> Tensor:
    with seeded(seed, model.device):
        return logits()
