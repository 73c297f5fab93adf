"""Clients simulated by Flower on Ray: a few processes that each load the model once and serve them all."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedhl.config import Config
from fedhl.flower.client import app
from fedhl.flower.engine import serve
from fedhl.flower.roster import clients_needed
from fedhl.network.node import partition
from fedhl.report import write_report
from fedhl.run.folder import writing
from fedhl.watch import Watcher


def simulate(
    config: Config, folder: Path, watcher: Watcher, processes: int, client: ClientApp = app
) -> None:
    """Start the run in `folder`, or continue it. `processes`: the number of processes that the clients share;
    `client`: the ClientApp, by default fedhl's."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.simulation import run_simulation

    nodes = len(partition(config)[1])
    needed = clients_needed(config, nodes)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(config, folder, grid, needed, watcher)
        with writing(folder):
            write_report(folder)

    run_simulation(
        server_app,
        client,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": processes, "logging_level": "error", "log_to_driver": False},
        },
    )
