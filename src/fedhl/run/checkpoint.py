"""Server states on disk: written atomically, checked by sha256 when read, a few of them kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.files import private_folder, sha256, sha256_of, whole_folder
from fedhl.method import flatten, unflatten
from fedhl.record import round_name, rounds_in
from fedhl.server import ServerState
from fedhl.server.ledger import Ledger
from fedhl.server.state import with_ledger
from fedhl.shelf import Matrices, save_matrices

MEMORIES = "memories"
"""The folder of what clients hold, beside the checkpoints that name it."""
SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are missing or do not match their checksums."""


def save(folder: Path, state: ServerState, notes: dict[str, Any]) -> Path:
    """Write `folder/round-000012/`: the tensors, and a manifest with `notes` and all checksums.

    The files are written and flushed under another name first, then renamed, so that a checkpoint is
    either whole or absent. A memory never changes, and is one file of all checkpoints that name it. Raises
    OSError or SafetensorError, e.g. when the disk is full.
    """
    memories = files_of(folder, state.ledger)
    tensors = {
        SEPARATOR.join(("layer", layer, name)): tensor.cpu()
        for layer, value in state.layers.items()
        for name, tensor in flatten(value).items()
    }
    tensors |= {
        SEPARATOR.join(("head", name)): t.contiguous().cpu() for name, t in state.head.items()
    }
    tensors |= {
        SEPARATOR.join(("client", client, name)): tensor.contiguous().cpu()
        for client, kept in state.clients.items()
        for name, tensor in kept.items()
    }
    name = round_name(state.round)
    # one of the same name is of a round done again, after a fall-back to an older checkpoint
    with whole_folder(
        folder / name, folder / f".partial-{name}", replace=True, private=True
    ) as staging:
        save_file(tensors, staging / "state.safetensors")
        manifest = {"round": state.round, **notes}
        manifest["ledger"] = {
            "of": dict(state.ledger.of),
            "memories": {version: file.sha256 for version, file in memories.items()},
        }
        manifest["sha256"] = {
            "state.safetensors": sha256(staging / "state.safetensors"),
            "manifest": sha256_of(json.dumps(manifest)),
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder / name


def on_disk(folder: Path, state: ServerState) -> ServerState:
    """The state, whose memories are files beside the checkpoints in `folder` from now on."""
    return with_ledger(state, Ledger(state.ledger.of, files_of(folder, state.ledger)))


def files_of(folder: Path, ledger: Ledger) -> dict[str, Matrices]:
    """The memories of a ledger as files, each written unless it is there already."""
    place = folder / MEMORIES
    if ledger.memories:
        private_folder(place)
    return {
        version: memory
        if isinstance(memory, Matrices) and memory.file.parent == place
        else save_matrices(memory_file(folder, version), memory)
        for version, memory in ledger.memories.items()
    }


def memory_file(folder: Path, version: str) -> Path:
    """The file of the memory of this version, among the checkpoints in `folder`."""
    return folder / MEMORIES / f"{version}.safetensors"


def load(checkpoint: Path, like: ServerState) -> tuple[ServerState, dict[str, Any]]:
    """The state and the manifest of one checkpoint; `like` gives the structure (say, `server.init`).

    Raises CorruptCheckpoint, naming the file and the reason.
    """
    file = checkpoint / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        expected = manifest.pop("sha256")
        if sha256_of(json.dumps(manifest)) != expected["manifest"]:
            raise CorruptCheckpoint(f"{file}: does not match its own checksum")
        file = checkpoint / "state.safetensors"
        if sha256(file) != expected["state.safetensors"]:
            raise CorruptCheckpoint(f"{file}: does not match its checksum in manifest.json")
        # clones, because a mapped file aligns its tensors otherwise than memory does, and the last
        # bits of a product may depend on that
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        state = restore(tensors, like, manifest["round"])
        said = manifest.pop("ledger", {"of": {}, "memories": {}})  # absent before version 0.2
        memories = {}
        for version, expected in said["memories"].items():
            file = memory_file(checkpoint.parent, version)
            if sha256(file) != expected:
                raise CorruptCheckpoint(f"{file}: does not match its checksum in the manifest")
            memories[version] = Matrices(file, expected)
        state = replace(state, ledger=Ledger(said["of"], memories))
    except CorruptCheckpoint:
        raise
    except Exception as error:  # anything may be wrong with a damaged file
        raise CorruptCheckpoint(f"{file}: cannot be read ({error!r})") from error
    return state, manifest


def restore(tensors: dict[str, Tensor], like: ServerState, round: int) -> ServerState:
    """The state that these tensors hold. Raises KeyError for a tensor that is missing or unknown."""
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in like.layers}
    head: dict[str, Tensor] = {}
    clients: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(SEPARATOR)
        if kind == "head":
            head[name] = tensor
            continue
        owner, _, part = name.rpartition(SEPARATOR)  # a client's id may hold anything
        if kind == "client":
            clients.setdefault(owner, {})[part] = tensor
        else:
            layers[owner][part] = tensor
    state = {name: unflatten(like.layers[name], parts) for name, parts in layers.items()}
    return ServerState(round, state, {name: head[name] for name in like.head}, clients)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep` and the checkpoint of round `best`, and all memories that
    no checkpoint names."""
    for round, path in list(rounds_in(folder).items())[keep:]:
        if round != best:
            shutil.rmtree(path)
    named = {version for path in rounds_in(folder).values() for version in memories_of(path)}
    for file in (folder / MEMORIES).glob("*.safetensors"):
        if file.stem not in named:
            file.unlink()


def memories_of(checkpoint: Path) -> set[str]:
    """The versions of the memories that a checkpoint names; none if its manifest cannot be read."""
    try:
        return set(json.loads((checkpoint / "manifest.json").read_text())["ledger"]["memories"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()
