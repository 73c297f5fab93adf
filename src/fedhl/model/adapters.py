"""Adapter folders in PEFT's format, written and read without their base model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.errors import UserError
from fedhl.lora import LoRA
from fedhl.model.adapter_config import AdapterConfig, Patterns, patterns, read_config

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FROZEN = ".base_layer.weight"
"""The end of the name of a base weight under an adapted layer."""
# Heads that PEFT itself wraps, for these tasks, by the end of the module's name.
AUTOMATIC_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def cpu_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


class AdapterFolder(NamedTuple):
    """The contents of a PEFT LoRA folder: the adapter, the head trained beside it, and the config; `frozen`:
    the base weights under adapted layers, by layer, which PEFT saves of an adapted output embedding."""

    adapter: dict[str, LoRA]
    head: dict[str, Tensor]
    config: AdapterConfig
    frozen: dict[str, Tensor]


def save_adapter(
    folder: Path,
    adapter: Mapping[str, LoRA],
    head: Mapping[str, Tensor],
    *,
    base: str,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    revision: str | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the PEFT adapter folder of `adapter`, `head` and `frozen`; ranks may differ between layers.

    The scale goes into B, and `lora_alpha = r`, so that PEFT's own scaling is 1 in every layer.
    `base` and `revision` name the model of the adapter, `task_type` is PEFT's name for its kind of task.
    """
    ranks = {name: adapter[name].rank for name in sorted(adapter)}
    if not ranks or min(ranks.values()) < 1:
        empty = [name for name, rank in ranks.items() if rank < 1]
        raise ValueError(
            f"an adapter needs at least one component in every layer; without one: {empty}"
        )
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored, or PEFT would take the pattern for any layer that ends in this name.
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        base_model_name_or_path=base,
        revision=revision,
        task_type=task_type,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        modules_to_save=head_modules(head) or None,
        fan_in_fan_out=fan_in_fan_out,
    )
    config.target_modules = list(ranks)  # PEFT made it a set; in order, the same file every time
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        lora = adapter[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = cpu_copy(lora.A).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = cpu_copy(lora.B * lora.scale).contiguous()
    for name, weight in sorted((frozen or {}).items()):
        tensors[f"{PREFIX}{name}{FROZEN}"] = cpu_copy(weight).contiguous()
    for name in sorted(head):
        tensors[PREFIX + name] = cpu_copy(head[name]).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def head_modules(head: Mapping[str, Tensor]) -> list[str]:
    """The modules that PEFT must save whole to cover these parameters, none inside another."""
    modules: set[str] = set()
    for name in head:
        parts = name.split(".")[:-1]
        if not parts:
            raise ValueError(
                f"head parameter {name!r} belongs to no module, so that PEFT cannot save it"
            )
        ends = [i for i, part in enumerate(parts, 1) if part.endswith(("classifier", "score"))]
        modules.add(".".join(parts[: ends[0] if ends else len(parts)]))
    return sorted(m for m in modules if not any(part in modules for part in around(m)))


def around(module: str) -> Iterator[str]:
    """The names of the modules that a module lies in, the innermost first."""
    while module := module.rpartition(".")[0]:
        yield module


def load_adapter(folder: Path) -> AdapterFolder:
    """The contents of a PEFT LoRA folder, in float32, without loading its base model.

    Raises UserError for anything that plain LoRA on linear layers cannot express, and for any
    tensor that is missing, unknown, not finite or of a shape that contradicts the config.
    """
    config = read_config(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    is_head = heads(config)
    for key, tensor in read_tensors(folder):
        name = key.removeprefix(PREFIX)
        if name == key:
            raise UserError(f"{folder}: tensor {key!r} does not start with {PREFIX!r}")
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            layer, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            factors.setdefault(layer, {})[factor] = tensor
        elif name.endswith(FROZEN):
            frozen[name.removesuffix(FROZEN)] = tensor
        elif is_head(name):
            head[name] = tensor
        else:
            raise UserError(
                f"{folder}: tensor {name!r} is neither a LoRA factor of a linear layer nor in "
                f"modules_to_save ({config.modules_to_save!s:.100}); such adapters are not supported"
            )
    if not factors:
        raise UserError(f"{folder}: {WEIGHTS_FILE} holds no LoRA factors")
    ranks = patterns(f"{folder}: rank_pattern", config.rank_pattern)
    alphas = patterns(f"{folder}: alpha_pattern", config.alpha_pattern)
    adapter = {
        layer: read_layer(folder, layer, factors[layer], config, ranks, alphas) for layer in factors
    }
    for layer, weight in frozen.items():
        if layer not in adapter or weight.shape != adapter[layer].shape:
            raise UserError(
                f"{folder}: the base weight of {layer} does not belong to an adapted layer"
            )
    return AdapterFolder(adapter, head, config, frozen)


def adapter_labels(folder: Path) -> list[str] | None:
    """The names of the labels that the head of an adapter has, in order, from the model's config beside it;
    None if nobody has named them, as in a folder that PEFT wrote alone. Raises UserError for a config that is
    none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        known = from_json(file.read_bytes()).get("id2label") or {}
        labels = [str(known[key]) for key in sorted(known, key=int)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the labels in {file}: {error}") from error
    return None if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter's folder by name, sorted, in float32. Raises UserError for a tensor that is
    not of finite numbers."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS_FILE}; expected a PEFT adapter folder (pickled .bin weights are "
            "not read: load and save the adapter again with a recent PEFT)"
        )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; is it complete?") from error
    for key in sorted(tensors):
        if not key.isprintable() or len(key) > 1000:
            raise UserError(
                f"{folder}: the tensor name {key!r:.60} has a control character or more than 1000 letters"
            )
        tensor = tensors[key]
        if not tensor.is_floating_point():
            raise UserError(
                f"{folder}: tensor {key!r} holds {tensor.dtype}, expected floating-point numbers"
            )
        if not is_finite(tensor := tensor.float()):
            raise UserError(
                f"{folder}: tensor {key.removeprefix(PREFIX)!r} holds NaN or infinite numbers, so that the "
                "training of this adapter must have diverged; leave the adapter out, or train it again"
            )
        yield key, tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; the tensor is not copied."""
    return math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """The largest magnitude, 0 of none; NaN if a number is NaN."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(-low, high))


def read_layer(
    folder: Path,
    layer: str,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    ranks: Patterns[int],
    alphas: Patterns[float],
) -> LoRA:
    if factors.keys() != {"A", "B"}:
        raise UserError(
            f"{folder}: layer {layer} has only lora_{next(iter(factors))}, expected lora_A and lora_B"
        )
    rank, alpha = ranks.of(layer, config.r), alphas.of(layer, config.lora_alpha)
    A, B = factors["A"], factors["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{folder}: layer {layer}: the config says rank {rank!s:.20}, "
            f"but A is {tuple(A.shape)} and B is {tuple(B.shape)}"
        )
    if not (A.numel() and B.numel()):
        raise UserError(
            f"{folder}: layer {layer} is empty: A is {tuple(A.shape)} and B is {tuple(B.shape)}"
        )
    scale = float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
    # no entry of the update can be larger
    if rank * abs(scale) * largest(A) * largest(B) > torch.finfo(torch.float32).max:
        raise UserError(
            f"{folder}: layer {layer}: its factors and its scale of {scale:g} are so large that the update "
            "is infinite in float32; check lora_alpha and alpha_pattern, or leave the adapter out"
        )
    return LoRA(A, B, scale)


def heads(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether a parameter belongs to a module that PEFT saves whole: one whose name ends as `modules_to_save`
    says, or that lies in such a module."""
    saved = {*(config.modules_to_save or ()), *AUTOMATIC_HEADS.get(str(config.task_type), ())}
    lengths = {len(name) for name in saved}  # in adapters from anywhere there may be many names
    return lambda name: any(part[-n:] in saved for part in around(name) for n in lengths)
