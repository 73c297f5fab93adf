"""A run whose clients are at the other end of Flower's grid: the engine of its rounds, and the whole run.

Flower's own strategies neither checkpoint nor resume. So the loop of the rounds is the one of
`fedhl.run.loop`, and Flower only carries the messages.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, TypeVar

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedhl import server
from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.engine import Returned
from fedhl.federation.federation import Federation, at_current_rank
from fedhl.federation.first_look import check_config, clients_keep
from fedhl.federation.personal import Personal
from fedhl.federation.prepare import (
    Prepared,
    prepare,
    prepare_server,
    prepare_server_again,
)
from fedhl.federation.scores import STAGES
from fedhl.files import write_text
from fedhl.flower.incoming import Incoming, clients_interrupted, remove_incoming, rounds_done
from fedhl.flower.mailbox import Mailbox, pause
from fedhl.flower.records import EVALUATE, PERSONAL, TRAIN, pack
from fedhl.flower.roster import Roster
from fedhl.method import Broadcast, SelfPruning
from fedhl.model.evaluation import Metrics
from fedhl.model.processors import processor_hash
from fedhl.network import wire
from fedhl.network.message import WHOLE, Malformed, shown
from fedhl.record import read_summary
from fedhl.run.folder import alone, load_run_config, networked, refuse_taken, same_settings
from fedhl.run.loop import resume_prepared, start_prepared
from fedhl.server import Client, Reply, ServerState
from fedhl.task.labels import sorted_labels
from fedhl.watch import Watcher

T = TypeVar("T")

GRACE = 60.0
"""Seconds that Flower keeps a message beyond the deadline, so that our deadline is the first to pass."""


def serve(config: Config, folder: Path, grid: Grid, needed: int, watcher: Watcher) -> None:
    """Wait for the clients, then do all remaining rounds of the run in `folder`, a new one if there is none
    yet; without the report. `needed`: the number of clients for which the first round waits."""
    check_config(config)
    resumed = (folder / "config.yaml").exists()
    if resumed:
        check_same_run(config, folder)
    else:
        refuse_taken(folder)
    mailbox = Mailbox(grid)
    roster = Roster(config, mailbox, watcher)
    there = clients_interrupted(folder)
    if rounds_done(folder) or there:
        roster.wait(there or needed, "it goes on", config.federation.deadline)
        roster.wait(config.federation.minimum, "it goes on")
    else:
        roster.wait(needed, "the first round")
    prepared = prepare_for(config, roster, folder, watcher)
    roster.begin(prepared)
    engine = OverNetwork(prepared, folder, mailbox, roster, watcher)
    if resumed:
        with alone(folder):
            resume_prepared(prepared, folder, watcher, engine)
    else:
        start_prepared(prepared, folder, watcher, engine)
    remove_incoming(folder)


def check_same_run(config: Config, folder: Path) -> None:
    """Raises UserError unless the run in `folder` has this config and can continue over the network."""
    given = config.model_copy(update={"weighting": config.weighting_used})
    if not same_settings(load_run_config(folder), given):
        raise UserError(f"{folder} holds a run of another config; choose another folder")
    if rounds_done(folder) and not networked(folder) and clients_keep(config):
        raise UserError(
            f"{folder} was begun in one process, which has kept the clients' factors; continue it with "
            "fedhl resume"
        )


def prepare_for(config: Config, roster: Roster, folder: Path, watcher: Watcher) -> Prepared:
    """The server's model and rows, for the clients that are connected, or were when the run began."""
    if not roster.own_data:
        return prepare(config, watcher)
    if (folder / "summary.json").exists():
        return prepare_server_again(config, read_summary(folder), watcher)
    members = roster.members.values()
    ranks = {member.client: member.rank for member in members}
    labels = {name for member in members for name in member.labels or ()}
    return prepare_server(config, ranks, sorted_labels(labels) if labels else None, watcher)


def run_id(folder: Path) -> str:
    """The id of the run in this folder, which no other run has; it stays as long as the folder does."""
    file = folder / "run-id"
    if not file.exists():
        write_text(file, json.dumps({"run": secrets.token_hex(8)}) + "\n")
    return json.loads(file.read_text())["run"]


@dataclass
class Turn:
    """One request to the clients: of this `kind`, for this federation and state.

    `missing`: the clients without an accepted reply, by client id, and the reason; `forgotten`: the clients
    that have lost what they held; `payloads`: the broadcasts encoded so far.
    """

    kind: str
    federation: Federation
    state: ServerState
    missing: dict[str, str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    payloads: dict[Any, bytes] = field(default_factory=dict)

    def forget(self, clients: Collection[str]) -> None:
        """These clients begin the round as newcomers."""
        self.forgotten |= set(clients)
        self.state = server.forget(self.state, clients)


@dataclass(frozen=True)
class OverNetwork:
    """The engine whose clients are on other machines, as Flower's nodes."""

    prepared: Prepared
    folder: Path
    mailbox: Mailbox
    roster: Roster
    watcher: Watcher

    @property
    def config(self) -> Config:
        return self.prepared.config

    @cached_property
    def run(self) -> wire.Run:
        """The facts on which both ends of a message must agree."""
        loaded = self.prepared.loaded
        return wire.Run(run_id(self.folder), loaded.hash, processor_hash(loaded.processor))

    def present(self, federation: Federation, round: int) -> Federation:
        """The federation with the clients that are connected now, or were when this round began before a
        restart: a reply that had arrived then is not asked for again."""
        incoming = Incoming(self.folder, round)
        found = incoming.clients()
        if found is None:
            if round > 1:  # for the first, `serve` has waited
                self.roster.wait(self.config.federation.minimum, f"round {round}")
            there = sorted(self.roster.members.values(), key=lambda member: member.client)
            found = [(member.client, member.rank, member.examples) for member in there]
            incoming.begin(found)
        known = {client.id: client for client in federation.clients}
        clients = []
        for id, rank, examples in found:
            scale, travels = self.config.lora.scale_of(rank), self.config.wire
            new = Client(id, rank, scale, 0, payload=travels.payload, download=travels.download)
            client = known.get(id, new)
            clients.append(replace(client, examples=examples))
        self.roster.enter(clients)
        return replace(federation, clients=clients)

    def train(
        self,
        federation: Federation,
        state: ServerState,
        cohort: Sequence[Client],
        on_step: Callable[[], None],
    ) -> Returned:
        """Send the cohort its broadcasts, put the replies on disk as they arrive, and read them when the
        round is closed."""
        start = perf_counter()
        incoming = Incoming(self.folder, state.round + 1)
        incoming.remove_others()
        turn = Turn(TRAIN, federation, state, incoming.closed())
        turn.forget(incoming.forgotten(cohort))
        traffic: dict[str, tuple[int, int]] = {}

        def unanswered() -> Iterator[tuple[Client, bytes]]:
            for client in cohort:
                payload = self.encode(turn, client)
                traffic[client.id] = (len(payload), incoming.size(client))
                # a reply, or the lack of one, may be known from before a restart
                if not incoming.file(client).exists() and client.id not in turn.missing:
                    yield client, payload

        def accept(
            client: Client, header: Mapping[str, Any], payload: bytes | None
        ) -> bytes | None:
            down, up = traffic[client.id]
            if "forgotten" in header:
                if turn.state.ledger.version(client.id) is None:
                    raise Malformed("it says that it has lost what it was never sent")
                self.watcher.say(
                    f"client {client.id!r} has lost what it was sent before; it begins again"
                )
                incoming.forget(client)
                turn.forget([client.id])
                again = self.encode(turn, client)
                traffic[client.id] = (down + len(again), up)
                return again
            traffic[client.id] = (down, len(payload or b""))
            # a reply has nothing that its client was not sent, but for a header of its own
            limit = down + sum(wire.limit([], (*self.run, client.id)))
            least_rank = 1 if isinstance(federation.method, SelfPruning) else client.rank
            incoming.keep(client, header, payload, limit, least_rank)
            return None

        self.exchange(turn, unanswered(), accept)
        incoming.close(turn.missing)
        replies, kept = [], {}
        for client in cohort:
            if client.id not in turn.missing:
                try:
                    replies.append(self.read(turn, incoming, client))
                except Malformed as error:
                    turn.missing[client.id] = str(error)
                else:
                    kept[client.id] = state.clients.get(client.id, {}) | rank_left(incoming, client)
        missing = [{"id": id, "reason": reason} for id, reason in sorted(turn.missing.items())]
        seconds = {"broadcast": 0.0, "train": perf_counter() - start}
        return Returned(replies, kept, missing, traffic, seconds, frozenset(turn.forgotten))

    def evaluate(self, federation: Federation, state: ServerState) -> dict[str, Metrics]:
        """The metrics of each connected client, with the broadcast of the next round, on its own held-out
        rows."""
        if not self.config.evaluation.client_fraction:
            return {}
        turn = Turn(EVALUATE, federation, state)
        found = self.ask(turn, lambda header: metrics_of(header.get("metrics"), self.config))
        for id, reason in sorted(turn.missing.items()):
            self.watcher.say(f"warning: client {id!r} did not evaluate: {reason}")
        return found

    def personal(
        self, federation: Federation, state: ServerState, watcher: Watcher
    ) -> Iterator[tuple[Client, Personal | None, dict[str, Any]]]:
        """The record of each connected client's personal model, which stays with the client."""
        turn = Turn(PERSONAL, federation, state)
        watcher.say("personal models: each client goes on alone, on its own machine")
        found = self.ask(turn, lambda header: record_of(header.get("record"), self.config))
        for id, reason in sorted(turn.missing.items()):
            watcher.say(f"warning: client {id!r} has no personal model: {reason}")
        clients = {client.id: client for client in federation.clients}
        yield from ((clients[id], None, record) for id, record in found.items())

    def ask(self, turn: Turn, read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
        """Send each connected client the broadcast of the next round, and `read` the headers of the replies;
        by client id, sorted."""
        here = self.roster.look()
        cohort = [
            at_current_rank(client, turn.state)
            for client in turn.federation.clients
            if client.id in here
        ]
        found: dict[str, T] = {}

        def accept(client: Client, header: Mapping[str, Any], payload: bytes | None) -> None:
            found[client.id] = read(header)

        self.exchange(turn, ((client, self.encode(turn, client)) for client in cohort), accept)
        return {id: found[id] for id in sorted(found)}

    def exchange(
        self,
        turn: Turn,
        payloads: Iterable[tuple[Client, bytes]],
        accept: Callable[[Client, Mapping[str, Any], bytes | None], bytes | None],
    ) -> None:
        """Send each client its payload, and give the replies to `accept` as they arrive, until all are here,
        the other nodes have left, or the deadline has passed. `accept` may return a payload to send next.
        `turn.missing` gets each client without an accepted reply, and the reason."""
        deadline = self.config.federation.deadline
        end = monotonic() + deadline
        nodes = self.roster.look()
        sent: dict[str, Client] = {}

        def send(client: Client, payload: bytes) -> None:
            if client.id not in nodes:
                turn.missing[client.id] = "its node has left"
                return
            id = self.mailbox.push(self.message(turn, client, nodes[client.id], payload))
            if id is None:
                turn.missing[client.id] = "Flower did not accept the message to its node"
            else:
                sent[id] = client

        def heard(client: Client, header: Mapping[str, Any], payload: bytes | None) -> None:
            again = accept(client, header, payload)
            if again is not None:
                send(client, again)

        for client, payload in payloads:
            send(client, payload)

        def refuse(client: Client, reason: str) -> None:
            turn.missing[client.id] = reason

        while sent:
            began = monotonic()
            self.mailbox.collect(sent, heard, refuse)
            nodes = self.roster.look()
            late = monotonic() > end
            silent = f"no reply within {deadline:g} seconds (federation.deadline)"
            for id, client in list(sent.items()):
                if late or client.id not in nodes:
                    refuse(client, silent if late else "its node has left")
                    del sent[id]
                    self.mailbox.forget(id)
            if sent:
                pause(monotonic() - began)

    def encode(self, turn: Turn, client: Client) -> bytes:
        """The broadcast to a client as a payload; it is encoded once for all clients that are sent the
        same."""
        method, seed, state = turn.federation.method, self.config.seed, turn.state
        version = state.ledger.version(client.id)
        key = client.id if method.per_client else (client.rank, client.scale, version)
        if key not in turn.payloads:
            sent = server.travelling(method, state, client, seed)
            payload = wire.encode_broadcast({}, sent, state.head, client.downloaded, version)
            if method.per_client:
                return payload
            turn.payloads[key] = payload
        return turn.payloads[key]

    def message(self, turn: Turn, client: Client, node: int, payload: bytes) -> Message:
        """The message to a client's node."""
        header = {
            "protocol": wire.PROTOCOL,
            "config": self.config.model_dump_json(),
            "labels": self.prepared.data.labels,
            "run": self.run.run,
            "round": turn.state.round + (turn.kind == TRAIN),
            "client": client.id,
            "rank": client.rank,
        }
        if turn.kind == PERSONAL:
            header["clients"] = len(turn.federation.clients)
        content = pack(header, payload)
        ttl, round = self.config.federation.deadline + GRACE, turn.state.round + 1
        return Message(content, node, turn.kind, ttl=ttl, group_id=str(round))

    def read(self, turn: Turn, incoming: Incoming, client: Client) -> Reply:
        """The reply of a client, from the disk. Raises Malformed, with the reason."""
        method, state, seed = turn.federation.method, turn.state, self.config.seed

        def sent(layer: str) -> Broadcast:
            return server.broadcast_layer(method, state, layer, client, seed)

        file = incoming.file(client)
        return wire.read_reply(file, self.run, client, list(state.layers), sent, state.head)


def rank_left(incoming: Incoming, client: Client) -> dict[str, Tensor]:
    """A client's rank for the next round, as the state keeps it; {} if the client has pruned nothing."""
    rank = incoming.rank(client)
    return {"rank": torch.tensor(rank)} if rank < client.rank else {}


def record_of(record: Any, config: Config) -> dict[str, Any]:
    """The record of a personal model. Raises Malformed unless it is what `fedhl.federation.personal` says, of
    numbers; those of a training that has diverged may be no finite ones."""
    names = ["steps", "loss", *STAGES]
    if not isinstance(record, dict) or set(record) != set(names):
        raise Malformed(f"its record is {shown(record)}, expected {', '.join(names)}")
    steps, loss = record["steps"], record["loss"]
    if type(steps) is not int or not 1 <= steps < WHOLE:
        raise Malformed(f"its steps are {shown(steps)}, expected 1 to 2^53")
    if type(loss) not in (int, float) or (abs(loss) >= WHOLE and loss != math.inf):
        raise Malformed(f"its training loss is {shown(loss)}, expected a number below 2^53")
    metrics_of(record["global"], config)
    metrics_of(record["personal"], config, finite=False)
    return record


def metrics_of(metrics: Any, config: Config, *, finite: bool = True) -> Metrics:
    """A client's metrics. Raises Malformed unless they are the metrics of the task, and numbers, which are
    `finite` or not."""
    loss, *others = config.task.metrics
    names = [loss, "examples", *others]
    if not isinstance(metrics, dict) or set(metrics) != set(names):
        raise Malformed(f"its metrics are {shown(metrics)}, expected {', '.join(names)}")
    for name, value in metrics.items():
        # so large a number is of no use, and may not even fit a float
        diverged = not finite and name != "examples"
        if diverged and type(value) is float and not math.isfinite(value):
            continue
        if type(value) not in (int, float) or not abs(value) < WHOLE:
            raise Malformed(f"its {name} is {shown(value)}, expected a number below 2^53")
    for name in config.task.units:
        if math.isfinite(metrics[name]) and not 0 <= metrics[name] <= 1:
            raise Malformed(f"its {name} is {shown(metrics[name])}, expected 0 to 1")
    if not metrics["examples"] >= 1:
        raise Malformed(f"its examples are {shown(metrics['examples'])}, expected at least 1")
    return metrics
