"""Server states on disk: written atomically, checked by sha256 when read, a few of them kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fedhl.method import flatten, unflatten
from fedhl.server import ServerState

SEPARATOR = "::"  # between the parts of a tensor's name; layer names have dots


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are missing or do not match their checksums."""


def save(folder: Path, state: ServerState, notes: dict[str, Any]) -> Path:
    """Write `folder/round-000012/`: the tensors, and a manifest with their checksum and `notes`.

    Everything is written and flushed under another name first, then renamed, so that a checkpoint
    is either whole or not there. Raises OSError, e.g. when the disk is full.
    """
    tensors = {
        SEPARATOR.join(("layer", layer, name)): tensor.cpu()
        for layer, value in state.layers.items()
        for name, tensor in flatten(value).items()
    }
    tensors |= {
        SEPARATOR.join(("head", name)): t.contiguous().cpu() for name, t in state.head.items()
    }
    final = folder / f"round-{state.round:06d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "state.safetensors")
        manifest = {
            "round": state.round,
            "sha256": {"state.safetensors": sha256(partial / "state.safetensors")},
            **notes,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for file in partial.iterdir():
            flush(file)
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

    Raises CorruptCheckpoint, saying what is wrong.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        file, expected = checkpoint / "state.safetensors", manifest["sha256"]["state.safetensors"]
        if sha256(file) != expected:
            raise CorruptCheckpoint(f"{file}: the checksum does not match the manifest's")
        tensors = load_file(file)
    except CorruptCheckpoint:
        raise
    except Exception as error:  # anything may be wrong with a damaged file
        raise CorruptCheckpoint(f"{checkpoint}: {error}") from error
    layers: dict[str, dict[str, Any]] = {name: {} for name in like.layers}
    head = {}
    for key, tensor in tensors.items():
        kind, name, *rest = key.split(SEPARATOR)
        if kind == "head":
            head[name] = tensor
        else:
            layers[name][rest[0]] = tensor
    state = {name: unflatten(like.layers[name], parts) for name, parts in layers.items()}
    return ServerState(manifest["round"], state, {name: head[name] for name in like.head}), manifest


def stored(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(folder.glob("round-[0-9]*"), reverse=True)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of round `best`."""
    for path in stored(folder)[keep:]:
        if best is None or path.name != f"round-{best:06d}":
            shutil.rmtree(path)


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
