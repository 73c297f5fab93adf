"""Flower's ServerApp: reads the config and the folder of a run from the run config, and serves the run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedhl.config import Config
from fedhl.flower.engine import serve
from fedhl.flower.roster import clients_needed
from fedhl.report import write_report
from fedhl.run.folder import writing
from fedhl.watch import Watcher

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the run that the run config describes, or continue it."""
    config = Config.model_validate_json(str(context.run_config["config"]))
    folder = Path(str(context.run_config["folder"]))
    watcher = Watcher(say=partial(print, flush=True))
    serve(config, folder, grid, clients_needed(config), watcher)
    with writing(folder):
        write_report(folder)
