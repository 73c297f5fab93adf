"""The head of a classifier that is fine-tuned already: in the order of the data's labels, or drawn anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedhl.errors import UserError
from fedhl.names import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reorder(model: PreTrainedModel, own: Sequence[str], labels: Sequence[str], source: str) -> None:
    """Put the rows of the output layer, which stand for the labels `own`, into the order of `labels`.

    Names like LABEL_0 say nothing: where they are not those of the data, row i becomes the data's label i.
    Raises UserError if the two sets of labels differ, for then the rows mean something else.
    """
    if set(own) != set(labels) or len(own) != len(labels):
        if generic(own):
            return
        raise UserError(
            f"model {source!r}: its classification head was trained for the labels {listed(own)}, but the "
            f"data has {listed(labels)}; give the data the labels of the model, or set model.fresh_head: "
            "true to train a new head"
        )
    if list(own) == list(labels):
        return
    layer = output_layer(model, len(labels))
    if layer is None:
        raise UserError(
            f"model {source!r}: no layer of a {type(model).__name__} has a row for each of the labels "
            f"{listed(own)}, so that they cannot be put into the order of the data; set model.fresh_head: "
            "true to train a new head"
        )
    order = [own.index(label) for label in labels]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[order])


def generic(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to labels without a name."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def output_layer(model: PreTrainedModel, count: int) -> nn.Linear | None:
    """The layer that computes the logits: the last one beside the encoder with a row for each label."""
    encoder = model.base_model_prefix + "."
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == count
        and not name.startswith(encoder)
    ]
    return found[-1] if found else None


def draw(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Draw the layers of these parameters anew, as the architecture draws them."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(owner)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # pyright: ignore  # else it is left as it is
        model._init_weights(module)
