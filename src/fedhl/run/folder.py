"""The files of a run folder: written so that no crash leaves one half-written, and read back."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.files import json_text, write_text
from fedhl.locate import absolute, locate
from fedhl.names import listed
from fedhl.record import is_own, read_metrics, read_summary, rounds_in
from fedhl.watch import SILENT, Watcher

if TYPE_CHECKING:
    from fedhl.server import ServerState


def refuse_other(folder: Path, *, own: bool = False) -> None:
    """Raises UserError unless `folder` is the folder of one run, or, with `own`, of a personal model on its
    client's own machine."""
    if is_own(folder) and not own:
        raise UserError(
            f"{folder} is a personal model on its client's own machine, and no run; `fedhl export` reads it"
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    if (folder / "clients").is_dir():
        raise UserError(
            f"{folder} is the record of several runs, one for each client alone; name one of them, e.g. "
            f"{folder / 'clients' / '0'}"
        )


def refuse_taken(folder: Path) -> None:
    """Raises UserError unless `folder` is free for a new run."""
    if (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} exists already; continue it with `fedhl resume {folder}`, or choose another "
            "folder with --out"
        )
    # what a run that was killed at its very start may have left
    torn = {".config.yaml.partial"}
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - torn):
        raise UserError(
            f"{folder} exists already and is not a run; choose another folder with --out"
        )


# --- its config, and where model and data are ---------------------------------------------------

PLACES = ("model.source", "data.source", "data.held_out.source", "lora.start")
"""The settings that say where something is, and not what a run does with it."""
MAY_CHANGE = (*PLACES, "report_to")
"""The settings that a run need not keep."""


def load_run_config(
    folder: Path,
    places: Sequence[str] = (),
    needed: Collection[str] = (),
    *,
    draft: bool = False,
    own: bool = False,
) -> Config:
    """The config of a run folder. `places`: where model and data are now, as `KEY=PATH`, and `report_to=...`;
    `needed`: the keys of what must be there; `draft`: as in `load_config`; `own`: as in `refuse_other`.
    Raises UserError if `folder` is not a run folder, and for what is not there."""
    refuse_other(folder, own=own)
    for change in places:
        key = change.partition("=")[0].strip()
        if key not in MAY_CHANGE:
            raise UserError(
                f"--set {change!r}: a run keeps its settings; only where things are, and where metrics go, "
                f"can change: {', '.join(MAY_CHANGE)}"
            )
    config = load_config(folder / "config.yaml", places, draft=draft)
    for key, source in places_of(config).items():
        try:
            if key in needed:
                locate(source)
        except UserError as error:
            raise UserError(
                f"{folder}: {key}: {error}; if it is elsewhere now, add --set {key}=PATH"
            ) from None
    return config


def places_of(config: Config) -> dict[str, str]:
    """The places that a config names, by key."""
    held_out = config.data.held_out
    values = (
        config.model.source,
        config.data.source,
        held_out and held_out.source,
        config.lora.start,
    )
    return {key: value for key, value in zip(PLACES, values, strict=True) if value is not None}


def placed(config: Config, place: Callable[[str], str]) -> Config:
    """The config with `place(source)` in place of each place that it names."""
    changed = {key: place(source) for key, source in places_of(config).items()}
    data: dict[str, Any] = {"source": changed["data.source"]}
    if "data.held_out.source" in changed and config.data.held_out:
        held_out = {"source": changed["data.held_out.source"]}
        data["held_out"] = config.data.held_out.model_copy(update=held_out)
    lora = {"start": changed["lora.start"]} if "lora.start" in changed else {}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": changed["model.source"]}),
            "data": config.data.model_copy(update=data),
            "lora": config.lora.model_copy(update=lora),
        }
    )


def anchored(config: Config) -> Config:
    """The config with absolute paths, so that it means the same in any working folder."""
    return placed(config, absolute)


def same_settings(one: Config, other: Config) -> bool:
    """Whether two configs differ at most in where model and data are, and in their trackers."""
    one, other = (config.model_copy(update={"report_to": []}) for config in (one, other))
    return placed(one, lambda _: "") == placed(other, lambda _: "")


def trackers_of(config: Config) -> str:
    """The trackers of a config as a change, for `load_run_config`."""
    return f"report_to={json_text(config.model_dump(mode='json')['report_to'])}"


# --- its checkpoints ----------------------------------------------------------------------------


def load_checkpoint(
    folder: Path,
    like: ServerState,
    which: int | Literal["last", "best"],
    watcher: Watcher = SILENT,
) -> tuple[ServerState, dict[str, Any]]:
    """The state and manifest of a checkpoint: the newest good one, the best, or a round's.

    If the newest checkpoint is corrupt, a warning names it, and the checkpoint before it is used. Raises
    UserError if no checkpoint can be used, naming the checkpoints that were kept.
    """
    from fedhl.run import checkpoint  # imports torch, which the rest of this file does without

    rounds = rounds_in(folder / "state")
    if which == "last":
        for round, path in rounds.items():
            try:
                return checkpoint.load(path, like)
            except checkpoint.CorruptCheckpoint as error:
                watcher.say(
                    f"warning: the checkpoint of round {round} is corrupt and is not used: {error}"
                )
        raise UserError(
            f"{folder}: no checkpoint can be read; start the run anew with another --out"
        )
    if which == "best":
        best = read_summary(folder)["best"]
        if best is None:
            raise UserError(
                f"{folder}: no round was evaluated, so that no round is the best; use --round last"
            )
        which = int(best["round"])
    if which not in rounds:
        kept = listed(sorted(rounds)) or "none"
        raise UserError(
            f"{folder}: no checkpoint of round {which}; kept: {kept} (see checkpoints.keep)"
        )
    try:
        return checkpoint.load(rounds[which], like)
    except checkpoint.CorruptCheckpoint as error:
        raise UserError(f"{folder}: the checkpoint of round {which} is corrupt: {error}") from None


def keep_metrics(folder: Path, last: dict[str, Any]) -> None:
    """Cut metrics.jsonl back to the rounds up to `last`, the line of the checkpoint."""
    lines = read_metrics(folder)
    # the line in the file is the same, with the seconds of the checkpoint
    last = next((line for line in lines if line["round"] == last["round"]), last)
    kept = [*(line for line in lines if line["round"] < last["round"]), last]
    text = "".join(json_text(line) + "\n" for line in kept)
    write_text(folder / "metrics.jsonl", text)


def networked(folder: Path) -> bool:
    """Whether the clients of this run are other processes, which keep their own tensors."""
    return (folder / "run-id").exists()


def secret_of(folder: Path, fresh: bytes) -> bytes:
    """The secret from which the noise of a run with privacy is drawn, in `secret.key`, which only its owner
    may read. A new run takes `fresh`. Raises UserError if the secret of an old run is lost or damaged."""
    file = folder / "secret.key"
    if not file.exists():
        if rounds_in(folder / "state"):
            raise UserError(
                f"{file} is missing, and without the secret the noise of this run cannot be continued; "
                "restore the file, or start a new run"
            )
        write_text(file, fresh.hex() + "\n")
    try:
        secret = bytes.fromhex(file.read_text(encoding="utf-8"))
    except ValueError:
        secret = b""
    if len(secret) != len(fresh):
        raise UserError(
            f"{file} is damaged: expected {2 * len(fresh)} hexadecimal digits; restore the file"
        )
    return secret


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a message that says how to continue; saved rounds stay saved."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        if (folder / "config.yaml").is_file():
            advice = f"every finished round is saved: make room, then run fedhl resume {folder}"
        else:
            advice = "nothing was trained: make room, or choose another folder with --out"
        raise UserError(
            f"cannot write to {folder}: {error} ({free:,.0f} MiB free); {advice}"
        ) from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block no other process writes to this run folder. The system lifts the lock when a process
    ends, however it ends. Raises UserError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working in {folder}; wait until it ends, or stop it"
            ) from None
        except OSError:  # some network file systems have no such lock
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C (or SIGTERM) inside the block takes effect at its end: no file is left half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    before = {
        number: signal.signal(number, lambda *_: pending.append(True))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt
