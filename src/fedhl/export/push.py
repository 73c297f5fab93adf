"""Send an export to the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedhl import __version__
from fedhl.errors import UserError, in_one_line

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(name: str) -> None:
    """Raises UserError unless `name` can be a repository and somebody is logged in; nothing is sent."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--push {name!r}: expected the name of a repository on the hub, OWNER/NAME"
        )
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "--push needs to know who you are on the hub: log in with `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, name: str, public: bool = False) -> str:
    """Create the repository if it is not there, and send it the files of an export as one commit; returns
    its address. A new repository is private unless `public`; one that is there stays as it is.

    Raises UserError for an adapter whose base model only this machine has, and if the hub cannot be reached
    or refuses.
    """
    refuse_own_base(folder)
    from huggingface_hub import HfApi

    api = HfApi(library_name="fedhl", library_version=__version__)
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Add what fedhl {__version__} exported",
        )
    except Exception as error:  # the library raises nearly everything here
        said = getattr(error, "server_message", None) or in_one_line(error)
        raise UserError(f"cannot push to {name}: {said}; the export stays in {folder}") from error
    return str(url)


def refuse_own_base(folder: Path) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    if Path(base).is_absolute():
        raise UserError(
            f"the adapter in {folder} belongs to the base model in {base}, which nobody else has: train with "
            "model.source as a hub id, or push the whole model (--merged)"
        )
