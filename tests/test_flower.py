"""Federations over Flower: the same state as in one process, whatever clients, nodes and servers do.

Every run has real client processes: actors of Ray, or what a SuperNode starts for each message.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
from safetensors.torch import load_file
from torch import Tensor

from fedhl.config import load_config
from fedhl.folder import read_metrics
from fedhl.prepare import Watcher, prepare
from fedhl.run import begin
from fedhl.server import Client, ServerState
from fedhl.simulation import Federation, InProcess, Returned

TESTS = Path(__file__).parent


class Only(InProcess):
    """All in this process, but of each round only the clients that `answered`: the others are absent."""

    def __init__(self, answered: Callable[[str, int], bool]) -> None:
        self.answered = answered

    def train(
        self,
        federation: Federation,
        state: ServerState,
        cohort: Sequence[Client],
        on_step: Callable[[], None],
    ) -> Returned:
        those = [client for client in cohort if self.answered(client.id, state.round + 1)]
        return super().train(federation, state, those, on_step)


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
        [sys.executable, TESTS / "simulate.py", f"{name}.yaml", folder, client],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=280,
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
) -> Path:
    """The same run in this process, with those clients that answered; its folder."""
    monkeypatch.chdir(project)
    folder = project / "runs" / f"{name}-alone"
    settings = load_config(tiny.write_config(project / f"{name}.yaml", config))
    begin(prepare(settings), folder, Watcher(), Only(answered))
    return folder


def state(run: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint, but for what clients keep for themselves."""
    newest = max((run / "state").glob("round-*"))
    tensors = load_file(newest / "state.safetensors")
    return {name: x for name, x in tensors.items() if not name.startswith("client")}


def same_state(one: Path, other: Path) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# --- Ray ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_broken_update_is_refused_and_the_state_is_as_without_its_sender(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny.classification(
        name="hostile",
        rounds=len(hostile.KINDS),
        participation={"fraction": 1.0},
        training={"steps": 1},
        evaluation={"client_fraction": 0.0, "every": 100},
    )
    run = simulated(project, "hostile", "hostile:mallory", config)
    lines = read_metrics(run)[1:]
    honest = [f"client-{k}" for k in range(5)]
    for line, (kind, reason) in zip(lines, hostile.KINDS, strict=True):
        assert [client["id"] for client in line["clients"]] == honest, kind
        assert [refused["id"] for refused in line["refused"]] == [hostile.MALLORY], kind
        assert reason in line["refused"][0]["reason"], (kind, line["refused"])
    other = alone(project, "hostile", config, lambda id, round: id != hostile.MALLORY, monkeypatch)
    assert same_state(run, other)


@pytest.mark.slow
def test_with_100_clients_of_which_30_percent_drop_out_each_update_counts_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny.classification(
        name="load",
        rounds=20,
        data={"source": "many.jsonl", "held_out": {"count": 60}},
        partition={"kind": "iid", "clients": 100},
        lora={"targets": ["query"], "ranks": {"shares": {1: 0.5, 2: 0.3, 4: 0.2}}},
        participation={"fraction": 1.0},
        training={"steps": 1, "batch_size": 2},
        evaluation={"client_fraction": 0.0, "every": 100},
    )
    tiny.write_rows(project / "many.jsonl", tiny.rows(460))
    run = simulated(project, "load", "hostile:dropping", config)
    everyone = sorted(f"client-{k:02d}" for k in range(100))
    for line in read_metrics(run)[1:]:
        gone = [id for id in everyone if hostile.drops(id, line["round"])]
        assert [client["id"] for client in line["clients"]] == sorted(set(everyone) - set(gone))
        assert [refused["id"] for refused in line["refused"]] == gone
        assert sum(client["weight"] for client in line["clients"]) == pytest.approx(1)
    # to the bit: none is missing, and none counts twice
    other = alone(project, "load", config, lambda *at: not hostile.drops(*at), monkeypatch)
    assert same_state(run, other)


# --- SuperLink and SuperNodes -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_federation_outlives_its_nodes_and_its_server(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One federation over TLS with node authentication that meets, in turn: an intruder without a key, one
    with the wrong certificate; a client that never answers; a server killed in mid-round and started again;
    a node that joins late, one that is killed while it trains, one that returns."""
    monkeypatch.syspath_prepend(TESTS.parent / "examples" / "deployment")
    import certificates
    from loopback import Loopback, loopback, wait_until

    config = tiny.classification(
        name="faults",
        rounds=5,
        partition={"kind": "iid", "clients": 4},
        lora={"ranks": [1, 2, 4, 6]},
        participation={"fraction": 1.0},
        training={"steps": 2},
        evaluation={"client_fraction": 0.0, "every": 100},
        federation={"clients": 3, "minimum": 3, "deadline": 40},
    )
    settings = load_config(tiny.write_config(project / "faults.yaml", config))
    run, network = tmp_path / "run", tmp_path / "network"
    for name, value in environment(tmp_path, SLOW="client-2:2,client-1:3").items():
        monkeypatch.setenv(name, value)

    def lines() -> list[dict[str, Any]]:
        return read_metrics(run)

    def arrived(round: int, *clients: str) -> bool:
        folder = run / "incoming" / f"round-{round:06d}"
        return all((folder / f"{client}.safetensors").exists() for client in clients)

    def node(federation: Loopback, k: int) -> Any:
        return federation.supernode(f"client-{k}", {"client": f"client-{k}", "data": "partition"})

    with loopback(network, project) as federation:

        def until(happened: Callable[[], bool]) -> None:
            wait_until(happened, 200, lambda: federation.log("run") + federation.log("superlink"))

        for k in range(4):
            federation.register(f"client-{k}")
        nodes = [node(federation, k) for k in range(3)]
        # neither of these two is ever let in
        certificates.make(tmp_path / "other", ["127.0.0.1"], [])
        wrong = tmp_path / "other" / "ca.crt"
        stranger = {"client": "client-3", "data": "partition"}
        federation.supernode("without-key", stranger, "--max-retries", "1")
        shutil.copy(network / "client-3", network / "deceived")
        federation.supernode("deceived", stranger, "--max-retries", "1", authority=wrong)
        server = federation.processes[0]
        command = federation.submit(settings, run, "hostile:slow")

        # round 2: client-2 never answers; the server is killed when the others have
        until(lambda: arrived(2, "client-0", "client-1"))
        before = {f.name: f.stat().st_mtime_ns for f in (run / "incoming").glob("*/*.safetensors")}
        federation.kill(server)
        command.wait(60)
        assert len(lines()) == 2  # rounds 0 and 1
        late = node(federation, 3)  # joins while nobody serves
        server = federation.superlink()
        federation.submit(settings, run, "hostile:slow")
        until(lambda: len(lines()) == 3)
        assert [c["id"] for c in lines()[2]["clients"]] == ["client-0", "client-1"]
        assert lines()[2]["refused"][0]["id"] == "client-2"
        assert "no reply within 40 seconds" in lines()[2]["refused"][0]["reason"]

        # round 3: client-1 is killed while it trains
        until(lambda: arrived(3, "client-0"))
        federation.kill(nodes[1])
        until(lambda: len(lines()) == 4)
        assert "client-1" in [refused["id"] for refused in lines()[3]["refused"]]

        # and comes back
        nodes[1] = node(federation, 1)
        until(lambda: (run / "report.html").exists())
        del late, before

    ids = [[c["id"] for c in line["clients"]] for line in lines()]
    assert "client-3" in ids[3] and "client-1" not in ids[3]
    assert len(lines()) == 6
    accepted = dict(enumerate(ids))
    other = alone(project, "faults", config, lambda id, round: id in accepted[round], monkeypatch)
    assert same_state(run, other)
