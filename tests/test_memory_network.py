"""Clients that remember, over Flower's grid: both ends hold the same bits, whatever is lost on the way.

Each run is compared to the bit with the run in one process that has the same history.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from safetensors.torch import load_file
from support import tiny
from support.in_process import Answers, InProcessGrid

from fedhl.config import Config, load_config
from fedhl.federation.engine import InProcess
from fedhl.federation.prepare import prepare
from fedhl.files import sha256
from fedhl.flower.engine import serve
from fedhl.flower.records import TRAIN, pack, unpack
from fedhl.flower.roster import clients_needed
from fedhl.network.memory import Holdings
from fedhl.network.message import opened, sealed
from fedhl.record import read_metrics
from fedhl.report import write_report
from fedhl.run import resume_run
from fedhl.run.loop import start_prepared
from fedhl.shelf import Matrices
from fedhl.watch import Watcher

ROUNDS = 5
DELTA = {"name": "fedhl_ef", "download": 2, "begin": "delta"}
RANDOM = DELTA | {"begin": "random"}
NODES = {k: {"client": f"client-{k}", "data": "partition"} for k in range(3)}


def settings_of(project: Path, **changes: Any) -> Config:
    config = tiny.classification(
        name="memory",
        rounds=ROUNDS,
        method="fedhl_ef",
        data={"limit": 90, "held_out": {"count": 8}},
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query"], "ranks": [1, 2, 2]},
        training={"steps": 1},
        evaluation={"client_fraction": 0.0, "every": 100},
        participation={"fraction": 1.0},
        federation={"deadline": 1.0},
    )
    return load_config(tiny.write_config(project / "memory.yaml", tiny.merged(config, changes)))


@pytest.fixture
def settings(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.chdir(project)
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedhl.flower.mailbox.POLL", 0.01)
    return settings_of(project)


class Faults:
    """What happens to client-2: in the rounds `lost` its reply does not arrive; before the rounds `deleted`
    its folder is deleted; in the rounds of `lies` they replace fields of its reply's header."""

    def __init__(
        self,
        clients: Path,
        lost: Collection[int] = (),
        deleted: Collection[int] = (),
        lies: Mapping[int, dict[str, Any]] | None = None,
    ) -> None:
        self.clients, self.lost, self.deleted = clients, set(lost), set(deleted)
        self.lies = lies or {}
        self.grid = InProcessGrid(NODES, self.between)
        self.answer, self.grid.answer = self.grid.answer, self.before

    def before(self, message: Message) -> Answers:
        round = unpack(message.content)[0].get("round")
        if message.metadata.dst_node_id == 2 and round in self.deleted:
            self.deleted.discard(round)
            for folder in self.clients.glob("*/client-2"):
                shutil.rmtree(folder)
        return self.answer(message)

    def between(self, node: int, message: Message, reply: Message) -> Answers:
        if node != 2 or message.metadata.message_type != TRAIN:
            return [reply]
        header, _ = unpack(message.content)
        if header["round"] in self.lost:
            return []
        said, payload = unpack(reply.content)
        if header["round"] in self.lies and payload is not None:
            told = opened(payload)
            tensors = {name: told[name] for name in told.tensors}
            reply.content = pack(
                said, sealed({**told.header, **self.lies[header["round"]]}, tensors)
            )
        return [reply]


def run(config: Config, folder: Path, faults: Faults) -> list[dict[str, Any]]:
    serve(config, folder, faults.grid, clients_needed(config), Watcher())
    return read_metrics(folder)[1:]


def alone(
    config: Config, folder: Path, lost: Collection[int] = (), deleted: Collection[int] = ()
) -> None:
    """The run with the same history in this process."""
    engine = InProcess(
        lambda id, round: id != "client-2" or round not in lost,
        lambda id, round: id == "client-2" and round in deleted,
    )
    start_prepared(prepare(config), folder, Watcher(), engine)


def ledger(folder: Path) -> dict[str, Any]:
    newest = max((folder / "state").glob("round-*"))
    return json.loads((newest / "manifest.json").read_text())["ledger"]


def check(folder: Path, other: Path, clients: Path) -> None:
    """The state and the ledger of a run are those of the other, to the bit, and each client holds what the
    ledger says."""
    a, b = (
        load_file(max((f / "state").glob("round-*")) / "state.safetensors") for f in (folder, other)
    )
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    known = ledger(folder)
    assert known == ledger(other)  # with the checksums of the memories
    assert sorted(known["of"]) == ["client-0", "client-1", "client-2"]
    for client, version in known["of"].items():
        (place,) = clients.glob(f"*/{client}")
        held = Holdings(place).memory(version)
        assert isinstance(held, Matrices)
        assert held.sha256 == sha256(held.file) == known["memories"][version]


@pytest.mark.parametrize(
    ("payload", "method", "lost", "deleted"),
    [
        pytest.param("float32", RANDOM, (), (), id="no fault"),
        pytest.param("float16", DELTA, (2, 4), (), id="replies are lost"),
        pytest.param("int8", RANDOM, (2, 3, 4), (), id="away for three rounds"),
        pytest.param("bfloat16", DELTA, (), (3,), id="its folder was deleted"),
        pytest.param("int8", RANDOM, (3,), (3, 4), id="both"),
        pytest.param("float32", {"name": "flora"}, (2,), (4,), id="both, a base that grows"),
        pytest.param("int8", {"name": "flora"}, (), (3,), id="a base that grows, int8"),
    ],
)
def test_both_ends_hold_the_same_bits(
    project: Path,
    settings: Config,
    tmp_path: Path,
    payload: str,
    method: dict[str, Any],
    lost: tuple[int, ...],
    deleted: tuple[int, ...],
) -> None:
    config = settings_of(
        project,
        method=method,
        wire={"payload": "float32", "download": payload},
    )
    clients = tmp_path / "cache" / "clients"
    lines = run(config, tmp_path / "run", Faults(clients, lost, deleted))
    for line in lines:
        there = {client["id"] for client in line["clients"]}
        assert ("client-2" in there) == (line["round"] not in lost), line["refused"]
    alone(config, tmp_path / "alone", lost, deleted)
    check(tmp_path / "run", tmp_path / "alone", clients)


def test_a_client_that_lies_about_what_it_holds_is_refused(
    project: Path, settings: Config, tmp_path: Path
) -> None:
    """In three rounds, by another lie in each; after them an honest reply counts again."""
    clients = tmp_path / "cache" / "clients"
    lies = {
        2: ({"version": "0" * 64}, "holds version 000000000000, expected version"),
        3: ({"version": None}, "holds nothing, expected version"),
        5: ({"version": 7}, "header field 'version' is 7, expected text"),
    }
    faults = Faults(clients, lies={round: lie for round, (lie, _) in lies.items()})
    lines = run(settings, tmp_path / "run", faults)
    for line in lines:
        said = {refused["id"]: refused["reason"] for refused in line["refused"]}
        assert said.keys() == ({"client-2"} if line["round"] in lies else set())
        if said:
            assert lies[line["round"]][1] in said["client-2"]
    alone(settings, tmp_path / "alone", lost=lies)
    check(tmp_path / "run", tmp_path / "alone", clients)


def test_a_damaged_memory_is_a_lost_one(settings: Config, tmp_path: Path) -> None:
    """A bit of the file is flipped before round 3: the client begins again as a newcomer."""
    clients = tmp_path / "cache" / "clients"

    class Damaging(Faults):
        def before(self, message: Message) -> Answers:
            header, _ = unpack(message.content)
            if message.metadata.dst_node_id == 2 and header.get("round") == 3:
                for file in clients.glob("*/client-2/held/*.safetensors"):
                    content = bytearray(file.read_bytes())
                    content[-1] ^= 1
                    file.write_bytes(content)
            return self.answer(message)

    run(settings, tmp_path / "run", Damaging(clients))
    alone(settings, tmp_path / "alone", deleted=[3])
    check(tmp_path / "run", tmp_path / "alone", clients)


def test_a_restart_in_mid_round_comes_to_the_same_end(
    project: Path, settings: Config, tmp_path: Path
) -> None:
    """The server is killed in round 3, after client-2, whose folder was deleted, has said so and replied; and
    once more with its checkpoint of round 2 lost."""
    clients, folder = tmp_path / "cache" / "clients", tmp_path / "run"

    class Killed(BaseException):
        pass

    alone(settings, tmp_path / "alone", deleted=[3])
    dying = Faults(clients, deleted=[3])
    looks = dying.grid.get_node_ids

    def look() -> Any:
        if len(list(folder.glob("incoming/round-000003/client-2.safetensors"))):
            raise Killed
        return looks()

    dying.grid.get_node_ids = look
    with pytest.raises(Killed):
        run(settings, folder, dying)
    assert (folder / "incoming" / "round-000003" / "client-2.forgotten").exists()
    torn = shutil.copytree(folder, tmp_path / "torn")
    held = shutil.copytree(clients, tmp_path / "held")
    run(settings, folder, Faults(clients))
    check(folder, tmp_path / "alone", clients)
    assert write_report(folder).is_file()  # also of a run in which a client was forgotten
    shutil.rmtree(clients)
    shutil.copytree(held, clients)
    shutil.rmtree(torn / "state" / "round-000002")
    (tmp_path / "run").rename(tmp_path / "done")
    torn.rename(folder)
    run(settings, folder, Faults(clients))
    # round 2 is done again, and no client has what it held after round 1 any more
    engine = InProcess(forgets=lambda id, round: round == 2)
    start_prepared(prepare(settings), tmp_path / "again", Watcher(), engine)
    check(folder, tmp_path / "again", clients)


def test_a_run_begun_in_one_process_goes_on_over_the_network(
    settings: Config, tmp_path: Path
) -> None:
    """Its clients hold nothing yet, and begin again; and a run over the network goes on in one process."""

    class Stop(BaseException):
        pass

    def listen(line: str) -> None:
        if line.startswith("round  2") or line.startswith("round 2"):
            raise Stop

    clients = tmp_path / "cache" / "clients"
    with pytest.raises(Stop):
        start_prepared(prepare(settings), tmp_path / "run", Watcher(say=listen))
    lines = run(settings, tmp_path / "run", Faults(clients))
    assert [len(line["clients"]) for line in lines] == [3] * ROUNDS
    with pytest.raises(Stop):
        serve(settings, tmp_path / "other", Faults(clients).grid, 3, Watcher(say=listen))
    resume_run(str(tmp_path / "other"))
    alone(settings, tmp_path / "alone")
    a, b = (
        load_file(max((f / "state").glob("round-*")) / "state.safetensors")
        for f in (tmp_path / "other", tmp_path / "alone")
    )
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
