"""Server states on disk: written atomically, checked by sha256 when read, a few of them kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.method import flatten, unflatten
from fedhl.server import ServerState

SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are missing or do not match their checksums."""


def save(folder: Path, state: ServerState, notes: dict[str, Any]) -> Path:
    """Write `folder/round-000012/`: the tensors, and a manifest with `notes` and both checksums.

    Everything is written and flushed under another name first, then renamed, so that a checkpoint
    is either whole or not there. Raises OSError or SafetensorError, e.g. when the disk is full.
    """
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
    final = folder / f"round-{state.round:06d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "state.safetensors")
        manifest = {"round": state.round, **notes}
        manifest["sha256"] = {
            "state.safetensors": sha256(partial / "state.safetensors"),
            "manifest": sha256_of(manifest),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        if final.exists():  # a round done again after a fall-back to an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load(checkpoint: Path, like: ServerState) -> tuple[ServerState, dict[str, Any]]:
    """The state and the manifest of one checkpoint; `like` gives the structure (say, `server.init`).

    Raises CorruptCheckpoint, naming the file and what is wrong with it.
    """
    file = checkpoint / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        expected = manifest.pop("sha256")
        if sha256_of(manifest) != expected["manifest"]:
            raise CorruptCheckpoint(f"{file}: it does not match its own checksum")
        file = checkpoint / "state.safetensors"
        if sha256(file) != expected["state.safetensors"]:
            raise CorruptCheckpoint(f"{file}: it does not match the checksum in manifest.json")
        # clones, because a mapped file aligns its tensors otherwise than memory does, and the last
        # bits of a product may depend on that
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        state = restore(tensors, like, manifest["round"])
    except CorruptCheckpoint:
        raise
    except Exception as error:  # anything may be wrong with a damaged file
        raise CorruptCheckpoint(f"{file}: it cannot be read ({error!r})") from error
    return state, manifest


def restore(tensors: dict[str, Tensor], like: ServerState, round: int) -> ServerState:
    """The state that these tensors hold. Raises KeyError for one that is missing or unknown."""
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


def stored(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(folder.glob("round-[0-9]*"), reverse=True)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of round `best`."""
    for path in stored(folder)[keep:]:
        if best is None or path.name != f"round-{best:06d}":
            shutil.rmtree(path)


def sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make what was written survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
