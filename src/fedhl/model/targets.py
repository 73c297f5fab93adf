"""The layers of a model that get an adapter, and the ranks that fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedhl.errors import UserError
from fedhl.names import meant


def find_targets(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"], head: Sequence[str] = ()
) -> list[str]:
    """The names, sorted, of the layers of an un-adapted `model` that match `targets`.

    Modules that hold parameters of `head` are never among them: the head is trained whole.
    Raises UserError for a target that matches nothing, or a layer that is not linear.
    """
    whole = {name.rpartition(".")[0] for name in head}
    modules = {n: m for n, m in model.named_modules() if n and n not in whole}
    output = output_embedding(model)
    linear = [n for n, m in modules.items() if is_linear(m) and m is not output]
    if targets == "all-linear":
        if not linear:
            raise UserError(f"{type(model).__name__} has no linear layer to adapt")
        return sorted(linear)
    if isinstance(targets, str) or not targets:
        raise UserError(f"LoRA targets must be 'all-linear' or a list of names, got {targets!r}")
    found: set[str] = set()
    for target in targets:
        matched = [n for n in modules if n == target or n.endswith("." + target)]
        if not matched:
            raise UserError(no_such_target(model, target, linear))
        for name in matched:
            if not is_linear(modules[name]):
                raise UserError(
                    f"LoRA target {target!r}: {name} is a {type(modules[name]).__name__}, and only "
                    f"linear layers can be adapted; choose from {suffixes_of(linear)}"
                )
            if modules[name] is output and is_tied(model, modules[name]):
                raise UserError(
                    f"LoRA target {target!r}: {name} shares its weight with the input embedding, so "
                    f"that an update of one would change the other; choose from {suffixes_of(linear)}"
                )
        found.update(matched)
    return sorted(found)


def no_such_target(model: nn.Module, target: str, linear: Sequence[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear})
    return (
        f"LoRA target {target!r} matches no layer of {type(model).__name__}{meant(target, ends)}; "
        f"choose from {', '.join(ends)}, or 'all-linear'"
    )


def suffixes_of(linear: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


def output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None  # pyright: ignore[reportReturnType]


def is_tied(model: nn.Module, output: nn.Module) -> bool:
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return getattr(embedding, "weight", None) is output.weight


def is_linear(module: nn.Module) -> bool:
    # bitsandbytes' Linear4bit is an nn.Linear too.
    return isinstance(module, nn.Linear | Conv1D)


def is_conv1d(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the first of these layers holds its weight transposed, (in, out), as in GPT-2."""
    module = model.get_submodule(next(iter(names)))
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, Conv1D)


def layer_shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a 4-bit weight does not have it as its own shape."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    assert isinstance(base, Conv1D)
    return base.nf, base.nx


def check_ranks(model: nn.Module, names: Sequence[str], ranks: Mapping[int, float]) -> None:
    for name in names:
        m, n = layer_shape(model.get_submodule(name))
        for rank in sorted(ranks):
            if not 1 <= rank <= min(m, n):
                raise UserError(
                    f"rank {rank} does not fit layer {name} of shape {m} x {n}: expected a rank from "
                    f"1 to {min(m, n)}; lower the rank or leave this layer out of the targets"
                )
