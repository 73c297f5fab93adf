"""A personal model on its client's own machine: the folder that a node keeps, and `fedhl export` reads.

`config.yaml`, `summary.json` with what a model card says, and `model.safetensors`: what the model adds to
each layer of the base model, and its head. Only the owner may read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.config import Config, dump_config
from fedhl.errors import UserError
from fedhl.files import json_text, whole_folder
from fedhl.lora import LoRA
from fedhl.record import OWN_MODEL

SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots
WHOLE = "W"
"""The name of a change that is no adapter."""


def keep_own(
    folder: Path,
    config: Config,
    summary: Mapping[str, Any],
    change: Mapping[str, LoRA | Tensor],
    head: Mapping[str, Tensor],
) -> None:
    """Write the folder, whole or not at all, in place of one that is there. `change`: `ΔW` of each layer,
    (m, n) or factors."""
    tensors = {SEPARATOR.join(("head", name)): x.contiguous() for name, x in head.items()}
    for layer, delta in change.items():
        if isinstance(delta, LoRA):
            scale = torch.tensor(delta.scale, dtype=torch.float64)
            parts = {"A": delta.A, "B": delta.B, "scale": scale}
        else:
            parts = {WHOLE: delta}
        tensors |= {f"layer::{layer}::{part}": x.contiguous() for part, x in parts.items()}
    staging = folder.with_name(f".partial-{folder.name}")
    with whole_folder(folder, staging, replace=True, private=True) as place:
        (place / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (place / "summary.json").write_text(json_text(summary, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, place / OWN_MODEL)


def read_own(folder: Path) -> tuple[dict[str, LoRA | Tensor], dict[str, Tensor]]:
    """The change of each layer, and the head. Raises UserError if the file cannot be read."""
    try:
        tensors = load_file(folder / OWN_MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / OWN_MODEL}: {error}; restore the file") from None
    layers: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(SEPARATOR)
        if kind == "head":
            head[name] = tensor
        else:
            layer, _, part = name.rpartition(SEPARATOR)
            layers.setdefault(layer, {})[part] = tensor
    change: dict[str, LoRA | Tensor] = {
        layer: parts[WHOLE]
        if WHOLE in parts
        else LoRA(parts["A"], parts["B"], float(parts["scale"]))
        for layer, parts in sorted(layers.items())
    }
    return change, head
