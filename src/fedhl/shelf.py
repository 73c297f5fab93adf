"""Layer states and adapters that stay on disk, of which a server holds one layer at a time.

A full-rank update is as large as the layers that it changes: 4.3 GB in float32 for the q and v projections of
a 7B model, and the adapters of a hundred clients take as much again. Neither has to be in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedhl.files import private_folder, sha256, whole_file
from fedhl.lora import LoRA
from fedhl.method import flatten, unflatten

SUFFIX = ".safetensors"


class Shelf(MutableMapping[str, Any]):
    """Method states by layer name, each in a file of its own: `ServerState.layers` that is not in memory.

    `like`: any state of the method, for its structure. A state that is read is a copy that the caller may
    keep; a state that is written replaces the file whole or not at all. If `server.aggregate` writes to
    another shelf than it reads from, an interrupted round can be repeated.
    """

    def __init__(self, folder: Path, like: Any) -> None:
        private_folder(folder)
        self.folder, self.like = folder, like

    def file(self, layer: str) -> Path:
        return self.folder / (quote(layer, safe="") + SUFFIX)

    def __getitem__(self, layer: str) -> Any:
        if not self.file(layer).is_file():
            raise KeyError(layer)
        # clones, because a mapped file aligns its tensors otherwise than memory does, and the last
        # bits of a product may depend on that
        return unflatten(self.like, {k: v.clone() for k, v in load_file(self.file(layer)).items()})

    def __setitem__(self, layer: str, state: Any) -> None:
        with whole_file(self.file(layer)) as partial:
            save_file(flatten(state), partial)

    def __delitem__(self, layer: str) -> None:
        if not self.file(layer).is_file():
            raise KeyError(layer)
        self.file(layer).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(
            sorted(unquote(file.name[: -len(SUFFIX)]) for file in self.folder.glob("*" + SUFFIX))
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


class AdapterFile(Mapping[str, LoRA]):
    """One client's adapters in a safetensors file, `LAYER.A (r, n)` and `LAYER.B (m, r)`, read a layer at
    a time; `scale`: the scale of all of them. Raises SafetensorError or OSError for a file that is not a
    safetensors file.
    """

    def __init__(self, file: Path, scale: float) -> None:
        self.file, self.scale = file, scale
        with safe_open(file, framework="pt") as tensors:
            self.layers = sorted({name.rpartition(".")[0] for name in tensors.keys()})  # noqa: SIM118

    def __getitem__(self, layer: str) -> LoRA:
        if layer not in self.layers:
            raise KeyError(layer)
        with safe_open(self.file, framework="pt") as tensors:
            A, B = (tensors.get_tensor(f"{layer}.{factor}") for factor in "AB")
        return LoRA(A, B, self.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class Matrices(Mapping[str, torch.Tensor]):
    """Matrices by layer name in a safetensors file, read a layer at a time: what a client holds. `sha256`: of
    the file. Raises SafetensorError or OSError for a file that is not a safetensors file."""

    def __init__(self, file: Path, sha256: str) -> None:
        self.file, self.sha256 = file, sha256
        with safe_open(file, framework="pt") as tensors:
            self.layers = sorted(tensors.keys())

    def __getitem__(self, layer: str) -> torch.Tensor:
        if layer not in self.layers:
            raise KeyError(layer)
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(
                layer
            ).clone()  # aligned as memory is, like a state of `Shelf`

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def save_matrices(file: Path, matrices: Mapping[str, torch.Tensor]) -> Matrices:
    """Write the file that `Matrices` reads, whole or not at all."""
    with whole_file(file) as partial:
        save_file({name: matrices[name].cpu().contiguous() for name in matrices}, partial)
    return Matrices(file, sha256(file))


def save_adapter(file: Path, adapter: Mapping[str, LoRA]) -> None:
    """Write the file that `AdapterFile` reads."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, lora in adapter.items():
        tensors |= {f"{layer}.A": lora.A.contiguous(), f"{layer}.B": lora.B.contiguous()}
    save_file(tensors, file)
