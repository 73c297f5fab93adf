"""Flower's side without its processes: what a reply may do to the server, and what a restart finds."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from safetensors.torch import load_file
from support import tiny
from support.in_process import Answers, InProcessGrid

from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.files import file_name
from fedhl.flower.engine import metrics_of, serve
from fedhl.flower.incoming import Incoming, clients_interrupted
from fedhl.flower.mailbox import Mailbox, answer, one_line
from fedhl.flower.records import EVALUATE, TRAIN, pack, unpack
from fedhl.flower.roster import LABEL, LABELS, NAME, Member, Roster, clients_needed, introduction
from fedhl.flower.server import app
from fedhl.flower.submit import submit, toml, write_app
from fedhl.network.message import WHOLE, Malformed
from fedhl.record import read_metrics, read_summary
from fedhl.report import write_report
from fedhl.run import resume_run, start_run
from fedhl.run.delivery import evaluate_run
from fedhl.server import Client
from fedhl.watch import Watcher

HELLO = {
    **{"protocol": 3, "client": "a", "rank": 4, "examples": 100, "own": True},
    **{"tokenizer": "0" * 64, "labels": ["cat", "dog"]},
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# --- records ------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), JSON, max_size=4), st.none() | st.binary())
def test_what_is_packed_comes_out(header: dict[str, Any], payload: bytes | None):
    back, bytes = unpack(pack(header, payload))
    assert bytes == payload
    assert json.dumps(back) == json.dumps(header)  # not ==, for NaN


@given(
    st.dictionaries(
        st.sampled_from(["header", "payload", "other"]),
        st.one_of(
            st.builds(
                lambda value: ConfigRecord({"json": value}),
                st.text() | st.binary() | st.integers(0, 9) | st.lists(st.floats(), max_size=2),
            ),
            st.builds(ConfigRecord),
            st.builds(lambda: MetricRecord({"json": 1})),
            st.builds(
                lambda name, data: ArrayRecord({name: Array("uint8", (1,), "x", data)}),
                st.sampled_from(["safetensors", "weights"]),
                st.binary(),
            ),
        ),
    )
)
def test_garbage_is_malformed_and_nothing_else(records: dict[str, Any]):
    try:
        header, payload = unpack(RecordDict(records))
    except Malformed:
        return
    assert isinstance(header, dict)
    assert payload is None or isinstance(payload, bytes)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "\ud800", "[1]", "", "{"])
def test_json_that_is_no_header_is_malformed(text: str):
    with pytest.raises(Malformed):
        unpack(RecordDict({"header": ConfigRecord({"json": text})}))


# --- what a node says of itself -----------------------------------------------------------------


def test_a_right_introduction():
    assert introduction(HELLO) == Member("a", 4, 100, ("cat", "dog"), True, "0" * 64)
    assert introduction(HELLO | {"labels": None}).labels is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"protocol": 1}, "protocol version 1"),
        ({"protocol": True}, "protocol version True"),
        ({"client": 7}, "its client is 7"),
        ({"client": ""}, "cannot be the name of a file"),
        ({"client": "x" * (NAME + 1)}, "cannot be the name of a file"),
        ({"client": "/" * (NAME // 3 + 1)}, "cannot be the name of a file"),
        ({"client": "half \ud83d"}, "cannot be the name of a file"),
        ({"rank": "4"}, "its rank is '4'"),
        ({"rank": True}, "its rank is True"),
        ({"rank": 0}, "its rank is 0"),
        ({"examples": 0}, "its examples is 0"),
        ({"examples": WHOLE}, "expected 1 to 2"),
        ({"examples": 10**400}, "expected 1 to 2"),
        ({"examples": 10.0}, "its examples is 10.0"),
        ({"own": 1}, "its own is 1"),
        ({"tokenizer": None}, "its tokenizer is None"),
        ({"labels": "cat"}, "must be a list of texts"),
        ({"labels": ["cat", 1]}, "must be a list of texts"),
        ({"labels": [str(k) for k in range(1_000_000)]}, f"at most {LABELS:,} labels"),
        ({"labels": ["x" * (LABEL + 1)]}, f"at most {LABEL:,} characters"),
        ({"labels": ["half \ud83d"]}, "labels"),
    ],
)
def test_a_wrong_introduction_is_refused(wrong: dict[str, Any], reason: str):
    with pytest.raises(Malformed, match=reason) as refused:
        introduction(HELLO | wrong)
    assert len(str(refused.value)) < 300


@given(st.dictionaries(st.sampled_from(sorted(HELLO)), JSON))
def test_any_introduction_is_a_member_or_malformed(wrong: dict[str, Any]):
    try:
        member = introduction(HELLO | wrong)
    except Malformed as error:
        str(error).encode()
        return
    assert len(file_name(member.client)) <= NAME
    json.dumps([member.client, member.labels], ensure_ascii=False).encode()  # as files are written


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(codec="utf-8")))
def test_the_file_of_a_client_is_its_own_and_in_its_folder(one: str, other: str):
    assert (file_name(one) == file_name(other)) == (one == other)
    assert not set(file_name(one)) & set("./\\: \n")


# --- answers ------------------------------------------------------------------------------------


@pytest.fixture
def question() -> Message:
    InProcessGrid({})  # which tells Flower who is asking
    return Message(RecordDict(), 1, TRAIN)


@pytest.mark.parametrize("reason", ["", " ", "\n", "\x1b[2J", None, "x" * 10**6, "why\n\n"])
def test_an_error_of_flowers_has_a_reason_in_one_line(question: Message, reason: Any):
    with pytest.raises(Malformed, match="its node reports an error") as refused:
        answer(Message(Error(2, reason), reply_to=question))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("said", ["no\nround 9/9: all is well", "\ud800", "\x1b[31m", ["a"], None])
def test_what_a_client_says_stays_in_its_line(question: Message, said: Any):
    with pytest.raises(Malformed, match="its node says") as refused:
        answer(Message(pack({"error": said}), reply_to=question))
    assert str(refused.value).isprintable()


@given(st.text())
def test_one_line_can_be_printed_and_written(text: str):
    assert one_line(text).isprintable()
    assert len(one_line(text)) <= 500


GOOD = {"loss": 0.5, "examples": 3, "accuracy": 1.0}


def test_metrics_are_those_of_the_task(project: Path, settings: Config):
    causal = load_config(project / "lm.yaml")
    without = {"loss": 0.5, "examples": 3}
    assert metrics_of(GOOD, settings) == GOOD
    assert metrics_of(without, causal) == without
    for metrics, config in ((GOOD, causal), (without, settings)):
        with pytest.raises(Malformed, match="its metrics are"):
            metrics_of(metrics, config)


@pytest.mark.parametrize(
    "metrics",
    [
        *(None, 3, [], {}, {"loss": 0.1}, GOOD | {"more": 2}),
        *(GOOD | {"loss": x} for x in (math.nan, math.inf, True, "0", None, 10**400, [0])),
        *(GOOD | {"accuracy": x} for x in (math.nan, 1.01, -0.5, 9e15, True)),
        *(GOOD | {"examples": x} for x in (0, -3, 0.5)),
    ],
)
def test_wrong_metrics_are_malformed(settings: Config, metrics: Any):
    with pytest.raises(Malformed, match=r"its (metrics|loss|accuracy|examples)"):
        metrics_of(metrics, settings)


# --- whole runs ---------------------------------------------------------------------------------


def settings_of(project: Path, name: str, **changes: Any) -> Config:
    config = tiny.classification(
        name=name,
        rounds=2,
        data={"limit": 90, "held_out": {"count": 8}},
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query"], "ranks": [1, 2, 4]},
        training={"steps": 1},
        evaluation={"client_fraction": 0.0, "every": 100},
        participation={"fraction": 1.0},
        federation={"deadline": 2},
    )
    return load_config(tiny.write_config(project / f"{name}.yaml", tiny.merged(config, changes)))


@pytest.fixture
def settings(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.chdir(project)
    monkeypatch.setenv("FEDHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedhl.flower.mailbox.POLL", 0.01)
    return settings_of(project, "grid")


NODES: dict[int, dict[str, Any]] = {k: {"partition-id": k, "num-partitions": 3} for k in range(3)}
NAMED = {k: {"client": f"client-{k}", "data": "partition"} for k in range(3)}


def run(
    settings: Config,
    folder: Path,
    grid: InProcessGrid,
    said: list[str] | None = None,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:
    """The run, as far as it goes; its metrics without round 0."""
    watcher = watcher or Watcher(say=(said if said is not None else []).append)
    serve(settings, folder, grid, clients_needed(settings), watcher)
    return read_metrics(folder)[1:]


def roster_of(settings: Config, grid: InProcessGrid, said: list[str] | None = None) -> Roster:
    """The roster of a run that has not begun."""
    watcher = Watcher(say=(said if said is not None else []).append)
    return Roster(settings, Mailbox(grid), watcher)


def same(one: Path, other: Path) -> bool:
    a, b = (
        load_file(max((f / "state").glob("round-*")) / "state.safetensors") for f in (one, other)
    )
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def accepted(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [[client["id"] for client in line["clients"]] for line in lines]


def reasons(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{one["id"]: one["reason"] for one in line["refused"]} for line in lines]


@pytest.fixture(scope="module")
def oracle(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, without Flower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        folder = tmp_path_factory.mktemp("oracle") / "run"
        start_run(settings_of(project, "grid"), folder)
    return folder


def test_the_run_is_the_one_without_flower(settings: Config, tmp_path: Path, oracle: Path):
    lines = run(settings, tmp_path / "run", InProcessGrid(NAMED))
    assert accepted(lines) == [[f"client-{k}" for k in range(3)]] * 2
    assert same(tmp_path / "run", oracle)
    assert not (tmp_path / "run" / "incoming").exists()


def test_the_app_serves_the_run_that_its_config_describes(
    settings: Config, tmp_path: Path, oracle: Path
):
    folder = tmp_path / "run"
    told: Any = {"config": settings.model_dump_json(), "folder": str(folder)}
    app(InProcessGrid(NAMED), Context(1, 0, {}, RecordDict(), run_config=told))
    assert read_summary(folder)["status"] == "finished"
    assert same(folder, oracle)


# --- hostile replies ----------------------------------------------------------------------------


def content(make: Callable[[bytes | None], RecordDict]) -> Callable[..., Answers]:
    """A reply with the content that `make` makes of the payload."""
    return lambda asked, reply: [Message(make(unpack(reply.content)[1]), reply_to=asked)]


def unasked(asked: Message, reply: Message) -> Answers:
    """An answer to nothing."""
    reply.metadata.__dict__["_reply_to_message_id"] = ""
    return [reply]


def without_content(asked: Message, reply: Message) -> Answers:
    reply.__dict__["_content"] = None
    return [reply]


SPOILT: list[tuple[Callable[..., Answers], str]] = [
    # what becomes of the reply of client-2, and what the server's reason says of it
    (
        lambda asked, reply: [Message(Error(2, " "), reply_to=asked)],
        "its node reports an error (2): unknown",
    ),
    (without_content, "its node reports an error (0): unknown"),
    (content(lambda payload: RecordDict()), "no readable header"),
    (content(lambda payload: pack({"error": "\ud800\x1b[2J"})), "its node says:   [2J"),
    (unasked, "no reply within"),
    (lambda asked, reply: [], "no reply within"),
    (content(lambda payload: pack({})), "its reply has no payload"),
    (
        content(lambda payload: pack({"next_rank": 5}, payload)),
        "its next rank is 5, expected 4 to 4",
    ),
    (  # only some methods let a client give up rank
        content(lambda payload: pack({"next_rank": 1}, payload)),
        "its next rank is 1, expected 4 to 4",
    ),
    (content(lambda payload: pack({"next_rank": True}, payload)), "its next rank is True"),
    (content(lambda payload: pack({"next_rank": [[]]}, payload)), "its next rank is a list"),
    (content(lambda payload: pack({}, bytes(10**6))), "it has 1,000,000 bytes, expected at most"),
]


def test_no_reply_stops_the_run(project: Path, settings: Config, tmp_path: Path):
    def between(node: int, message: Message, reply: Message) -> Answers:
        if node != 2 or message.metadata.message_type != TRAIN:
            return [reply]
        return SPOILT[unpack(message.content)[0]["round"] - 1][0](message, reply)

    settings = settings_of(project, "spoilt", rounds=len(SPOILT), federation={"deadline": 0.1})
    lines = run(settings, tmp_path / "run", InProcessGrid(NODES, between))
    assert accepted(lines) == [["client-0", "client-1"]] * len(SPOILT)
    for found, (_, reason) in zip(reasons(lines), SPOILT, strict=True):
        assert list(found) == ["client-2"]
        assert reason in found["client-2"]
    assert lines[-1]["refused"][0]["bytes_up"] == 10**6  # refused, but paid for


def test_no_reply_above_its_limit_is_kept(settings: Config, tmp_path: Path):
    """The reader of a reply refuses it, too; but by then it would have filled the disk."""
    incoming, client = Incoming(tmp_path / "small", 1), Client("client-0", 4, 2.0, 10)
    incoming.begin([("client-0", 4, 10)])
    with pytest.raises(Malformed, match="it has 11 bytes, expected at most 10"):
        incoming.keep(client, {}, bytes(11), limit=10, least_rank=4)
    assert incoming.size(client) == 0
    incoming.keep(client, {}, bytes(10), limit=10, least_rank=4)
    assert incoming.size(client) == 10

    kept: list[int] = []

    class Watched(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            files = (tmp_path / "run").glob("incoming/*/*.safetensors")
            kept.extend(file.stat().st_size for file in files)
            return list(self.nodes)

    def between(node: int, message: Message, reply: Message) -> Answers:
        if message.metadata.message_type != TRAIN:
            return [reply]
        header, payload = unpack(reply.content)
        assert payload is not None
        return [Message(pack(header, payload + bytes(10**6 * (node == 2))), reply_to=message)]

    lines = run(settings, tmp_path / "run", Watched(NODES, between))
    assert accepted(lines) == [["client-0", "client-1"]] * 2
    assert kept
    assert max(kept) < 10**6


def test_what_flower_cannot_read_is_missing_and_takes_nothing_with_it(
    settings: Config, tmp_path: Path, oracle: Path
):
    """As its grid does, this one raises what it meets in a reply, once it has deleted that."""

    class Unreadable(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = super().pull_messages(message_ids)
            for reply in found:
                node, kind = reply.metadata.src_node_id, reply.metadata.message_type
                if (node, kind) == (1, TRAIN):
                    raise json.JSONDecodeError("Expecting value", "", 0)
                if node == 9:
                    raise IndexError("no child")
            return found

    said: list[str] = []
    nodes = NODES | {9: NODES[0]}
    lines = run(settings, tmp_path / "run", Unreadable(nodes), said)
    assert accepted(lines) == [["client-0", "client-2"]] * 2
    assert all("cannot read its reply: JSONDecodeError" in r["client-1"] for r in reasons(lines))
    assert any("a node was refused: Flower cannot read its reply" in line for line in said)


def test_a_reply_whose_upload_never_ends_holds_up_nobody(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fedhl.flower.mailbox.STALL", 0.2)
    over = threading.Event()

    class Stalled(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if any(self.meant[id] == (1, TRAIN) for id in message_ids):
                over.wait(60)
            return super().pull_messages(message_ids)

    lines = run(settings, tmp_path / "run", Stalled(NODES))
    over.set()
    assert accepted(lines) == [["client-0", "client-2"]] * 2
    assert all("no reply within 2 seconds" in found["client-1"] for found in reasons(lines))


def test_a_newcomer_of_another_rank_is_refused_where_all_must_have_one(
    project: Path, settings: Config, own: dict[int, dict[str, Any]], tmp_path: Path
):
    settings = settings_of(
        project,
        "alike",
        method="fedit",
        weighting="examples",
        lora={"ranks": 2},
        data={"held_out": None},
        federation={"clients": 2},
    )
    nodes = {k: own[k] | {"rank": 2} for k in (0, 1)}
    grid = InProcessGrid(nodes)

    def between(node: int, message: Message, reply: Message) -> Answers:
        if message.metadata.message_type == TRAIN:
            grid.nodes[2] = own[2] | {"rank": 1}
        return [reply]

    grid.between = between
    said: list[str] = []
    lines = run(settings, tmp_path / "run", grid, said)
    assert accepted(lines) == [sorted(ODD[:2])] * 2
    assert any("has rank 1, but fedit needs rank 2 of every client" in line for line in said)


def test_an_answer_given_twice_counts_once(settings: Config, tmp_path: Path, oracle: Path):
    grid = InProcessGrid(NODES, lambda node, message, reply: [reply, reply])
    run(settings, tmp_path / "run", grid)
    assert same(tmp_path / "run", oracle)


def test_a_node_that_flower_takes_no_message_for_is_missing(settings: Config, tmp_path: Path):
    grid = InProcessGrid(NODES)

    def listen(line: str) -> None:
        if "'client-2' has joined" in line:
            grid.deaf.add(2)

    lines = run(settings, tmp_path / "run", grid, watcher=Watcher(say=listen))
    assert accepted(lines) == [["client-0", "client-1"]] * 2
    assert all("did not accept the message" in found["client-2"] for found in reasons(lines))


# --- hostile introductions ----------------------------------------------------------------------


LIES: list[tuple[dict[str, Any], str]] = [
    ({"examples": 10**400}, "expected 1 to 2"),
    ({"examples": 10**9}, "has 1000000000 rows, expected"),
    ({"rank": 10**6}, "has rank 1000000, expected rank 2, with which it began"),
    ({"client": "mallory", "rank": 10**6}, "'mallory' is not a client of the config's partition"),
    ({"client": "client-0"}, "client 'client-0' is connected already, from another node"),
    ({"tokenizer": "0" * 64}, "another tokenizer than the server"),
    ({"own": True}, "has its own data, unlike the other clients"),
]


def test_a_lie_about_oneself_does_not_stop_the_run(project: Path, settings: Config, tmp_path: Path):
    """Two clients are honest, each of the others lies in another way."""
    count = 2 + len(LIES)
    settings = settings_of(
        project,
        "lies",
        partition={"kind": "iid", "clients": count},
        lora={"ranks": 2},
        federation={"clients": 2},
    )

    def between(node: int, message: Message, reply: Message) -> Answers:
        if node < 2 or message.metadata.message_type != "query":
            return [reply]
        lie, _ = LIES[node - 2]
        return [Message(pack(unpack(reply.content)[0] | lie), reply_to=message)]

    said: list[str] = []
    nodes = {k: {"partition-id": k, "num-partitions": count} for k in range(count)}
    lines = run(settings, tmp_path / "run", InProcessGrid(nodes, between), said)
    assert accepted(lines) == [["client-0", "client-1"]] * 2
    for _, reason in LIES:
        assert any("refused" in line and reason in line for line in said), (reason, said)


def test_the_first_to_come_does_not_decide_the_tokenizer(settings: Config):
    def between(node: int, message: Message, reply: Message) -> Answers:
        header, _ = unpack(reply.content)
        return [Message(pack(header | ({"tokenizer": "x"} if node == 0 else {})), reply_to=message)]

    roster = roster_of(settings, InProcessGrid(NODES, between))
    assert sorted(roster.look()) == ["client-1", "client-2"]


def test_a_rank_of_its_own_has_a_limit(settings: Config):
    roster = roster_of(settings, InProcessGrid({}))
    mine = HELLO | {"tokenizer": roster.tokenizer}
    assert roster.welcome(mine | {"rank": 256}).rank == 256
    with pytest.raises(
        Malformed, match=r"has rank 257, expected at most 256 \(federation.top_rank\)"
    ):
        roster.welcome(mine | {"rank": 257})


def test_only_the_owner_may_read_what_arrives(tmp_path: Path):
    incoming = Incoming(tmp_path / "run", 1)
    incoming.begin([("a", 4, 9)])
    incoming.keep(Client("a", 4, 1.0, 9), {}, b"reply", limit=9, least_rank=4)
    incoming.close({})
    paths = [path for path in (tmp_path / "run" / "incoming").rglob("*")]
    assert len(paths) == 5
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_rows_that_a_client_may_claim_have_a_limit(settings: Config):
    """Its rows are its own word, and decide how much it counts."""
    roster = roster_of(settings, InProcessGrid({}))
    mine = HELLO | {"tokenizer": roster.tokenizer}
    assert roster.welcome(mine | {"examples": 10**6}).examples == 10**6
    with pytest.raises(
        Malformed,
        match=r"reports 1,000,001 rows, expected at most 1,000,000 \(federation.max_rows\)",
    ):
        roster.welcome(mine | {"examples": 10**6 + 1})


# --- nodes that come and go ---------------------------------------------------------------------


def test_a_machine_that_was_started_again_is_let_in_when_its_old_node_has_left(
    settings: Config,
):
    said: list[str] = []
    grid = InProcessGrid(NODES | {9: NODES[1]})
    roster = roster_of(settings, grid, said)
    assert roster.look() == {f"client-{k}": k for k in range(3)}
    assert any("client 'client-1' is connected already, from another node" in line for line in said)
    asked = len(grid.asked)
    assert roster.look()["client-1"] == 1
    assert len(grid.asked) == asked  # it is not asked again and again
    del grid.nodes[1]
    assert roster.look() == {"client-0": 0, "client-1": 9, "client-2": 2}


def test_an_answer_of_a_node_that_has_left_is_not_waited_for(settings: Config):
    grid = InProcessGrid(NODES, lambda node, message, reply: [reply] * (node != 1))
    roster = roster_of(settings, grid)
    assert sorted(roster.look()) == ["client-0", "client-2"]
    (id,) = roster.asked
    del grid.nodes[1]
    roster.look()
    assert id not in roster.asked
    grid.nodes[9], grid.between = NODES[1], lambda node, message, reply: [reply]
    assert roster.look()["client-1"] == 9


def test_no_message_goes_to_a_node_that_has_left(project: Path, settings: Config, tmp_path: Path):
    """One node leaves between the beginning of a round and its messages, another between two rounds."""
    settings = settings_of(project, "leaving", evaluation={"client_fraction": 0.2, "every": 1})
    folder = tmp_path / "run"

    class Leaving(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            if Incoming(folder, 1).clients() is not None:
                self.nodes.pop(2, None)
            return list(self.nodes)

        def push(self, message: Message) -> str:
            assert message.metadata.dst_node_id in self.nodes
            return super().push(message)

    grid = Leaving(NODES)

    def listen(line: str) -> None:
        if line.startswith("round 1"):
            grid.nodes.pop(1)

    lines = run(settings, folder, grid, watcher=Watcher(say=listen))
    assert accepted(lines) == [["client-0", "client-1"], ["client-0"]]
    assert reasons(lines) == [{"client-2": "its node has left"}, {}]
    assert [node for node, kind in grid.asked if kind == TRAIN] == [0, 1, 0]
    assert [node for node, kind in grid.asked if kind == EVALUATE] == [0, 1, 2, 0, 1, 0]


# --- restarts -----------------------------------------------------------------------------------


class Killed(BaseException):
    """The server's process ends here."""


ODD = ["..", "a/b", "clients"]
"""Ids that are no plain file names; the last is the name of a file of ours."""


@pytest.fixture(scope="module")
def own(project: Path) -> dict[int, dict[str, Any]]:
    """Nodes with rows and ranks of their own."""
    for k in range(3):
        tiny.write_rows(project / f"own-{k}.jsonl", tiny.rows(60, seed=k))
    return {k: {"client": id, "data": f"own-{k}.jsonl", "rank": k + 1} for k, id in enumerate(ODD)}


@pytest.fixture
def own_settings(project: Path, settings: Config) -> Config:
    return settings_of(project, "own", data={"held_out": None}, federation={"clients": 3})


@pytest.fixture
def torn(own_settings: Config, own: dict[int, dict[str, Any]], tmp_path: Path) -> Path:
    """A run killed in its second round, when two of three replies had arrived."""
    folder = tmp_path / "torn"

    def between(node: int, message: Message, reply: Message) -> Answers:
        last = node == 0 and message.metadata.message_type == TRAIN
        return [] if last and unpack(message.content)[0]["round"] == 2 else [reply]

    class Dying(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            if len(list(folder.glob("incoming/round-000002/*.safetensors"))) == 2:
                raise Killed
            return list(self.nodes)

    with pytest.raises(Killed):
        run(own_settings, folder, Dying(own, between))
    return folder


def test_a_run_killed_anywhere_goes_on_to_the_same_end(
    own_settings: Config, own: dict[int, dict[str, Any]], torn: Path, tmp_path: Path
):
    whole = tmp_path / "whole"
    assert accepted(run(own_settings, whole, InProcessGrid(own))) == [sorted(ODD)] * 2
    now = "incoming/round-000002"

    def nothing(folder: Path) -> None: ...

    def rank_alone(folder: Path) -> None:
        for file in folder.glob(f"{now}/*.safetensors"):
            file.unlink()

    def half_written(folder: Path) -> None:
        for file in (folder / now).iterdir():
            file.rename(file.with_name(f".{file.name}.partial"))

    def after_a_lost_state(folder: Path) -> None:
        shutil.rmtree(folder / "state" / "round-000001")
        for file in folder.glob(f"{now}/*.safetensors"):
            file.write_bytes(b"of a round that has not been yet")

    def only_the_config(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != "config.yaml":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    asked_again = {nothing: 1, after_a_lost_state: 6, only_the_config: 6}
    for damage in (nothing, rank_alone, half_written, after_a_lost_state, only_the_config):
        folder = shutil.copytree(torn, tmp_path / damage.__name__)
        damage(folder)
        grid = InProcessGrid(own)
        run(own_settings, folder, grid)
        trained = [node for node, kind in grid.asked if kind == TRAIN]
        assert len(trained) == asked_again.get(damage, 3), damage.__name__
        assert same(folder, whole), damage.__name__
        assert not list(folder.glob("incoming*")), damage.__name__


def test_a_round_that_was_closed_is_not_opened_again(
    own_settings: Config, own: dict[int, dict[str, Any]], tmp_path: Path
):
    """Its sum may have been sent, to be evaluated, when the server was killed: a reply that comes only now
    would make another one, with the same noise if there is any."""

    def step(phase: str, done: int, total: int) -> None:
        if phase == "round 2: evaluating":
            raise Killed

    def between(node: int, message: Message, reply: Message) -> Answers:
        late = node == 0 and message.metadata.message_type == TRAIN
        return [] if late and unpack(message.content)[0]["round"] == 2 else [reply]

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(own_settings, folder, InProcessGrid(own, between), watcher=Watcher(step=step))
    grid = InProcessGrid(own)  # in which everybody answers
    lines = run(own_settings, folder, grid)
    assert TRAIN not in [kind for _, kind in grid.asked]
    assert accepted(lines)[1] == sorted(ODD[1:])
    assert "no reply within 2 seconds" in reasons(lines)[1][ODD[0]]


@pytest.mark.parametrize("first", [False, True])
def test_a_client_that_has_left_for_good_is_not_waited_for_after_a_restart(
    own_settings: Config, own: dict[int, dict[str, Any]], torn: Path, first: bool
):
    if first:  # as if it had been killed in its first round
        shutil.rmtree(torn / "state" / "round-000001")
        (torn / "incoming" / "round-000002").rename(torn / "incoming" / "round-000001")
        for file in (torn / "incoming" / "round-000001").glob("*.safetensors"):
            file.unlink()
    lines = run(own_settings, torn, InProcessGrid({k: own[k] for k in (1, 2)}))
    then = 0 if first else 1
    assert accepted(lines)[1] == sorted(ODD[1:])
    assert reasons(lines)[then] == {ODD[0]: "its node has left"}
    assert write_report(torn).is_file()


def test_a_run_of_clients_with_their_own_rows_is_evaluated_and_not_resumed_here(
    project: Path, settings: Config, own: dict[int, dict[str, Any]], torn: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="other processes, with rows or factors of their own"):
        resume_run(torn)
    rows = str(tiny.write_rows(tmp_path / "test.jsonl", tiny.rows(20, seed=9)))
    (table,) = evaluate_run(torn, "last", rows)
    assert isinstance(table, Table)
    assert table.title == "after round 1"
    assert table.row_count == 4  # the full update, and three ranks


def test_who_keeps_factors_goes_on_where_they_are(project: Path, settings: Config, tmp_path: Path):
    settings = settings_of(
        project,
        "keeping",
        method="fedsa_lora",
        weighting="examples",
        lora={"ranks": 2},
        evaluation={"client_fraction": 0.2},
    )

    def listen(line: str) -> None:
        if line.startswith("round 1"):
            raise Killed

    dying = Watcher(say=listen)
    for networked in (True, False):
        folder = tmp_path / str(networked)

        with pytest.raises(Killed):
            if networked:
                run(settings, folder, InProcessGrid(NODES), watcher=dying)
            else:
                start_run(settings, folder, dying)
        with pytest.raises(UserError, match=r"other processes|begun in one process"):
            if networked:
                resume_run(folder)
            else:
                run(settings, folder, InProcessGrid(NODES))
    with pytest.raises(UserError, match=r"only the clients of .* can evaluate"):
        evaluate_run(tmp_path / "True", "last", None)


def test_the_number_of_registered_clients_stays_after_a_restart(
    project: Path, settings: Config, own: dict[int, dict[str, Any]], tmp_path: Path
):
    pytest.importorskip("dp_accounting")
    settings = settings_of(
        project,
        "private",
        weighting="uniform",
        rounds=3,
        data={"held_out": None},
        federation={"clients": 3},
        privacy={"clip": 1.0, "noise": 1.0, "delta": 1e-3},
        participation={"fraction": 0.5},
    )
    folder, late = tmp_path / "run", own[0] | {"client": "late"}
    grid = InProcessGrid(own)

    def listen(line: str) -> None:
        if line.startswith("round 1"):
            grid.nodes[9] = late
        if line.startswith("round 2"):
            raise Killed

    with pytest.raises(Killed):
        run(settings, folder, grid, watcher=Watcher(say=listen))
    assert len(read_summary(folder)["clients"]) == 4
    run(settings, folder, InProcessGrid(own | {9: late}))
    whole = tmp_path / "whole"
    run(settings, whole, InProcessGrid(own))
    then, now = (read_summary(path)["privacy"] for path in (whole, folder))
    assert now == then
    assert now["clients"] == 3


def test_after_a_restart_clients_must_be_as_they_were(
    own_settings: Config, own: dict[int, dict[str, Any]], torn: Path
):
    said: list[str] = []
    changed = own | {
        2: own[2] | {"rank": 1},
        3: {"client": "larger", "data": "own-0.jsonl", "rank": 8},
    }
    lines = run(own_settings.model_copy(deep=True), torn, InProcessGrid(changed), said)
    assert accepted(lines)[1] == sorted(ODD)  # the reply that it had sent before counts
    assert any(
        "'clients' has rank 1, expected rank 3, with which it began" in line for line in said
    )
    assert any("'larger' has rank 8, expected at most 3" in line for line in said)


def test_only_an_unfinished_round_is_waited_for(torn: Path):
    assert clients_interrupted(torn) == 3
    shutil.copytree(torn / "state" / "round-000001", torn / "state" / "round-000002")
    assert clients_interrupted(torn) == 0


# --- configs that cannot be served, and Flower that is not there ---------------------------------


def test_a_config_that_cannot_be_served_is_refused_before_anything_is_sent(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", "")
    tasks = settings_of(project, "refused", tasks={"count": 2}, rounds=4)
    with pytest.raises(UserError, match="tasks: labels that arrive over time"):
        submit(tasks, project / "runs" / "refused", "nowhere")
    only = settings_of(project, "refused", participation={"only": ["client-1"]})
    with pytest.raises(UserError, match=r"participation.only needs all rows in one process"):
        submit(only, project / "runs" / "refused", "nowhere")
    by_column = settings_of(
        project, "refused", partition={"kind": "by-column", "column": "site"}, lora={"ranks": 2}
    )
    with pytest.raises(UserError, match=r"federation.clients is missing: give the number"):
        submit(by_column, project / "runs" / "refused", "nowhere")
    assert clients_needed(by_column, nodes=3) == 3


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_a_toml_string(text: str):
    assert tomllib.loads(f"x = {toml(text)}") == {"x": text}


def test_the_app_that_is_sent_says_what_it_was_told(settings: Config, tmp_path: Path):
    odd = settings.model_copy(
        update={"data": settings.data.model_copy(update={"source": 'a "b"\\c {d} \x7f ü\n.jsonl'})}
    )
    folder = Path('/srv/"runs"/{x}')
    write_app(tmp_path / "app", odd, folder)
    written = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text("utf-8"))
    told = written["tool"]["flwr"]["app"]["config"]
    assert Config.model_validate_json(told["config"]) == odd
    assert Path(told["folder"]) == folder


WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flwr":
            raise ModuleNotFoundError("No module named 'flwr'", name="flwr")

sys.meta_path.insert(0, Blocker())
from fedhl.cli import main

for command in (["serve", "tiny.yaml", "somewhere"], ["run", "tiny.yaml", "--ray", "2"]):
    sys.argv = ["fedhl", *command, "--out", sys.argv[-1]]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


def test_without_flower_the_commands_say_what_to_install(project: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "run")],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2", "2"], done.stderr
    assert done.stderr.count("flwr is not installed: pip install 'fedhl[flower]'") == 2
    assert not (tmp_path / "run").exists()


# --- the other end ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"protocol": 1}, "protocol version 1"),
        ({"protocol": 3}, "no readable config"),
        ({"protocol": 3, "config": 7}, "no readable config"),
        ({"protocol": 3, "config": '{"name": "x", "hyper": 1}'}, "cannot read the config"),
    ],
)
def test_a_client_says_why_it_does_not_understand(header: dict[str, Any], reason: str):
    grid = InProcessGrid({1: {"client": "a", "data": "rows.jsonl"}})
    (id,) = grid.push_messages([Message(pack(header), 1, "query")])
    (reply,) = grid.pull_messages([id])
    with pytest.raises(Malformed, match=f"its node says: .*{reason}"):
        answer(reply)
