"""The folder of an adapter to merge, which may have to be downloaded from the hub first."""

from __future__ import annotations

from pathlib import Path

from fedhl.errors import UserError, in_one_line
from fedhl.locate import locate


def adapter_folder(source: str) -> Path:
    """The folder of an adapter, a hub id or a path; an adapter on the hub is downloaded first. Raises
    UserError if there is no such adapter."""
    path = locate(source)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["adapter_*", "config.json"]))
    except Exception as error:  # the library raises nearly everything here
        raise UserError(
            f"no adapter folder {source!r} here, and it cannot be fetched from the hub: "
            f"{in_one_line(error)}"
        ) from error
