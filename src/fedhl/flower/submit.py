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
    UserError for a config that cannot be served, and if the run does not end well."""
    clients_needed(config)
    with tempfile.TemporaryDirectory() as place:
        app = Path(place) / "app"
        write_app(app, config, folder.absolute())
        run = start(app, superlink)
    follow(run, superlink)


def start(app: Path, superlink: str) -> str:
    """Hand the app over; the id that Flower gives this run. Raises UserError."""
    told = ask("run", str(app), superlink)
    if not told.get("success"):
        reason = " ".join(told["error-message"].split())
        raise UserError(
            f"Flower could not start the run on {superlink!r}: {reason} (is it in "
            "$FLWR_HOME/config.toml, and is its SuperLink up?)"
        )
    return told["run-id"]


def follow(run: str, superlink: str) -> None:
    """Show the run's log until it ends. Raises UserError unless the run has done all that it should."""
    try:
        subprocess.run([flwr(), "log", run, superlink], check=False)
    except KeyboardInterrupt:
        print(
            f"\nthe run goes on without you; flwr log {run} {superlink} shows how, and "
            f"flwr stop {run} {superlink} ends it",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    told = ask("list", "--run-id", run, superlink)
    status = told["runs"][0]["status"] if told.get("success") else "unknown: no answer"
    if not status.startswith("finished"):
        raise UserError(
            f"the log of run {run} on {superlink!r} has broken off, and the run is {status}; "
            f"flwr log {run} {superlink} shows how it goes on"
        )
    if status != "finished:completed":
        raise UserError(
            f"run {run} on {superlink!r} is {status}; its log is above. Once the reason is gone, the same "
            "command goes on with it"
        )


def ask(*arguments: str) -> dict[str, Any]:
    """What a command of Flower's answers. Raises UserError if that is nothing that can be read."""
    command = [flwr(), *arguments, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise UserError(f"flwr {arguments[0]} has failed: {done.stderr or done.stdout}") from None


def flwr() -> str:
    """Flower's command, of this Python before any other. Raises UserError without one."""
    beside = Path(sys.executable).with_name("flwr")
    program = str(beside) if beside.exists() else shutil.which("flwr")
    if program is None:
        raise UserError("flwr, Flower's command, is not here: pip install 'fedhl[flower]'")
    return program
