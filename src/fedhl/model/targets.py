"""The layers of a model that get an adapter, and the ranks that fit them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedhl.errors import UserError, in_one_line
from fedhl.names import listed, meant


def find_targets(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"], head: Sequence[str] = ()
) -> list[str]:
    """The names, sorted, of the layers of an un-adapted `model` that match `targets`.

    Modules that hold parameters of `head` are never among them: the head is trained whole; nor does
    "all-linear" name a layer that cannot be adapted, which `unsuitable` tells.
    Raises UserError for a target that matches nothing, and for a layer that cannot be adapted.
    """
    whole = {name.rpartition(".")[0] for name in head}
    modules = {n: m for n, m in model.named_modules() if n and n not in whole}
    output = output_embedding(model)
    reasons = unsuitable(model, head)
    linear = [
        n for n, m in modules.items() if is_linear(m) and m is not output and n not in reasons
    ]
    if targets == "all-linear":
        if not linear:
            why = f" ({next(iter(reasons))} {next(iter(reasons.values()))})" if reasons else ""
            raise UserError(f"{type(model).__name__} has no linear layer to adapt{why}")
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
            if name in reasons:
                raise UserError(
                    f"LoRA target {target!r}: {name} {reasons[name]}; choose from {suffixes_of(linear)}, or "
                    "'all-linear', which leaves such layers out"
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


def unsuitable(model: nn.Module, head: Sequence[str] = ()) -> dict[str, str]:
    """The linear layers of an un-adapted model, beside its head, that cannot be adapted, and why not."""
    whole = {name.rpartition(".")[0] for name in head}
    shared, refused = sharing(model), refused_by_peft(model)
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if name in whole or not is_linear(module):
            continue
        if others := shared.get(name):
            reasons[name] = (
                f"shares its weight with {listed(others, 2)}, so that an update of one would change the other"
            )
        elif kind_of(name, module) in refused:
            reasons[name] = f"cannot be adapted by PEFT: {refused[kind_of(name, module)]}"
    return reasons


def left_out(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"], head: Sequence[str] = ()
) -> dict[str, str]:
    """The layers of an un-adapted model that "all-linear" leaves out since they cannot be adapted, and why
    not."""
    output = output_embedding(model)
    reasons = unsuitable(model, head) if targets == "all-linear" else {}
    return {n: why for n, why in reasons.items() if model.get_submodule(n) is not output}


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """The modules whose weight is also elsewhere in the model, and where: another module, or another name of
    the same module, which only one of its callers would see adapted."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter, []).append(name)
    shared: dict[str, list[str]] = {}
    for names in holders.values():
        owners = [name.rpartition(".")[0] for name in names]
        for name in names if len(names) > 1 else ():
            owner, _, own = name.rpartition(".")
            if own == "weight":
                shared[owner] = [other for other in owners if other != owner]
    return shared


Kind = tuple[str, type[nn.Module]]
"""What PEFT judges a layer by: the end of its name, and its type."""


def kind_of(name: str, module: nn.Module) -> Kind:
    return name.rpartition(".")[2], type(module)


def refused_by_peft(model: nn.Module) -> dict[Kind, str]:
    """The kinds of linear layers that PEFT does not adapt in this architecture, and what it says of them."""
    kinds = {kind_of(name, m): m for name, m in model.named_modules() if is_linear(m)}
    refused: dict[Kind, str] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (name, type_), module in kinds.items():
            alone = nn.Module()
            # PEFT knows the architecture by its config
            alone.config = getattr(model, "config", None)  # pyright: ignore
            alone.add_module(name, module)
            trained = [(p, p.requires_grad) for p in module.parameters()]
            try:
                LoraModel(alone, LoraConfig(r=1, target_modules=[name]), "trial")
            except Exception as error:  # whatever PEFT says of such a layer
                refused[name, type_] = in_one_line(error)
            finally:
                for parameter, trains in trained:
                    parameter.requires_grad_(trains)
    return refused


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
