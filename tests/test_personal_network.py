"""Personal models over a network: each stays with its client, and is the one of a run in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from safetensors.torch import load_file
from support import tiny
from support.in_process import Answers, InProcessGrid
from support.tiny import fedhl

from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.files import file_name
from fedhl.flower.engine import record_of, run_id, serve
from fedhl.flower.records import PERSONAL, pack, unpack
from fedhl.network.message import Malformed
from fedhl.record import read_scores, read_summary
from fedhl.run import start_run
from fedhl.run.delivery import export_run
from fedhl.watch import SILENT, Watcher

CLIENTS = [f"client-{k}" for k in range(3)]
NODES: dict[int, dict[str, Any]] = {
    k: {"client": client, "data": "partition"} for k, client in enumerate(CLIENTS)
}


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedhl.flower.mailbox.POLL", 0.01)
    return project


def settings_of(project: Path, **changes: Any) -> Config:
    config = tiny.classification(
        rounds=2,
        data={"limit": 90, "held_out": {"count": 8}},
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query"], "ranks": [1, 2, 4]},
        training={"steps": 1},
        evaluation={"client_fraction": 0.2, "every": 100},
        participation={"fraction": 1.0},
        federation={"deadline": 2},
        personal={"steps": 3, "learning_rate": 0.03},
    )
    name = f"{changes.get('method', 'default')}.yaml"
    return load_config(
        tiny.write_config(project / f"personal-{name}", tiny.merged(config, changes))
    )


def machine_of(folder: Path, client: str, cache: Path) -> Path:
    """Where a client of this run has its personal model."""
    return cache / "clients" / file_name(run_id(folder)) / file_name(client) / "personal"


@pytest.mark.parametrize(
    "changes",
    [
        {},  # a client holds something in its base
        {"method": "fedsa_lora", "weighting": "examples", "lora": {"ranks": 2}},  # it keeps factors
        {"method": "fedhl"},
    ],
    ids=lambda changes: changes.get("method", "fedhl_ef"),
)
def test_it_is_the_one_of_a_run_in_one_process_and_stays_with_its_client(
    place: Path, tmp_path: Path, changes: dict[str, Any]
):
    settings, here, there = settings_of(place, **changes), tmp_path / "here", tmp_path / "there"
    start_run(settings, here)
    said: list[str] = []
    serve(settings, there, InProcessGrid(NODES), 3, Watcher(say=said.append))
    one, other = read_scores(here), read_scores(there)
    assert one is not None and other is not None
    assert other["clients"] == one["clients"] and [*one["clients"]] == CLIENTS
    assert read_summary(there)["personal"]["mean"] == one["mean"]
    assert any(line.startswith("personal models: mean accuracy") for line in said)
    assert [path.name for path in (there / "personal").iterdir()] == ["scores.json"]
    for client, rank in (("client-0", 3), ("client-2", None)):
        export_run(here, tmp_path / f"{client}-here", rank, "last", client=client)
        own = machine_of(there, client, tmp_path / "cache")
        assert own.stat().st_mode & 0o077 == 0
        export_run(own, tmp_path / f"{client}-there", rank, "last")
        name = "model" if rank is None else "adapter_model"
        pair = [
            load_file(tmp_path / f"{client}-{end}" / f"{name}.safetensors")
            for end in ("here", "there")
        ]
        assert pair[0].keys() == pair[1].keys()
        assert all(pair[0][key].equal(pair[1][key]) for key in pair[0])
        card = (tmp_path / f"{client}-there/README.md").read_text()
        assert "fine-tuned by 3 clients" in card and f"then by the client {client} alone" in card


def test_what_is_not_at_the_server_is_not_exported_there(place: Path, tmp_path: Path):
    folder = tmp_path / "run"
    serve(settings_of(place), folder, InProcessGrid(NODES), 3, SILENT)
    with pytest.raises(UserError, match="on the client's own machine, whose log names the folder"):
        export_run(folder, tmp_path / "out", None, "last", client="client-1")
    own = machine_of(folder, "client-1", tmp_path / "cache")
    done = fedhl(place, "export", own, "--client", "client-0", "--merged", "--out", "nothing")
    assert done.code == 2 and "unknown client 'client-0'" in " ".join(done.err.split())
    for command in ("eval", "resume"):
        done = fedhl(place, command, own)
        assert done.code == 2 and "`fedhl export` reads it" in " ".join(done.err.split())
    (own / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="restore the file"):
        export_run(own, tmp_path / "out", None, "last")


def test_who_does_not_answer_has_none_and_the_others_count(place: Path, tmp_path: Path):
    def between(node: int, message: Message, reply: Message) -> Answers:
        if message.metadata.message_type != PERSONAL:
            return [reply]
        if node == 0:
            return [Message(pack({"record": {"steps": 3}}), reply_to=message)]
        if node == 1:  # its training has diverged
            record = unpack(reply.content)[0]["record"]
            record["personal"]["loss"] = record["loss"] = math.nan
            return [Message(pack({"record": record}), reply_to=message)]
        return [reply]

    folder, said = tmp_path / "run", []
    watcher = Watcher(say=said.append)
    serve(settings_of(place), folder, InProcessGrid(NODES, between), 3, watcher)
    (warning,) = (line for line in said if "has no personal model" in line)
    assert "client 'client-0' has no personal model: its record is" in warning
    summary = read_summary(folder)["personal"]
    assert [*summary["clients"]] == CLIENTS[1:]
    assert summary["clients"]["client-1"]["personal"]["loss"] is None


def test_if_nobody_answers_the_rounds_are_kept_and_the_same_command_goes_on(
    place: Path, tmp_path: Path
):
    silent = True

    def between(node: int, message: Message, reply: Message) -> Answers:
        return [] if silent and message.metadata.message_type == PERSONAL else [reply]

    folder, settings = tmp_path / "run", settings_of(place, federation={"deadline": 0.5})
    with pytest.raises(UserError, match="no client has made its personal model"):
        serve(settings, folder, InProcessGrid(NODES, between), 3, SILENT)
    assert read_summary(folder)["personal"] is None and not (folder / "personal").exists()
    silent, grid = False, InProcessGrid(NODES, between)
    serve(settings, folder, grid, 3, SILENT)
    asked = [kind for _, kind in grid.asked]
    assert asked.count(PERSONAL) == 3 and "train" not in asked
    assert len(read_summary(folder)["personal"]["clients"]) == 3


GOOD = {"loss": 0.1, "examples": 3, "accuracy": 0.5}
RECORD = {"steps": 3, "loss": 0.2, "global": GOOD, "personal": GOOD}


@pytest.mark.parametrize(
    "record",
    [
        *(None, 3, [], {}, RECORD | {"more": 1}),
        *(RECORD | {"steps": x} for x in (0, -1, 1.0, True, "3", 2**60)),
        *(RECORD | {"loss": x} for x in (None, "0", True, 10**400, -1e300)),
        *(RECORD | {"global": GOOD | {"loss": x}} for x in (math.nan, None)),
        *(
            RECORD | {"personal": GOOD | x}
            for x in ({"loss": "0"}, {"accuracy": 2.0}, {"examples": math.inf})
        ),
        RECORD | {"personal": {"loss": 0.1}},
    ],
)
def test_a_wrong_record_is_malformed(place: Path, record: Any):
    diverged = {"loss": math.inf, "personal": GOOD | {"loss": math.nan}}
    for good in (RECORD, RECORD | diverged):
        assert record_of(good, settings_of(place)) == good
    with pytest.raises(
        Malformed, match=r"its (record|steps|training loss|metrics|loss|accuracy|examples)"
    ):
        record_of(record, settings_of(place))
