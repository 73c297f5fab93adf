"""Server states on disk: written atomically, checked by sha256 when read, a few of them kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.files import sha256, sha256_of, whole_folder
from fedhl.method import flatten, unflatten
from fedhl.record import round_name, rounds_in
from fedhl.server import ServerState

SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are missing or do not match their checksums."""


def save(folder: Path, state: ServerState, notes: dict[str, Any]) -> Path:
    """Write `folder/round-000012/`: the tensors, and a manifest with `notes` and both checksums.

    The files are written and flushed under another name first, then renamed, so that a checkpoint is
    either whole or absent. Raises OSError or SafetensorError, e.g. when the disk is full.
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
    name = round_name(state.round)
    # one of the same name is of a round done again, after a fall-back to an older checkpoint
    with whole_folder(folder / name, folder / f".partial-{name}", replace=True) as staging:
        save_file(tensors, staging / "state.safetensors")
        manifest = {"round": state.round, **notes}
        manifest["sha256"] = {
            "state.safetensors": sha256(staging / "state.safetensors"),
            "manifest": sha256_of(json.dumps(manifest)),
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder / name


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
    """Remove all checkpoints but the newest `keep` and the checkpoint of round `best`."""
    for round, path in list(rounds_in(folder).items())[keep:]:
        if round != best:
            shutil.rmtree(path)
