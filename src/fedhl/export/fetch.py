"""The folder of an adapter to merge, which may have to be downloaded from the hub first."""

from __future__ import annotations

from pathlib import Path

from fedhl.errors import UserError
from fedhl.locate import locate


def adapter_folder(source: str) -> Path:
    """The folder of an adapter, a hub id or a path; an adapter on the hub is downloaded first. Raises
    UserError if there is no such adapter."""
    path = locate(source)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["adapter_*", "config.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"no adapter folder {source!r} here, and it cannot be fetched from the hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
