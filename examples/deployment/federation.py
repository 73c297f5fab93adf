"""Train the same config in this process and over the network, on this machine, and compare.

    python federation.py CONFIG --out DIR

starts a SuperLink behind its gate and a SuperNode for each client, with TLS and node authentication, lets a
node without a key try to join and an outsider try to start a run, and writes DIR/federation.json: what was
on, what was refused, the largest difference of the two server states, seconds and bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

from loopback import Loopback, loopback, wait_until
from meter import Meter
from safetensors.torch import load_file

from fedhl.config import Config, load_config
from fedhl.network.node import partition
from fedhl.record import read_metrics
from fedhl.run import start_run
from fedhl.watch import Watcher


def state(run: Path) -> dict[str, Any]:
    """The tensors of the newest checkpoint, but for what clients keep for themselves."""
    newest = max((run / "state").glob("round-*"))
    return {
        name: tensor
        for name, tensor in load_file(newest / "state.safetensors").items()
        if not name.startswith("client")
    }


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' server states in any number; infinite if they cannot be
    compared."""
    a, b = state(one), state(other)
    kinds = [{name: (x.dtype, x.shape) for name, x in those.items()} for those in (a, b)]
    if kinds[0] != kinds[1] or any(x.isnan().any() for x in (*a.values(), *b.values())):
        return math.inf
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def moved(run: Path) -> dict[str, int]:
    """Bytes down and up of all rounds, by the run's own account."""
    lines = read_metrics(run)
    return {way: sum(line["bytes"][way] for line in lines) for way in ("down", "up")}


def intruder(federation: Loopback) -> bool:
    """Whether a node without a key was refused."""
    settings = {"client": "intruder", "data": "partition"}
    process = federation.supernode("intruder", settings, "--max-retries", "1")
    wait_until(lambda: process.poll() is not None, 60, lambda: federation.log("intruder"))
    return process.returncode != 0


def outsider(federation: Loopback, config: Config) -> bool:
    """Whether somebody with `ca.crt` who tries to start a run where the nodes connect was refused."""
    before = federation.flwr("list", "loopback", "--format", "json")
    federation.trespass(config)
    after = federation.flwr("list", "loopback", "--format", "json")
    return [run["run-id"] for run in json.loads(before)["runs"]] == [
        run["run-id"] for run in json.loads(after)["runs"]
    ]


def over_network(config: Config, folder: Path, secure: bool) -> dict[str, Any]:
    """The run over the network; what is to be told of it."""
    clients = sorted(partition(config)[1])
    began = perf_counter()
    with loopback(folder / "network", Path.cwd(), secure) as federation:
        meter = Meter(("127.0.0.1", federation.nodes_port))
        federation.nodes_port = meter.port
        for client in clients:
            if secure:
                federation.register(client)
            federation.supernode(client, {"client": client, "data": "partition"})
        up = perf_counter()
        run = federation.submit(config, folder / "over-network")
        wait_until(lambda: run.poll() is not None, 3600, lambda: federation.log("run"))
        done = perf_counter()
        finished = json.loads((folder / "over-network" / "summary.json").read_text())["status"]
        assert finished == "finished", federation.log("run")
        refused = intruder(federation) if secure else None
        kept_out = outsider(federation, config) if secure else None
        meter.close()
    return {
        "clients": len(clients),
        "rounds": config.rounds,
        "tls": secure,
        "node_authentication": secure,
        "intruder_refused": refused,
        "outsider_refused": kept_out,
        "seconds": {"start": up - began, "run": done - up},
        "bytes": {
            "metrics": moved(folder / "over-network"),
            "sockets": {"down": meter.down, "up": meter.up},
        },
    }


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder, which is made anew")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--insecure", action="store_true", help="without TLS and keys, to compare")
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    os.environ.setdefault("FEDHL_CACHE", str(given.out.absolute() / "cache"))
    say = Watcher(say=lambda line: print(line, flush=True))
    began = perf_counter()
    start_run(config, given.out / "in-process", say)
    alone = perf_counter() - began
    print("the same over the network ...", flush=True)
    told = over_network(config, given.out, not given.insecure)
    told["seconds"]["in_process"] = alone
    told["largest_state_difference"] = difference(
        given.out / "in-process", given.out / "over-network"
    )
    (given.out / "federation.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
