"""Hand a run to a Flower SuperLink: as an app of a few lines, which `flwr run` packs and sends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.flower.server import wanted

APP = """\
[project]
name = "fedhl-run"
version = "1.0.0"
description = "A run of fedhl"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedhl"

[tool.flwr.app.components]
serverapp = "fedhl.flower.server:app"
clientapp = "{client}"

[tool.flwr.app.config]
config = {config}
folder = {folder}
"""


def write_app(
    app: Path, config: Config, folder: Path, client: str = "fedhl.flower.client:app"
) -> None:
    """The app, in the folder `app`: which parts of fedhl to run, the config, and the run's folder on
    the SuperLink's machine."""
    app.mkdir(parents=True, exist_ok=True)
    text = APP.format(
        client=client, config=toml(config.model_dump_json()), folder=toml(str(folder))
    )
    (app / "pyproject.toml").write_text(text, encoding="utf-8")


def toml(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def submit(config: Config, folder: Path, superlink: str) -> None:
    """Start the run on the SuperLink that Flower's config names so, and show its log to its end. Raises
    UserError for a config that cannot be served."""
    wanted(config)
    flwr = Path(sys.executable).with_name("flwr")
    program = str(flwr) if flwr.exists() else shutil.which("flwr")
    if program is None:
        raise UserError("flwr, Flower's command, is not here: pip install 'fedhl[flower]'")
    with tempfile.TemporaryDirectory() as place:
        app = Path(place) / "app"
        write_app(app, config, folder.absolute())
        done = subprocess.run([program, "run", str(app), superlink, "--stream"], check=False)
    if done.returncode:
        raise UserError(
            f"Flower could not start the run on {superlink!r} (exit code {done.returncode}); is it in "
            "$FLWR_HOME/config.toml, and is its SuperLink up?"
        )
