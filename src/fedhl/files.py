"""Files that exist whole or not at all, also after a power cut, and that only their owner may read; hashes
of files; the place of the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

PRIVATE, PRIVATE_FOLDER = 0o600, 0o700
"""The permissions of what a run and a client write: metrics, replies and states tell of people's rows."""


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter, and its parents as usual; one that is there stays as it
    is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(PRIVATE_FOLDER, exist_ok=True)


def flush(path: Path) -> None:
    """Flush this file or folder to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of another file to write, which replaces `path` when the block ends well.

    The file is flushed before, and its folder after. Only its owner may read it, from its first byte on.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch(PRIVATE)
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8 and with the line ends of `text`, whole or not at all."""
    write_bytes(path, text.encode())


def finite(value: Any) -> Any:
    """The same numbers, lists and dictionaries, with None for each number that is not finite, since JSON has
    no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, with null for numbers that are not finite."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line of JSON, on disk when this returns."""
    path.touch(PRIVATE)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_folder(
    path: Path, staging: Path, replace: bool = False, private: bool = False
) -> Iterator[Path]:
    """The empty folder `staging` to fill, in the same parent, which becomes `path` when the block ends well.

    Everything in it is flushed before, and the parent after. `staging` is removed in any case, also if a
    killed process has left it. `private`: only its owner may read it. Raises OSError if `path` is a folder
    that is not empty, unless `replace`.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(PRIVATE_FOLDER if private else 0o777, parents=True)
    try:
        yield staging
        for entry in (*staging.rglob("*"), staging):
            if private:
                entry.chmod(PRIVATE_FOLDER if entry.is_dir() else PRIVATE)
            flush(entry)
        if replace and path.exists():
            shutil.rmtree(path)
        staging.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


SUMS = "SHA256SUMS"
"""The file of a folder that says what the others must be, as `sha256sum` writes it."""


def sums(folder: Path) -> str:
    """The sha256 and the name of every other file in a folder, a line each, in the order of the names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)


def intact(folder: Path) -> bool:
    """Whether a folder has exactly the files that its `SHA256SUMS` names, with their content."""
    try:
        return (folder / SUMS).read_text(encoding="utf-8") == sums(folder)
    except (OSError, ValueError):
        return False


def sha256_of(text: str) -> str:
    """The sha256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def cache() -> Path:
    """The folder for files that fedhl can make again: `$FEDHL_CACHE`, or `~/.cache/fedhl`."""
    return Path(os.environ.get("FEDHL_CACHE") or Path.home() / ".cache" / "fedhl")


def file_name(text: str) -> str:
    """A text from another machine as the name of a file, in ASCII: without separators, and without dots,
    since `..` is the folder above. Two texts never have the same name. Raises ValueError for an unpaired
    surrogate."""
    return quote(text, safe="").replace(".", "%2E")
