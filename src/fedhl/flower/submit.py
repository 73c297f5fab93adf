"""Hand a run to a Flower SuperLink: as an app of a few lines, which `flwr run` packs and sends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.flower.roster import clients_needed

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
    """Write the app into the folder `app`: the parts of fedhl to run, the config, and the run's folder on the
    SuperLink's machine."""
    app.mkdir(parents=True, exist_ok=True)
    text = APP.format(
        client=client, config=toml(config.model_dump_json()), folder=toml(str(folder))
    )
    (app / "pyproject.toml").write_text(text, encoding="utf-8")


def toml(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def submit(config: Config, folder: Path, superlink: str) -> None:
    """Start the run on the SuperLink of this name in Flower's config, and show its log to the end. Raises
    UserError for a config that cannot be served, and for a run that fails."""
    clients_needed(config)
    with tempfile.TemporaryDirectory() as place:
        app = Path(place) / "app"
        write_app(app, config, folder.absolute())
        run = start(app, superlink)
    follow(run, superlink)


def start(app: Path, superlink: str) -> str:
    """Hand the app to the SuperLink. Returns the id that Flower gives this run. Raises UserError."""
    told = ask("run", str(app), superlink)
    if not told.get("success"):
        reason = " ".join(told["error-message"].split())
        raise UserError(
            f"Flower could not start the run on {superlink!r}: {reason} (is {superlink!r} in "
            "$FLWR_HOME/config.toml, and is its SuperLink running?)"
        )
    return told["run-id"]


def follow(run: str, superlink: str) -> None:
    """Show the run's log until it ends. Raises UserError unless the run has completed."""
    try:
        subprocess.run([flwr(), "log", run, superlink], check=False)
    except KeyboardInterrupt:
        print(
            f"\nthe run continues in the background; flwr log {run} {superlink} shows its log, and "
            f"flwr stop {run} {superlink} ends it",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    told = ask("list", "--run-id", run, superlink)
    status = told["runs"][0]["status"] if told.get("success") else "unknown: no answer"
    if not status.startswith("finished"):
        raise UserError(
            f"the log of run {run} on {superlink!r} has broken off while the run is {status}; "
            f"flwr log {run} {superlink} shows the rest"
        )
    if status != "finished:completed":
        raise UserError(
            f"run {run} on {superlink!r} is {status}: see its log above; when the cause is removed, the same "
            "command continues the run"
        )


def ask(*arguments: str) -> dict[str, Any]:
    """The JSON output of a command of Flower's. Raises UserError if it is not JSON."""
    command = [flwr(), *arguments, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise UserError(
            f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()}"
        ) from None


def flwr() -> str:
    """The path of Flower's command, first of this Python's own. Raises UserError if there is none."""
    beside = Path(sys.executable).with_name("flwr")
    program = str(beside) if beside.exists() else shutil.which("flwr")
    if program is None:
        raise UserError(
            "flwr, Flower's command, is not installed; install it with `pip install 'fedhl[flower]'`"
        )
    return program
