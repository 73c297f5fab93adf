"""A client on its own machine against the same client in the server's process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from torch import Tensor

from fedhl import server
from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.federation import at_current_rank
from fedhl.federation.local import evaluate_client, train_client
from fedhl.federation.prepare import Prepared, prepare, prepare_server
from fedhl.method import Broadcast, flatten, remembers
from fedhl.model.processors import processor_hash
from fedhl.network import participant, wire
from fedhl.network.memory import Holdings, Kept
from fedhl.network.message import Malformed
from fedhl.network.node import SHARED, Node, introduce, node_of, rank_of
from fedhl.server import Client, Reply, ServerState
from fedhl.server.ledger import next_version
from fedhl.task.labels import sorted_labels
from fedhl.watch import SILENT


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shared(project: Path) -> Config:
    """Three clients whose rows are parts of the config's data."""
    return config_of(project)


def config_of(project: Path, **changes: Any) -> Config:
    config = tiny.classification(
        name="node",
        rounds=2,
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query"], "ranks": [1, 2, 4]},
        training={"steps": 2},
        participation={"fraction": 1.0},
    )
    path = tiny.write_config(project / "node.yaml", tiny.merged(config, changes))
    return load_config(path)


# --- what the owner says ------------------------------------------------------------------------


def test_a_node_is_what_its_owner_says(shared: Config, tmp_path: Path):
    assert node_of({"client": "a", "data": "rows.jsonl"}, shared) == Node("a", "rows.jsonl")
    told = {"client": "a", "data": "x", "model": "bert", "rank": 3, "state": str(tmp_path)}
    assert node_of(told | {"partition-id": 1, "num-partitions": 3}, shared) == Node(
        "a", "x", "bert", 3, tmp_path
    )


def test_a_simulated_node_is_a_client_by_its_number(shared: Config):
    for k in range(3):
        numbered = {"partition-id": k, "num-partitions": 3}
        assert node_of(numbered, shared) == Node(f"client-{k}", SHARED)
    with pytest.raises(
        UserError, match=r"partition-id 3 is too large: the config has 3 clients, numbered from 0"
    ):
        node_of({"partition-id": 3, "num-partitions": 4}, shared)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "client must be text, got None; start the node with, e.g., --node-config"),
        (
            {"client": "a"},
            r"data must be text, got None.*'partition' stands for its part of the config",
        ),
        ({"client": "", "data": "x"}, "client must be text, got ''"),
        ({"client": 3, "data": "x"}, "client must be text, got 3"),
        ({"client": "a", "data": True}, "data must be text, got True"),
        ({"client": "a", "dta": "x"}, "unknown key 'dta'; did you mean 'data'"),
        (
            {"client": "a", "data": "x", "rank": 0},
            "rank must be a whole number of at least 1, got 0",
        ),
        ({"client": "a", "data": "x", "rank": True}, "rank must be .* got True"),
        ({"client": "a", "data": "x", "rank": "4"}, "rank must be .* got '4'"),
        ({"client": "a", "data": "x", "rank": 4.0}, "rank must be .* got 4.0"),
        ({"client": "a", "data": "x", "model": 5}, "model must be text, got 5"),
        ({"client": "a", "data": "x", "model": ""}, "model must be text, got ''"),
        ({"client": "a", "data": "x", "state": 5}, "state must be text, got 5"),
        ({"client": "a", "data": "x", "fields": 5}, "fields must be text, got 5"),
        (
            {"client": "a", "data": SHARED, "fields": "text"},
            "fields goes with a file of the client's own rows",
        ),
    ],
)
def test_a_mistake_in_a_node_config_is_named(shared: Config, settings: Any, reason: str):
    with pytest.raises(UserError, match=f"node config: {reason}"):
        node_of(settings, shared)


def test_what_a_node_keeps_is_in_its_state_or_in_the_cache(tmp_path: Path):
    assert Node("a", "x").folder == tmp_path / "cache" / "clients"
    assert Node("a", "x", state=Path("~/mine")).folder == Path.home() / "mine"


# --- introductions ------------------------------------------------------------------------------


def test_a_shared_client_has_the_rank_and_rows_of_the_config(shared: Config):
    clients = prepare(shared).federation.clients
    for client in clients:
        said = introduce(shared, Node(client.id, SHARED))
        assert said["client"] == client.id
        assert (said["rank"], said["examples"]) == (client.rank, client.examples)
        assert (said["own"], said["labels"]) == (False, ["animal", "plant"])
        assert json.loads(json.dumps(said)) == said


def test_a_shared_client_must_be_one_of_the_config(shared: Config):
    with pytest.raises(UserError, match="unknown client 'client-9'; did you mean 'client-"):
        introduce(shared, Node("client-9", SHARED))
    with pytest.raises(
        UserError, match=r"rank of client 'client-1': expected 2, as in the config, got 4"
    ):
        introduce(shared, Node("client-1", SHARED, rank=4))
    assert introduce(shared, Node("client-1", SHARED, rank=2))["rank"] == 2


def test_an_introduction_needs_no_peft(shared: Config):
    """Which takes as long to import as everything else that an introduction needs."""
    code = (
        "import sys, fedhl.flower.client\n"
        "from fedhl.config import load_config\n"
        "from fedhl.network.node import Node, introduce\n"
        "introduce(load_config('node.yaml'), Node('client-1', 'partition'))\n"
        "assert 'peft' not in sys.modules and 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_client_with_its_own_rows_tells_how_many_and_their_labels(
    project: Path, shared: Config, tmp_path: Path
):
    made = [row for row in tiny.rows(60) if row["label"] == "plant"][:20]
    file = tiny.write_rows(tmp_path / "own.jsonl", made)
    said = introduce(shared, Node("a", str(file), rank=3))
    assert (said["rank"], said["own"], said["labels"]) == (3, True, ["plant"])
    assert said["examples"] == 16  # of 20, a fifth is held back
    whole = config_of(project, evaluation={"client_fraction": 0.0})
    assert introduce(whole, Node("a", str(file), rank=3))["examples"] == 20


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (4, 4),
        ({"clients": {"a": 2, "others": 8}, "default": 1}, 2),
        ({"clients": {"others": 8}, "default": 1}, 1),
    ],
)
def test_the_rank_of_a_client_of_its_own_may_be_in_the_config(
    project: Path, ranks: Any, expected: int
):
    assert rank_of(config_of(project, lora={"ranks": ranks}), "a") == expected


@pytest.mark.parametrize("ranks", [[1, 2, 4], {"shares": {4: 0.5, 8: 0.5}}])
def test_a_rule_for_all_clients_gives_no_rank_to_one(project: Path, ranks: Any):
    with pytest.raises(UserError, match=r"rule for all clients together.*--node-config 'rank=8'"):
        rank_of(config_of(project, lora={"ranks": ranks}), "a")


def test_what_is_wrong_with_its_own_rows_is_in_the_nodes_log_and_not_told(
    shared: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def refused(node: Node, config: Config = shared) -> str:
        caplog.clear()
        with pytest.raises(UserError) as caught:
            introduce(config, node)
        assert str(caught.value) == "its rows do not fit the config; the client's own log says why"
        return caplog.text

    assert "nowhere.jsonl" in refused(Node("a", "nowhere.jsonl", rank=1))
    file = str(tiny.write_rows(tmp_path / "odd.jsonl", [{"text": 5, "label": "plant"}] * 9))
    assert "odd.jsonl: row 0 (counted from 0, line 1): field 'text' is int 5" in refused(
        Node("a", file, rank=1)
    )
    # a config could otherwise ask for any field, and have its values in a message
    nosy = shared.model_copy(
        update={"data": shared.data.model_copy(update={"where": {"label": 1}})}
    )
    assert "plant" in refused(Node("a", file, rank=1), nosy)


def test_a_config_can_use_only_the_fields_that_the_owner_names(
    shared: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [row | {"name": f"patient {k % 2}"} for k, row in enumerate(tiny.rows(30))]
    file = str(tiny.write_rows(tmp_path / "own.jsonl", rows))
    told = {"client": "a", "data": file, "rank": 1, "fields": "text, label"}
    node = node_of(told, shared)
    assert node.fields == ("text", "label")
    assert introduce(shared, node) == introduce(shared, Node("a", file, rank=1))
    nosy = shared.model_copy(update={"task": shared.task.model_copy(update={"label": "name"})})
    assert introduce(nosy, Node("a", file, rank=1))["labels"] == ["patient 0", "patient 1"]
    with pytest.raises(UserError, match="the client's own log says why"):
        introduce(nosy, node)
    assert "name" in caplog.text and "patient" not in caplog.text


# --- training -----------------------------------------------------------------------------------


@dataclass
class Post:
    """Between a server and its nodes: everything travels as bytes."""

    config: Config
    prepared: Prepared
    nodes: Mapping[str, Node]
    together: bool = False

    @property
    def run(self) -> wire.Run:
        loaded = self.prepared.loaded
        return wire.Run("run", loaded.hash, processor_hash(loaded.processor))

    def sent(self, state: ServerState, client: Client) -> dict[str, Broadcast]:
        return server.broadcast(self.prepared.federation.method, state, client, self.config.seed)

    def letter(self, state: ServerState, client: Client, round: int) -> Any:
        header = {"labels": self.prepared.data.labels, "run": "run", "round": round}
        method, version = self.prepared.federation.method, state.ledger.version(client.id)
        sent = server.travelling(method, state, client, self.config.seed)
        payload = wire.encode_broadcast({}, sent, state.head, client.downloaded, version)
        return (
            self.config,
            self.nodes[client.id],
            header | {"rank": client.rank},
            payload,
            self.together,
        )

    def train(self, state: ServerState, client: Client) -> tuple[Reply, int]:
        header, payload = participant.train(*self.letter(state, client, state.round + 1))
        sent = self.sent(state, client)
        assert payload is not None
        reply = wire.read_reply(payload, self.run, client, sent, sent.__getitem__, state.head)
        return reply, header["next_rank"]

    def evaluate(self, state: ServerState, client: Client) -> Any:
        return participant.evaluate(*self.letter(state, client, state.round))


def same_reply(one: Reply, other: Reply) -> bool:
    def tensors(reply: Reply) -> dict[str, Tensor]:
        factors = {
            f"{name}.{f}": getattr(lora, f) for name, lora in reply.adapter.items() for f in "AB"
        }
        return (
            factors | {f"head.{name}": x for name, x in reply.head.items()} | dict(reply.magnitudes)
        )

    a, b = tensors(one), tensors(other)
    numbers = [(r.client, r.round, r.loss, r.steps, r.bound, r.version) for r in (one, other)]
    return numbers[0] == numbers[1] and same_tensors(a, b)


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def same_state(one: ServerState, other: ServerState) -> bool:
    like, that = (
        {f"{n}.{k}": x for n, layer in s.layers.items() for k, x in flatten(layer).items()}
        for s in (one, other)
    )
    return (
        one.round == other.round and same_tensors(like, that) and same_tensors(one.head, other.head)
    )


PRUNING = {"name": "hetlora", "gamma": 0.5, "decay": 1.0}


@pytest.mark.parametrize(
    ("method", "together"),
    [
        *[("fedhl", True), ("fedhl", False), ("fedsa_lora", True), (PRUNING, True)],
        ("fedhl_ef", True),
        ({"name": "fedhl_ef", "download": 2}, False),
        ({"name": "fedhl_ef", "begin": "random"}, True),
        ("flora", True),
    ],
)
def test_a_client_trains_as_in_the_servers_process(project: Path, method: Any, together: bool):
    """Two rounds, to the bit: what is returned, what is kept and held, and the rank that it goes on with."""
    config = config_of(
        project,
        method=method,
        lora={"ranks": 4 if method == "fedsa_lora" else [1, 2, 4]},
        weighting="examples",
        wire={"payload": "bfloat16"},
    )
    prepared = prepare(config)
    federation, state = prepared.federation, prepared.initial_state()
    nodes = {client.id: Node(client.id, SHARED) for client in federation.clients}
    post = Post(config, prepared, nodes, together)
    ranks = []
    for _ in range(2):
        for client in (at_current_rank(client, state) for client in federation.clients):
            own = state.clients.get(client.id, {})
            sent = post.sent(state, client)
            travels = server.travelling(federation.method, state, client, config.seed)
            held = state.ledger.version(client.id)
            version = next_version(held, travels) if remembers(federation.method) else None
            local = train_client(
                federation, client, sent, state.head, state.round + 1, own=own, version=version
            )
            metrics = evaluate_client(federation, state, client, federation.own[client.id])
            reply, rank = post.train(state, client)
            assert same_reply(reply, local.reply)
            assert rank == int(local.kept.get("rank", client.rank))
            ranks.append(rank)
            # as before this round: what it has kept of it belongs to the next
            assert post.evaluate(state, client) == metrics
            factors = {name: x for name, x in (own | local.kept).items() if name != "rank"}
            kept = Kept(nodes[client.id].place("run")).before(state.round + 2)
            assert same_tensors(kept, factors)
            assert bool(kept) == (method == "fedsa_lora")
        state, _ = run_round(federation, state)
        for id, version in state.ledger.of.items():
            theirs = Holdings(nodes[id].place("run")).memory(version)
            assert theirs and same_tensors(dict(theirs), dict(state.ledger.memories[version]))
        assert bool(state.ledger.of) == remembers(federation.method)
    assert (ranks[3:] < [client.rank for client in federation.clients]) == (method == PRUNING)


def test_a_client_that_diverged_keeps_what_it_had(project: Path):
    """The server refuses its reply, and it begins again from there."""
    config = config_of(project, method="fedsa_lora", lora={"ranks": 2}, weighting="examples")
    prepared = prepare(config)
    state, client = prepared.initial_state(), prepared.federation.clients[0]
    here = Node(client.id, SHARED)
    Post(config, prepared, {client.id: here}).train(state, client)
    had = Kept(here.place("run")).before(2)
    wild = config.model_copy(
        update={"training": config.training.model_copy(update={"learning_rate": 1e30})}
    )
    post = Post(wild, prepared, {client.id: here})
    reply, _ = post.train(replace(state, round=1), client)
    assert not math.isfinite(reply.loss)
    assert had and same_tensors(Kept(here.place("run")).before(3), had)


def test_a_rank_above_its_own_is_refused(shared: Config):
    prepared = prepare(shared)
    post = Post(
        shared, prepared, {f"client-{k}": Node(f"client-{k}", SHARED) for k in range(3)}, True
    )
    state, client = prepared.initial_state(), prepared.federation.clients[1]
    config, here, header, payload, together = post.letter(state, client, 1)
    for rank in (0, 3, -1):
        with pytest.raises(UserError, match=f"'client-1' has rank 2, but was sent rank {rank}"):
            participant.train(config, here, header | {"rank": rank}, payload, together)
    with pytest.raises(Malformed):
        participant.train(config, here, header, payload[:-1], together)
    with pytest.raises(Malformed):
        participant.evaluate(config, here, header, b"", together)


def test_nodes_with_their_own_files_make_what_the_joined_file_makes(project: Path, tmp_path: Path):
    """Over two rounds, to the bit, through bytes; the server's part has no row."""
    made = tiny.rows(90)
    sites = sorted({row["site"] for row in made})
    files = {
        site: tiny.write_rows(tmp_path / f"{site}.jsonl", [r for r in made if r["site"] == site])
        for site in sites
    }
    joined = config_of(
        project,
        data={"source": str(tiny.write_rows(tmp_path / "joined.jsonl", made)), "held_out": None},
        partition={"kind": "by-column", "column": "site"},
        lora={"ranks": {"clients": {"site-0": 4}, "default": 2}},
    )
    apart = config_of(
        project, **{**joined.model_dump(), "data": {"source": "nowhere.jsonl", "held_out": None}}
    )
    nodes = {site: Node(site, str(files[site])) for site in sites}
    said = [introduce(apart, one) for one in nodes.values()]
    labels = sorted_labels({name for one in said for name in one["labels"]})
    ranks = {one["client"]: one["rank"] for one in said}
    served = prepare_server(apart, ranks, labels, SILENT)
    together = prepare(joined)
    assert labels == together.data.labels
    assert served.federation.rows == {}
    rows = {one["client"]: one["examples"] for one in said}
    clients = [replace(c, examples=rows[c.id]) for c in served.federation.clients]
    assert clients == together.federation.clients
    state, other = served.initial_state(), together.initial_state()
    assert same_state(state, other)
    post = Post(apart, served, nodes)
    federation = served.federation
    for _ in range(2):
        for client in clients:
            own = together.federation.own[client.id]
            expected = evaluate_client(together.federation, other, client, own)
            assert post.evaluate(state, client) == expected
        replies = [post.train(state, client)[0] for client in clients]
        state, _ = server.aggregate(
            federation.method, federation.weighting, state, replies, apart.seed
        )
        other, _ = run_round(together.federation, other)
        assert same_state(state, other)


def test_without_held_out_rows_there_is_nothing_to_evaluate(project: Path):
    config = config_of(project, evaluation={"client_fraction": 0.0})
    prepared = prepare(config)
    post = Post(config, prepared, {"client-0": Node("client-0", SHARED)}, True)
    assert post.evaluate(prepared.initial_state(), prepared.federation.clients[0]) is None


# --- memory -------------------------------------------------------------------------------------


def kept(k: int) -> dict[str, Tensor]:
    return {"layer.A": torch.full((2, 3), float(k)).T, "rest": torch.arange(k)}


def test_a_round_asked_again_begins_from_what_was_kept_before_it(tmp_path: Path):
    memory = Kept(Node("a", "x", state=tmp_path).place("run"))
    assert memory.before(1) == {}
    for round in (1, 2, 5):
        memory.keep(round, kept(round))
    assert same_tensors(memory.before(6), kept(5))
    assert same_tensors(memory.before(5), kept(2))
    memory.keep(5, kept(7))
    assert memory.folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in memory.folder.iterdir()} == {0o600}
    assert same_tensors(memory.before(5), kept(2))
    assert same_tensors(memory.before(6), kept(7))


def test_two_files_stay_and_nothing_half_written_is_read(tmp_path: Path):
    memory = Kept(Node("a", "x", state=tmp_path).place("run"))
    for round in (1, 2, 3):
        memory.keep(round, kept(round))
    names = ["round-000002.safetensors", "round-000003.safetensors"]
    assert sorted(file.name for file in memory.folder.iterdir()) == names
    (memory.folder / ".round-000004.safetensors.partial").write_bytes(b"half")
    assert same_tensors(memory.before(5), kept(3))
    memory.keep(4, kept(4))
    assert len(list(memory.folder.iterdir())) == 2


def test_rounds_go_by_their_numbers(tmp_path: Path):
    memory = Kept(Node("a", "x", state=tmp_path).place("run"))
    for round in (999_999, 1_000_000):
        memory.keep(round, kept(round % 10))
    assert same_tensors(memory.before(1_000_001), kept(0))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    ["..", ".", "../..", "/etc", "a/b", "a\\b", "%2E%2E", "C:", "~", "\0", "\n"]
)


@given(st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_whatever_the_names_each_client_and_run_has_a_folder_of_its_own(
    one: tuple[str, str], other: tuple[str, str]
):
    root = Path("/state")
    a, b = (Kept(Node(id, "x", state=root).place(run)).folder for id, run in (one, other))
    assert (a == b) == (one == other)
    for folder in (a, b):
        assert folder.parent.parent == root
        assert ".." not in folder.parts


def test_two_clients_on_one_machine_do_not_share_what_they_keep(tmp_path: Path):
    for id in ("..", "a", "a/b"):
        assert Kept(Node(id, "x", state=tmp_path).place("..")).before(9) == {}
        Kept(Node(id, "x", state=tmp_path).place("..")).keep(1, kept(len(id)))
    for id in ("..", "a", "a/b"):
        assert same_tensors(
            Kept(Node(id, "x", state=tmp_path).place("..")).before(9), kept(len(id))
        )
    assert [path.name for path in tmp_path.iterdir()] == ["%2E%2E"]
