"""Federations over Flower: the same state as in one process, whatever clients, nodes and servers do.

Every run has real client processes: actors of Ray, or what a SuperNode starts for each message.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from certificates import make as make_certificates
from federation import difference
from loopback import Loopback, loopback, wait_until
from support import hostile, tiny

from fedhl.config import load_config
from fedhl.federation.engine import InProcess
from fedhl.federation.prepare import prepare
from fedhl.network.memory import Holdings
from fedhl.record import read_metrics, read_summary
from fedhl.run.loop import start_prepared
from fedhl.shelf import Matrices
from fedhl.watch import Watcher

TESTS = Path(__file__).parent


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "FEDHL_CACHE": str(folder / "cache"),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **more,
    }


def simulated(project: Path, name: str, client: str, config: dict[str, Any]) -> Path:
    """A run on Ray, with clients in processes of their own; its folder."""
    tiny.write_config(project / f"{name}.yaml", config)
    folder = project / "runs" / name
    done = subprocess.run(
        [sys.executable, "-m", "support.simulate", f"{name}.yaml", folder, client],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def alone(
    project: Path,
    name: str,
    config: dict[str, Any],
    answered: Callable[[str, int], bool],
    monkeypatch: pytest.MonkeyPatch,
    forgets: Callable[[str, int], bool] = lambda id, round: False,
) -> Path:
    """The same run in this process, with those clients that answered, and that had lost what they held; its
    folder."""
    monkeypatch.chdir(project)
    folder = project / "runs" / f"{name}-alone"
    settings = load_config(tiny.write_config(project / f"{name}.yaml", config))
    start_prepared(prepare(settings), folder, Watcher(), InProcess(answered, forgets))
    return folder


# --- Ray ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_100_clients_30_percent_drop_out_and_17_are_hostile_and_each_good_update_counts_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny.classification(
        name="load",
        rounds=2,
        data={"source": "many.jsonl", "held_out": {"count": 60}},
        partition={"kind": "iid", "clients": 100},
        lora={"targets": ["query"], "ranks": {"shares": {1: 0.5, 2: 0.3, 4: 0.2}}},
        participation={"fraction": 1.0},
        training={"steps": 1, "batch_size": 2},
        evaluation={"client_fraction": 0.0, "every": 100},
    )
    tiny.write_rows(project / "many.jsonl", tiny.rows(460))
    run = simulated(project, "load", "support.hostile:unreliable", config)
    everyone = sorted(f"client-{k:02d}" for k in range(100))
    ranks = {client["id"]: client["rank"] for client in read_summary(run)["clients"]}
    for line in read_metrics(run)[1:]:
        gone = [id for id in everyone if hostile.drops(id, line["round"])]
        wrong = {*gone, *hostile.MALLORIES}
        assert [client["id"] for client in line["clients"]] == sorted(set(everyone) - wrong)
        assert sorted(record["id"] for record in line["refused"]) == sorted(wrong)
        why = refused(line)
        for id, (kind, reason) in hostile.MALLORIES.items():
            assert reason.format(id=id, rank=ranks[id]) in why[id], (kind, why[id])
        assert sum(client["weight"] for client in line["clients"]) == pytest.approx(1)

    def answered(id: str, round: int) -> bool:
        return id not in hostile.MALLORIES and not hostile.drops(id, round)

    # to the bit: none is missing, none counts twice, and of what was refused nothing stays
    assert difference(run, alone(project, "load", config, answered, monkeypatch)) == 0


# --- SuperLink and SuperNodes -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_federation_outlives_its_nodes_and_its_server(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One federation over TLS with node authentication that meets, in turn: an intruder without a key, one
    who trusts a wrong certificate, an outsider with `ca.crt` who tries to start a run; a client that never
    answers, and returns; one that joins late; a server that is killed in mid-round and started again; a node
    that is killed while it trains, and returns; and meanwhile a client whose folder is deleted. At the end
    the server and each client hold the same bits."""
    config = tiny.classification(
        name="faults",
        rounds=5,
        partition={"kind": "iid", "clients": 3},
        lora={"ranks": [1, 4, 6]},
        participation={"fraction": 1.0},
        training={"steps": 2},
        evaluation={"client_fraction": 0.0, "every": 100},
        federation={"clients": 2, "minimum": 3, "deadline": 60},
    )
    settings = load_config(tiny.write_config(project / "faults.yaml", config))
    run, network = tmp_path / "run", tmp_path / "network"
    waits = "client-1:1,client-2:2,client-2:3"
    for name, value in environment(tmp_path, SLOW=waits, GO=str(tmp_path)).items():
        monkeypatch.setenv(name, value)

    def lines() -> list[dict[str, Any]]:
        return read_metrics(run)

    def arrived(round: int) -> set[str]:
        folder = run / "incoming" / f"round-{round:06d}"
        return {file.stem for file in folder.glob("*.safetensors")}

    with loopback(network, project) as federation:

        def node(k: int) -> subprocess.Popen[bytes]:
            settings = {"client": f"client-{k}", "data": "partition"}
            return federation.supernode(f"client-{k}", settings)

        def back(k: int) -> bool:
            """As a service manager does: start a node again that has ended, after 15 seconds. Flower ends
            one whose key is in use, and the killed one's is until its heartbeat is missed."""
            if nodes[k].poll() is not None and monotonic() > ended[-1] + 15:
                nodes[k] = node(k)
                ended.append(monotonic())
            return False

        def until(happened: Callable[[], bool]) -> None:
            wait_until(happened, 900, lambda: federation.log("run") + federation.log("superlink"))

        for k in range(3):
            federation.register(f"client-{k}")
        nodes = [node(0), node(1)]
        stranger = {"client": "client-2", "data": "partition"}
        make_certificates(tmp_path / "other", ["127.0.0.1"], [])
        shutil.copy(network / "client-2", network / "deceived")
        intruders = [
            federation.supernode("without-key", stranger, "--max-retries", "1"),
            federation.supernode(
                *("deceived", stranger, "--max-retries", "1"),
                authority=tmp_path / "other" / "ca.crt",
            ),
        ]
        command = federation.submit(settings, run, "support.hostile:slow")
        until(lambda: len(lines()) == 1)
        before = started(federation)
        assert "403" in federation.trespass(settings)
        assert started(federation) == before != []

        # round 1: client-1 never answers
        until(lambda: len(lines()) == 2)
        assert accepted(lines()[1]) == {"client-0"}
        assert "no reply within 60 seconds" in refused(lines()[1])["client-1"]
        assert all(intruder.poll() for intruder in intruders)  # both have given up

        # it is started again, another joins; in round 2 the server is killed, while client-2 trains
        federation.leave(nodes[1])
        nodes[1:] = [node(1), node(2)]
        until(lambda: "client-0" in arrived(2))
        federation.kill(federation.processes[0])
        command.wait(600)
        assert len(lines()) == 2
        had = {file: file.stat().st_mtime_ns for file in (run / "incoming").glob("*/*.safetensors")}
        (tmp_path / "client-2:2").touch()
        federation.superlink()
        federation.submit(settings, run, "support.hostile:slow")
        until(lambda: len(arrived(2)) == 3 or len(lines()) == 3)
        assert all(not file.exists() or file.stat().st_mtime_ns == t for file, t in had.items())
        until(lambda: len(lines()) == 3)
        assert accepted(lines()[2]) == {"client-0", "client-1", "client-2"}

        # round 3: client-2 is killed while it trains; while the round waits for it, client-0, which has
        # answered, loses what it held
        until(lambda: {"client-0", "client-1"} <= arrived(3))
        federation.kill(nodes[2])
        ended = [monotonic()]
        shutil.rmtree(next((tmp_path / "cache" / "clients").glob("*/client-0")))
        until(lambda: len(lines()) == 4)
        assert accepted(lines()[3]) == {"client-0", "client-1"}
        assert set(refused(lines()[3])) == {"client-2"}

        # Flower misses the heartbeat of client-2 after a minute. If that is later than the deadline of
        # round 3, round 4 does without client-2 as well. The last round waits for it.
        until(lambda: (run / "report.html").exists() or back(2))

    assert accepted(lines()[5]) == {"client-0", "client-1", "client-2"}
    for line in lines()[1:]:
        assert sum(client["weight"] for client in line["clients"]) == pytest.approx(1)
    there = [accepted(line) for line in lines()]
    forgotten = [
        {c["id"] for c in (*line["clients"], *line["refused"]) if c.get("forgotten")}
        for line in lines()
    ]
    assert [*filter(None, forgotten)] == [{"client-0"}] and not any(forgotten[:4])
    # on a slow machine its second answer is late: then it is a newcomer in the next round
    fresh = next(k for k, ids in enumerate(there) if any(forgotten[: k + 1]) and "client-0" in ids)
    other = alone(
        *(project, "faults", config, lambda id, round: id in there[round], monkeypatch),
        forgets=lambda id, round: (id, round) == ("client-0", fresh),
    )
    assert difference(run, other) == 0
    ledgers = [
        json.loads((max((x / "state").glob("round-*")) / "manifest.json").read_text())["ledger"]
        for x in (run, other)
    ]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]["of"]) == 3
    for client, version in ledgers[0]["of"].items():
        (place,) = (tmp_path / "cache" / "clients").glob(f"*/{client}")
        held = Holdings(place).memory(version)
        assert isinstance(held, Matrices) and held.sha256 == ledgers[0]["memories"][version]


def started(federation: Loopback) -> list[str]:
    """The ids of all runs that the SuperLink knows."""
    told = json.loads(federation.flwr("list", "loopback", "--format", "json"))
    return sorted(run["run-id"] for run in told["runs"])


def accepted(line: dict[str, Any]) -> set[str]:
    return {client["id"] for client in line["clients"]}


def refused(line: dict[str, Any]) -> dict[str, str]:
    return {record["id"]: record["reason"] for record in line["refused"]}
