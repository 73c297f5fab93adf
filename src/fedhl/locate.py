"""The place of a model or a data file: a path, a file inside an installed package, or a hub id."""

from __future__ import annotations

import re
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path, PurePath

from fedhl.errors import UserError
from fedhl.names import meant

PACKAGE = "package:"
FORMS = (
    "a source is a path (data/train.jsonl), a file in an installed package "
    "(package:import_name/inner/path) or a hub id (owner/name)"
)
# A hub name may contain dots ("Qwen/Qwen2.5-0.5B"), so only these endings say "this is a file".
FILE_SUFFIXES = tuple(
    f".{ending}"
    for ending in (
        *("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "txt", "md", "xlsx"),
        *("gz", "zip", "tar", "xz", "zst", "bz2"),
        *("gguf", "safetensors", "bin", "pt", "npz", "yaml", "yml", "toml", "py"),
    )
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def locate(source: str) -> Path | None:
    """The existing file or folder that `source` names; None when it is a hub id instead.

    `source` is a path (relative to the current folder; `~` is expanded), or
    `package:import_name/inner/path`, or a hub id `owner/name`, `owner/name:config` or `name`.
    A local file of the same name comes first; a package is found without importing it.

    Raises UserError for a file, package or inner path that does not exist.
    """
    if not source.strip():
        raise UserError(f"the source is empty; {FORMS}")
    if source.startswith(PACKAGE):
        return inside_package(source)
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a name that is too long
        raise UserError(f"{source[:100]!r} is no path on this machine: {error}; {FORMS}") from None
    if is_hub_id(source):
        return None
    raise UserError(f"{missing_part(path)}; {FORMS}")


def absolute(source: str) -> str:
    """The source as it means the same in any working folder. Raises UserError as `locate` does."""
    path = None if source.startswith(PACKAGE) else locate(source)
    return source if path is None else str(path.absolute())


def is_hub_id(source: str) -> bool:
    name = source.rpartition("/")[2]
    return bool(HUB_ID.fullmatch(source)) and Path(name).suffix.lower() not in FILE_SUFFIXES


def inside_package(source: str) -> Path:
    name, _, inner = source.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(
            f"{source!r}: {name!r} is not the import name of a package; "
            "write package:import_name/inner/path"
        )
    if ".." in PurePath(inner).parts:
        raise UserError(
            f"{source!r} leaves the package; leave out the '..', or give a path without {PACKAGE!r}"
        )
    spec = spec_of(name)
    if spec is None:
        raise UserError(
            f"{source!r}: no package {name!r} in this Python environment"
            f"{meant(name, packages_distributions())}; install it with "
            f"`pip install {name.replace('_', '-')}` (its name on the index may differ)"
        )
    if not spec.submodule_search_locations:
        raise UserError(
            f"{source!r}: {name!r} is a single module, without files inside; name a package"
        )
    candidates = [Path(root) / inner.lstrip("/") for root in spec.submodule_search_locations]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise UserError(f"{source!r}: {missing_part(candidates[0])}")


def spec_of(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ValueError:  # a module already loaded without a spec, such as __main__
        return None


def missing_part(path: Path) -> str:
    """A message that says which part of `path` does not exist, and what its folder has instead."""
    part, folder = path, path.parent
    while not folder.exists():
        part, folder = folder, folder.parent
    if not folder.is_dir():
        return f"{str(path)!r} cannot exist: {str(folder)!r} is a file"
    names = sorted(
        entry.name for entry in folder.iterdir() if not entry.name.startswith((".", "_"))
    )
    close = meant(part.name, names, 3)
    where = "the current folder" if folder == Path(".") else repr(str(folder))
    text = f"no file or folder {str(path)!r}"
    if part != path:
        text += f" (there is no {part.name!r} in {where})"
    if close:
        return text + close
    if names:
        return f"{text}; {where} has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    return f"{text}; {where} is empty"
