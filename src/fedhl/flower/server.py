"""Flower's ServerApp: a Strategy that finds the clients, sends, gathers, and leaves the rest to fedhl.

`Strategy.start` of Flower neither checkpoints nor resumes, so this one runs the loop of `fedhl.run`, with
itself as the engine. Each reply is on disk before the next is read: a server that is killed in the middle
of a round goes on with the replies that had arrived.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from time import monotonic, perf_counter, sleep
from typing import Any, TypeVar

import httpx
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedhl import server
from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.engine import Returned
from fedhl.federation.federation import Federation, as_now
from fedhl.federation.prepare import (
    Prepared,
    clients_keep,
    prepare,
    prepare_server,
    prepare_server_again,
)
from fedhl.files import file_name, write_bytes, write_text
from fedhl.flower.records import EVALUATE, HELLO, TRAIN, pack, unpack
from fedhl.method import Broadcast, SelfPruning
from fedhl.model.evaluation import Metrics
from fedhl.model.loading import load_tokenizer, tokenizer_hash
from fedhl.network import wire
from fedhl.network.message import WHOLE, Malformed, shown
from fedhl.record import read_summary, round_name, rounds_in
from fedhl.run.folder import alone, load_run_config, networked
from fedhl.run.loop import begin, go_on, refuse_taken
from fedhl.server import Client, Reply, ServerState
from fedhl.task.labels import sorted_labels
from fedhl.watch import Watcher

T = TypeVar("T")

POLL = 0.5
"""Seconds between two looks at what has arrived."""
GRACE = 60.0
"""Seconds that Flower keeps a message beyond the deadline, so that what passes is our deadline."""
STALL = 5.0
"""Seconds that replies which have been announced, but do not come, may hold up all others."""
PATIENCE = 30.0
"""Seconds between two notices that clients are still waited for."""
NAME = 200
"""Characters of a client's id as a file name: with what we add they stay below a file system's 255."""
LABELS, LABEL = 10_000, 1_000
"""Labels of a client, and characters of each: every label is a row of the head that all others hold."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the run that the run config describes, or go on with it."""
    config = Config.model_validate_json(str(context.run_config["config"]))
    watcher = Watcher(say=partial(print, flush=True))
    Rounds(config, Path(str(context.run_config["folder"])), watcher).start(grid)


@dataclass(frozen=True)
class Member:
    """What a node has said about itself."""

    client: str
    rank: int
    examples: int
    labels: tuple[str, ...] | None
    own: bool
    tokenizer: str


@dataclass(frozen=True)
class Turn:
    """One round under way: who was asked, where replies go, who will send none and why, bytes."""

    federation: Federation
    state: ServerState
    cohort: Sequence[Client]
    folder: Path
    missing: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    payloads: dict[Any, bytes] = field(default_factory=dict)

    @property
    def round(self) -> int:
        return self.state.round + 1

    def file(self, client: Client) -> Path:
        return self.folder / (file_name(client.id) + ".safetensors")

    def came(self, client: Client, bytes: int) -> None:
        """Take down how much this client has sent."""
        self.traffic[client.id] = (self.traffic[client.id][0], bytes)

    def keep(
        self, client: Client, header: Mapping[str, Any], payload: bytes | None, run: wire.Run
    ) -> None:
        """Put a reply on disk, with the rank that its client goes on with. Raises Malformed.

        A reply has nothing that its client was not sent, but for its own header: what is larger is not
        kept, so that nobody fills the disk.
        """
        if payload is None:
            raise Malformed("its reply has no payload")
        most = self.traffic[client.id][0] + sum(wire.limit([], (*run, client.id)))
        self.came(client, len(payload))
        if len(payload) > most:
            raise Malformed(f"it has {len(payload):,} bytes, expected at most {most:,}")
        rank = header.get("next_rank", client.rank)
        least = 1 if isinstance(self.federation.method, SelfPruning) else client.rank
        if type(rank) is not int or not least <= rank <= client.rank:
            raise Malformed(f"its next rank is {shown(rank)}, expected {least} to {client.rank}")
        write_text(self.file(client).with_suffix(".rank"), json.dumps(rank))
        write_bytes(self.file(client), payload)

    def read(self, client: Client, run: wire.Run) -> tuple[Reply, dict[str, Tensor]]:
        """The reply of a client, and the rank that it goes on with if it has given some up. Raises
        Malformed, with the reason."""
        federation, state, seed = self.federation, self.state, self.federation.config.seed

        def sent(layer: str) -> Broadcast:
            return server.broadcast_layer(federation.method, state, layer, client, seed)

        file = self.file(client)
        reply = wire.read_reply(file, run, client, list(state.layers), sent, state.head)
        rank = json.loads(file.with_suffix(".rank").read_text())
        return reply, {"rank": torch.tensor(rank)} if rank < client.rank else {}


class Rounds(Strategy):
    """A federation over Flower's grid: `start` is `fedhl run`, with the clients at the other end."""

    def __init__(
        self, config: Config, folder: Path, watcher: Watcher, nodes: int | None = None
    ) -> None:
        self.first = wanted(config, nodes)
        self.config, self.folder, self.watcher = config, folder, watcher
        self.members: dict[int, Member] = {}
        self.asked: dict[str, int] = {}  # message: node that has not introduced itself yet
        self.told: set[int] = set()  # nodes that were asked to
        self.pulling: dict[str, Future[list[Message]]] = {}  # replies whose upload has not ended
        self.ranks: dict[str, int] = {}  # of all who have taken part
        self.prepared: Prepared | None = None

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Wait for the clients, then all rounds that are left. What comes of it is in the run's folder;
        Flower's own result stays empty."""
        self.grid = grid
        resumed = (self.folder / "config.yaml").exists()
        if not resumed:
            refuse_taken(self.folder)
        elif load_run_config(self.folder) != with_weighting(self.config):
            raise UserError(f"{self.folder} holds a run of another config; choose another folder")
        elif self.done() and not networked(self.folder) and clients_keep(self.config):
            raise UserError(
                f"{self.folder} was begun in one process, which has kept the clients' factors: go on with "
                "fedhl resume"
            )
        if self.done() or self.interrupted():
            self.wait(
                self.interrupted() or self.first, "it goes on", self.config.federation.deadline
            )
            self.wait(self.config.federation.minimum, "it goes on")
        else:
            self.wait(self.first, "the first round")
        self.prepared = prepared = self.prepare()
        self.ranks |= {client.id: client.rank for client in prepared.federation.clients}
        self.look_again()
        if resumed:
            with alone(self.folder):
                go_on(prepared, self.folder, self.watcher, self)
        else:
            begin(prepared, self.folder, self.watcher, self)
        shutil.rmtree(self.folder / "incoming", ignore_errors=True)
        return Result()

    def prepare(self) -> Prepared:
        """The server's model and rows, for the members that there are, or were when the run began."""
        members = {member.client: member for member in self.members.values()}
        if not self.own_data:
            return prepare(self.config, self.watcher)
        if (self.folder / "summary.json").exists():
            return prepare_server_again(self.config, read_summary(self.folder), self.watcher)
        ranks = {id: member.rank for id, member in members.items()}
        labels: set[str] = {name for one in members.values() for name in one.labels or ()}
        known = sorted_labels(labels) if labels else None
        return prepare_server(self.config, ranks, known, self.watcher)

    @property
    def own_data(self) -> bool:
        """Whether the clients bring their own rows."""
        return any(member.own for member in self.members.values())

    @cached_property
    def run_id(self) -> str:
        """What tells this run from all others, for as long as its folder is there."""
        file = self.folder / "run-id"
        if not file.exists():
            write_text(file, json.dumps({"run": secrets.token_hex(8)}) + "\n")
        return json.loads(file.read_text())["run"]

    # --- who is there ---------------------------------------------------------------------------

    def done(self) -> int:
        """How many rounds are done."""
        return max(rounds_in(self.folder / "state"), default=0)

    def interrupted(self) -> int:
        """How many clients were there when the round began that a restart has cut short."""
        file = self.incoming(self.done() + 1) / "clients.json"
        return len(json.loads(file.read_text("utf-8"))) if file.exists() else 0

    def wait(self, number: int, what: str, seconds: float = math.inf) -> None:
        """Until so many clients are there, or the time has passed."""
        told, end = monotonic() - PATIENCE, monotonic() + seconds
        while len(self.look()) < number and monotonic() < end:
            if monotonic() - told > PATIENCE:
                there = ", ".join(sorted(repr(m.client) for m in self.members.values())) or "none"
                self.watcher.say(f"waiting for {number} clients before {what}; there: {there}")
                told = monotonic()
            sleep(POLL)

    def look(self) -> dict[str, int]:
        """The nodes that are there by client id; newcomers are asked who they are."""
        nodes = set(self.grid.get_node_ids())
        # what one that has left would still say of itself is not true of who comes back
        for id in [id for id, node in self.asked.items() if node not in nodes]:
            del self.asked[id]
            self.pulling.pop(id, None)
        for node in self.told - nodes:
            self.told.discard(node)
            if gone := self.members.pop(node, None):
                self.watcher.say(f"client {gone.client!r} has left")
                # those who were refused may have been for its sake: its own machine, started again
                self.told &= {*self.members, *self.asked.values()}
        for node in sorted(nodes - self.told):
            hello = {"protocol": wire.PROTOCOL, "config": self.config.model_dump_json()}
            for id in self.push(Message(pack(hello), node, HELLO)):
                self.asked[id] = node
            self.told.add(node)

        def unreadable(id: str, reason: str) -> None:
            del self.asked[id]
            self.watcher.say(f"warning: a node was refused: {reason}")

        for message in self.pull(self.asked, unreadable):
            node = self.asked.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                continue  # not an answer, or a second one
            try:
                member = self.welcome(answer(message)[0])
            except Malformed as error:
                self.watcher.say(f"warning: a node was refused: {error}")
            else:
                self.members[node] = member
                self.watcher.say(
                    f"client {member.client!r} is here: rank {member.rank}, {member.examples} rows"
                )
        return {member.client: node for node, member in sorted(self.members.items())}

    def look_again(self) -> None:
        """Send away who does not fit the run, now that it is known: it may be an older one than they."""
        for node, member in list(self.members.items()):
            try:
                self.check(member)
            except Malformed as error:
                self.watcher.say(f"warning: a node was refused: {error}")
                del self.members[node]

    def welcome(self, header: Mapping[str, Any]) -> Member:
        """The member that this introduction is of. Raises Malformed, with the reason."""
        member = introduction(header)
        others = self.members.values()
        if any(member.client == other.client for other in others):
            raise Malformed(f"another node is client {member.client!r} already")
        if any(member.own != other.own for other in others):
            raise Malformed(
                f"client {member.client!r} has {'its own data' if member.own else 'no data of its own'}, "
                "the others not so"
            )
        self.check(member)
        return member

    def check(self, member: Member) -> None:
        """Raises Malformed unless the member fits the config, and the run if that has begun."""
        who = f"client {member.client!r}"
        if member.tokenizer != self.tokenizer:
            raise Malformed(f"{who} has another tokenizer than the server")
        if member.own and member.rank > self.config.federation.top_rank:
            raise Malformed(
                f"{who} has rank {member.rank}, expected at most {self.config.federation.top_rank} "
                "(federation.top_rank)"
            )
        if self.prepared is None:
            return
        if member.rank != self.ranks.get(member.client, member.rank):
            raise Malformed(
                f"{who} has rank {member.rank}, but began with {self.ranks[member.client]}; it must stay"
            )
        federation = self.prepared.federation
        if not member.own:
            rows = {client.id: client.examples for client in federation.clients}
            if member.client not in rows:
                raise Malformed(f"{who} has no part in the config's data")
            if member.examples != rows[member.client]:
                raise Malformed(
                    f"{who} has {member.examples} rows, the server makes {rows[member.client]} of the same "
                    "data"
                )
        if surplus := sorted(set(member.labels or ()) - set(self.prepared.data.labels or ())):
            raise Malformed(f"{who} has label {surplus[0]!r}, unknown when the run began")
        if member.rank != federation.top_rank and not federation.method.mixed_ranks:
            raise Malformed(
                f"{who} has rank {member.rank}, but {self.config.method.name} needs rank "
                f"{federation.top_rank} of every client"
            )
        if member.rank > federation.top_rank:
            raise Malformed(
                f"{who} has rank {member.rank}, expected at most {federation.top_rank}, the largest when "
                "the run began"
            )

    @cached_property
    def tokenizer(self) -> str:
        """The hash of what every client must tokenise with."""
        return tokenizer_hash(load_tokenizer(self.config.model.source, self.config.model.revision))

    def present(self, federation: Federation, round: int) -> Federation:
        """Those who are there now, or were when this round began, before a restart: whose reply had
        arrived then is not asked again."""
        file = self.incoming(round) / "clients.json"
        if not file.exists():
            if round > 1:  # for the first, `start` has waited
                self.wait(self.config.federation.minimum, f"round {round}")
            file.parent.mkdir(parents=True, exist_ok=True)
            there = sorted(self.members.values(), key=lambda member: member.client)
            found = [[member.client, member.rank, member.examples] for member in there]
            write_text(file, json.dumps(found) + "\n")
        known = {client.id: client for client in federation.clients}
        clients = []
        for id, rank, examples in json.loads(file.read_text("utf-8")):
            new = Client(
                id, rank, self.config.lora.scale_of(rank), 0, payload=self.config.wire.payload
            )
            clients.append(replace(known.get(id, new), examples=examples))
            self.ranks.setdefault(id, clients[-1].rank)
        return replace(federation, clients=clients)

    def incoming(self, round: int) -> Path:
        """Where the replies of a round are until they are in the state."""
        return self.folder / "incoming" / round_name(round)

    # --- a round --------------------------------------------------------------------------------

    def train(
        self,
        federation: Federation,
        state: ServerState,
        cohort: Sequence[Client],
        on_step: Callable[[], None],
    ) -> Returned:
        start = perf_counter()
        folder = self.incoming(state.round + 1)
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            if other != folder:  # in the state by now, or of a later round if its state was lost
                shutil.rmtree(other, ignore_errors=True)
        self.turn = turn = Turn(federation, state, cohort, folder)
        closed = folder / "closed.json"
        if closed.exists():
            turn.missing.update(json.loads(closed.read_text("utf-8")))
        asked = self.configure_train(turn.round, ArrayRecord(), ConfigRecord(), self.grid)
        self.exchange(asked, cohort, partial(self.aggregate_train, turn.round))
        # Its result may be sent, to be evaluated, before its checkpoint is on disk: a restart must come to
        # the same, or two sums with the same noise would have been sent.
        write_text(closed, json.dumps(turn.missing) + "\n")
        replies, kept = [], {}
        for client in cohort:
            if client.id not in turn.missing:
                try:
                    reply, own = turn.read(client, self.run)
                except Malformed as error:
                    turn.missing[client.id] = str(error)
                else:
                    replies.append(reply)
                    kept[client.id] = state.clients.get(client.id, {}) | own
        missing = [{"id": id, "reason": reason} for id, reason in sorted(turn.missing.items())]
        seconds = {"broadcast": 0.0, "train": perf_counter() - start}
        return Returned(replies, kept, missing, turn.traffic, seconds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What each client of the cohort is sent, but for those whose reply, or lack of one, was known before
        a restart."""
        turn = self.turn
        for client in turn.cohort:
            payload = self.encoded(turn, client)
            turn.traffic[client.id] = (len(payload), 0)
            if turn.file(client).exists():
                turn.came(client, turn.file(client).stat().st_size)
            elif client.id not in turn.missing:
                yield from self.message(TRAIN, client, payload)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Put what has arrived on disk. The sum is `fedhl.server.aggregate`'s, at the end of the round."""
        for message in replies:
            client = self.sent.pop(message.metadata.reply_to_message_id, None)
            if client is None:
                continue  # not an answer, or a second one
            try:
                header, payload = answer(message)
                self.turn.keep(client, header, payload, self.run)
            except Malformed as error:
                self.turn.missing[client.id] = str(error)
        return None, None

    def evaluate(self, federation: Federation, state: ServerState) -> dict[str, Metrics]:
        if not self.config.evaluation.client_fraction:
            return {}
        here = self.look()
        cohort = [as_now(c, state) for c in federation.clients if c.id in here]
        self.turn = Turn(federation, state, cohort, self.folder)
        asked = self.configure_evaluate(state.round, ArrayRecord(), ConfigRecord(), self.grid)
        self.exchange(asked, cohort, partial(self.aggregate_evaluate, state.round))
        for id, reason in sorted(self.turn.missing.items()):
            self.watcher.say(f"warning: client {id!r} has not evaluated: {reason}")
        return {id: self.turn.metrics[id] for id in sorted(self.turn.metrics)}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What each client would be sent in the next round, to evaluate it on its own rows."""
        for client in self.turn.cohort:
            yield from self.message(EVALUATE, client, self.encoded(self.turn, client))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Take down each client's metrics."""
        for message in replies:
            client = self.sent.pop(message.metadata.reply_to_message_id, None)
            if client is None:
                continue  # not an answer, or a second one
            try:
                self.turn.metrics[client.id] = metrics_of(answer(message)[0], self.config)
            except Malformed as error:
                self.turn.missing[client.id] = str(error)
        return None

    def summary(self) -> None:
        """What Flower logs about a strategy."""
        self.watcher.say(f"fedhl: {self.config.method.name}, {self.config.rounds} rounds")

    # --- messages -------------------------------------------------------------------------------

    @cached_property
    def run(self) -> wire.Run:
        """What both ends of a message must agree on."""
        assert self.prepared is not None
        loaded = self.prepared.loaded
        return wire.Run(self.run_id, loaded.hash, tokenizer_hash(loaded.tokenizer))

    def encoded(self, turn: Turn, client: Client) -> bytes:
        """What a client is sent, encoded once for all clients that are sent the same."""
        method, seed = turn.federation.method, self.config.seed
        drawn = getattr(method, "drawn", True)
        key = client.id if drawn else (client.rank, client.scale)
        if key not in turn.payloads:
            sent = server.broadcast(method, turn.state, client, seed)
            payload = wire.encode_broadcast({}, sent, turn.state.head, client.payload)
            if drawn:
                return payload
            turn.payloads[key] = payload
        return turn.payloads[key]

    def message(self, kind: str, client: Client, payload: bytes) -> Iterator[Message]:
        """The message to this client's node; none, and it is missing, if the node has left."""
        node = self.there.get(client.id)
        if node is None:
            self.turn.missing[client.id] = "its node has left"
            return
        assert self.prepared is not None
        header = {
            "protocol": wire.PROTOCOL,
            "config": self.config.model_dump_json(),
            "labels": self.prepared.data.labels,
            "run": self.run_id,
            "round": self.turn.state.round + (kind == TRAIN),
            "client": client.id,
            "rank": client.rank,
        }
        ttl = self.config.federation.deadline + GRACE
        yield Message(pack(header, payload), node, kind, ttl=ttl, group_id=str(self.turn.round))

    def exchange(
        self,
        messages: Iterable[Message],
        cohort: Sequence[Client],
        arrived: Callable[[Sequence[Message]], object],
    ) -> None:
        """Send these and hand over the replies as they come, until all are there, their nodes have left,
        or the deadline has passed."""
        end = monotonic() + self.config.federation.deadline
        self.there = self.look()
        nodes = {node: id for id, node in self.there.items()}
        by_id = {client.id: client for client in cohort}
        self.sent: dict[str, Client] = {}
        for message in messages:
            client = by_id[nodes[message.metadata.dst_node_id]]
            pushed = self.push(message)
            self.sent |= dict.fromkeys(pushed, client)
            if not pushed:
                self.turn.missing[client.id] = "Flower has not taken the message to it"

        def unreadable(id: str, reason: str) -> None:
            self.turn.missing[self.sent.pop(id).id] = reason

        while self.sent:
            began = monotonic()
            arrived(self.pull(self.sent, unreadable))
            self.there = self.look()
            late = monotonic() > end
            for id, client in list(self.sent.items()):
                if late or client.id not in self.there:
                    seconds = f"{self.config.federation.deadline:g} seconds (federation.deadline)"
                    reason = f"no reply within {seconds}" if late else "its node has left"
                    self.turn.missing[client.id] = reason
                    del self.sent[id]
                    self.pulling.pop(id, None)
            if self.sent:  # each client asked for costs Flower a request: not all of its time
                sleep(min(max(POLL, 2 * (monotonic() - began)), STALL))

    def push(self, message: Message) -> list[str]:
        """Send one message; its id."""
        return [id for id in self.grid.push_messages([message]) if id]

    def pull(
        self, messages: Iterable[str], unreadable: Callable[[str, str], None]
    ) -> list[Message]:
        """The replies to these messages that have come; `unreadable` is told of those that Flower has, but
        cannot read, with the reason.

        One by one, since Flower deletes a reply before it reads it, and raises what it meets there: one
        node's must not take others' with it. It also waits for the end of a node's upload, which may never
        come: such a reply is left to a thread of its own.
        """
        found: list[Message] = []
        end = monotonic() + STALL
        for id in list(messages):
            seconds = 0.0 if id in self.pulling else max(0.0, end - monotonic())
            reply = self.pulling.pop(id, None) or in_background(partial(self.pull_one, id))
            if not wait([reply], seconds).done:
                self.pulling[id] = reply
                continue
            error = reply.exception()
            if isinstance(error, httpx.HTTPError | MemoryError):  # no fault of the reply's
                raise error
            if error is not None:
                unreadable(id, f"Flower cannot read its reply: {one_line(repr(error))}")
            else:
                found += reply.result()
        return found

    def pull_one(self, id: str) -> list[Message]:
        return list(self.grid.pull_messages([id]))


def in_background(work: Callable[[], T]) -> Future[T]:
    """What comes of `work`, done by a thread that the end of the process does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def answer(message: Message) -> tuple[dict[str, Any], bytes | None]:
    """The header and payload of a reply. Raises Malformed, with the reason, if it is none."""
    if message.has_error() or not message.has_content():
        code, reason = (
            (message.error.code, message.error.reason) if message.has_error() else (0, "")
        )
        last = one_line((reason or "").strip().rpartition("\n")[2]) or "unknown"
        raise Malformed(f"its node reports an error ({code}): {last}")
    header, payload = unpack(message.content)
    if "error" in header:
        said = header["error"]
        raise Malformed(f"it says: {one_line(said) if isinstance(said, str) else shown(said)}")
    return header, payload


def one_line(text: str) -> str:
    """A client's text for our log and files: not endless, and without what a terminal would obey or no
    file can hold."""
    return "".join(c if c.isprintable() else " " for c in text[:500])


def introduction(header: Mapping[str, Any]) -> Member:
    """What a node says of itself, checked. Raises Malformed."""
    wire.check_protocol(header)
    kinds = {"client": str, "rank": int, "examples": int, "own": bool, "tokenizer": str}
    for name, kind in kinds.items():
        if type(header.get(name)) is not kind:
            raise Malformed(f"its {name} is {shown(header.get(name))}, expected {kind.__name__}")
    id, labels = header["client"], header.get("labels")
    if not (writable(id, NAME) and 0 < len(file_name(id)) <= NAME):
        raise Malformed(f"its client id {shown(id)} cannot be the name of a file")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    ):
        raise Malformed("its labels are not a list of texts")
    if len(labels or ()) > LABELS or not all(writable(name, LABEL) for name in labels or ()):
        raise Malformed(f"expected at most {LABELS:,} labels, each of at most {LABEL:,} characters")
    for name in ("rank", "examples"):
        if not 1 <= header[name] < WHOLE:
            raise Malformed(f"its {name} is {shown(header[name])}, expected 1 to 2^53")
    return Member(
        **{name: header[name] for name in kinds}, labels=None if labels is None else tuple(labels)
    )


def writable(text: str, length: int) -> bool:
    """Whether a text is short enough, and UTF-8 can say it: JSON has halves of characters, files not."""
    return len(text) <= length and not any("\ud800" <= c <= "\udfff" for c in text)


def metrics_of(header: Mapping[str, Any], config: Config) -> Metrics:
    """A client's metrics. Raises Malformed unless they are those of the task, and finite numbers."""
    metrics = header.get("metrics")
    loss, *others = config.task.metrics
    names = [loss, "examples", *others]
    if not isinstance(metrics, dict) or set(metrics) != set(names):
        raise Malformed(f"its metrics are {shown(metrics)}, expected {', '.join(names)}")
    for name, value in metrics.items():
        # so large a number is of no use, and may not even fit a float
        if type(value) not in (int, float) or not abs(value) < WHOLE:
            raise Malformed(f"its {name} is {shown(value)}, expected a number below 2^53")
    if not 0 <= metrics.get("accuracy", 0) <= 1:
        raise Malformed(f"its accuracy is {shown(metrics['accuracy'])}, expected 0 to 1")
    return metrics


def wanted(config: Config, nodes: int | None = None) -> int:
    """How many clients the first round waits for; of so many nodes, if that is known. Raises UserError for
    a config that cannot be served."""
    if config.tasks is not None:
        raise UserError(
            "tasks: labels that arrive over time are for runs in one process (fedhl run); leave tasks "
            "out for clients on other machines"
        )
    number = config.federation.clients or getattr(config.partition, "clients", nodes)
    if number is None:
        raise UserError("federation.clients: say how many clients the first round waits for")
    return number


def with_weighting(config: Config) -> Config:
    """The config as a run folder has it."""
    return config.model_copy(update={"weighting": config.weighting_used})
