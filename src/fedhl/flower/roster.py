"""The connected clients: each node introduces itself, and becomes a member if it fits the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import Any

from flwr.app import Message

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.prepare import Prepared
from fedhl.files import file_name
from fedhl.flower.mailbox import Mailbox, pause
from fedhl.flower.records import HELLO, pack
from fedhl.model.processors import load_processor, processor_hash
from fedhl.names import listed, one_line
from fedhl.network import wire
from fedhl.network.message import WHOLE, Malformed, shown
from fedhl.server import Client
from fedhl.watch import Watcher

PATIENCE = 30.0
"""Seconds between two notices that the run waits for clients."""
NAME = 200
"""Characters of a client's id as a file name: with our endings they stay below a file system's 255."""
LABELS, LABEL = 10_000, 1_000
"""The most labels of a client, and characters of a label: every label is a row of every client's head."""


@dataclass(frozen=True)
class Member:
    """A node's introduction."""

    client: str
    rank: int
    examples: int
    labels: tuple[str, ...] | None
    own: bool
    tokenizer: str


class Roster:
    """The members, each with its node, as nodes come and go.

    `prepared`: the run that members must fit, once it is known; `ranks`: the rank with which each client
    that has taken part in it began.
    """

    def __init__(self, config: Config, mailbox: Mailbox, watcher: Watcher) -> None:
        self.config, self.mailbox, self.watcher = config, mailbox, watcher
        self.members: dict[int, Member] = {}  # by node
        self.greeted: set[int] = set()  # nodes that were asked to introduce themselves
        self.asked: dict[str, int] = {}  # by message: nodes that have not done so yet
        self.prepared: Prepared | None = None
        self.ranks: dict[str, int] = {}

    @property
    def own_data(self) -> bool:
        """Whether the clients bring their own rows."""
        return any(member.own for member in self.members.values())

    @cached_property
    def tokenizer(self) -> str:
        """The hash of the tokenizer that every client must have."""
        model = self.config.model
        return processor_hash(load_processor(model.source, self.config.task.kind, model.revision))

    def wait(self, number: int, what: str, seconds: float = math.inf) -> None:
        """Wait until this number of clients is connected, or the time has passed. `what`: the next step, for
        the notices."""
        noticed, end = monotonic() - PATIENCE, monotonic() + seconds
        while len(self.look()) < number and monotonic() < end:
            if monotonic() - noticed > PATIENCE:
                there = listed(sorted(repr(m.client) for m in self.members.values())) or "none"
                self.watcher.say(f"waiting for {number} clients before {what}; connected: {there}")
                noticed = monotonic()
            pause()

    def look(self) -> dict[str, int]:
        """The node of each connected client, by client id; new nodes are asked to introduce themselves."""
        nodes = self.mailbox.nodes()
        self.strike_out(nodes)
        for node in sorted(nodes - self.greeted):
            hello = {"protocol": wire.PROTOCOL, "config": self.config.model_dump_json()}
            id = self.mailbox.push(Message(pack(hello), node, HELLO))
            if id is not None:
                self.asked[id] = node
            self.greeted.add(node)
        self.mailbox.collect(self.asked, self.accept, self.refuse)
        return {member.client: node for node, member in sorted(self.members.items())}

    def strike_out(self, nodes: set[int]) -> None:
        """Remove every node that is not among `nodes`: it has left."""
        # its introduction, if it still comes, need not be true of the node that comes back
        for id in [id for id, node in self.asked.items() if node not in nodes]:
            del self.asked[id]
            self.mailbox.forget(id)
        for node in self.greeted - nodes:
            self.greeted.discard(node)
            if gone := self.members.pop(node, None):
                self.watcher.say(f"client {gone.client!r} has left")
                # a node may have been refused for its sake: its own machine, started again
                self.greeted &= {*self.members, *self.asked.values()}

    def accept(self, node: int, header: Mapping[str, Any], payload: bytes | None) -> None:
        """Make the node a member. Raises Malformed if its introduction cannot be accepted."""
        self.members[node] = member = self.welcome(header)
        self.watcher.say(
            f"client {member.client!r} has joined: rank {member.rank}, {member.examples} rows"
        )

    def refuse(self, node: int, reason: str) -> None:
        """Refuse the node, which is not asked again."""
        self.watcher.say(f"warning: a node was refused: {reason}")

    def welcome(self, header: Mapping[str, Any]) -> Member:
        """The member with this introduction. Raises Malformed, with the reason."""
        member = introduction(header)
        others = self.members.values()
        if any(member.client == other.client for other in others):
            raise Malformed(f"client {member.client!r} is connected already, from another node")
        if any(member.own != other.own for other in others):
            raise Malformed(
                f"client {member.client!r} has {'its own data' if member.own else 'no data of its own'}, "
                "unlike the other clients; all must have their own data, or none"
            )
        self.check(member)
        return member

    def check(self, member: Member) -> None:
        """Raises Malformed unless the member fits the config, and the run once that is known."""
        who = f"client {member.client!r}"
        if member.tokenizer != self.tokenizer:
            raise Malformed(
                f"{who} has another tokenizer than the server; give both the same model"
            )
        if member.own and member.rank > self.config.federation.top_rank:
            raise Malformed(
                f"{who} has rank {member.rank}, expected at most {self.config.federation.top_rank} "
                "(federation.top_rank)"
            )
        if member.own and member.examples > self.config.federation.max_rows:
            raise Malformed(
                f"{who} reports {member.examples:,} rows, expected at most "
                f"{self.config.federation.max_rows:,} (federation.max_rows)"
            )
        if self.prepared is not None:
            check_run(member, self.prepared, self.ranks)

    def begin(self, prepared: Prepared) -> None:
        """Require that members fit this run, and refuse the members that do not."""
        self.prepared = prepared
        self.enter(prepared.federation.clients)
        self.look_again()

    def look_again(self) -> None:
        """Refuse the members that do not fit the run, which may be known only after their introduction."""
        for node, member in list(self.members.items()):
            try:
                self.check(member)
            except Malformed as error:
                self.refuse(node, str(error))
                del self.members[node]

    def enter(self, clients: Iterable[Client]) -> None:
        """Record the ranks of the clients that take part for the first time."""
        for client in clients:
            self.ranks.setdefault(client.id, client.rank)


def check_run(member: Member, prepared: Prepared, ranks: Mapping[str, int]) -> None:
    """Raises Malformed unless the member fits the run. `ranks`: the first rank of each of the run's
    clients."""
    who, federation = f"client {member.client!r}", prepared.federation
    if member.rank != ranks.get(member.client, member.rank):
        raise Malformed(
            f"{who} has rank {member.rank}, expected rank {ranks[member.client]}, with which it began"
        )
    if not member.own:
        rows = {client.id: client.examples for client in federation.clients}
        if member.client not in rows:
            raise Malformed(f"{who} is not a client of the config's partition")
        if member.examples != rows[member.client]:
            raise Malformed(
                f"{who} has {member.examples} rows, expected {rows[member.client]}, the server's number; "
                "give both the same data"
            )
    if surplus := sorted(set(member.labels or ()) - set(prepared.data.labels or ())):
        raise Malformed(f"{who} has label {surplus[0]!r}, which no client had when the run began")
    if member.rank != federation.top_rank and not federation.method.mixed_ranks:
        raise Malformed(
            f"{who} has rank {member.rank}, but {prepared.config.method.name} needs rank "
            f"{federation.top_rank} of every client"
        )
    if member.rank > federation.top_rank:
        raise Malformed(
            f"{who} has rank {member.rank}, expected at most {federation.top_rank}, the top rank "
            "when the run began"
        )


def introduction(header: Mapping[str, Any]) -> Member:
    """A node's introduction, checked. Raises Malformed, with the reason."""
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
        raise Malformed("its labels must be a list of texts")
    if len(labels or ()) > LABELS or not all(writable(name, LABEL) for name in labels or ()):
        raise Malformed(
            f"its labels are too many or too long, expected at most {LABELS:,} labels, each of "
            f"at most {LABEL:,} characters"
        )
    for name in ("rank", "examples"):
        if not 1 <= header[name] < WHOLE:
            raise Malformed(f"its {name} is {shown(header[name])}, expected 1 to 2^53")
    return Member(
        **{name: header[name] for name in kinds}, labels=None if labels is None else tuple(labels)
    )


def writable(text: str, length: int) -> bool:
    """Whether a text is short enough, and one that can be printed and written."""
    return len(text) <= length and one_line(text)


def clients_needed(config: Config, nodes: int | None = None) -> int:
    """The number of clients for which the first round waits; `nodes`: the number of nodes, if it is known.
    Raises UserError for a config that cannot be served."""
    if config.tasks is not None:
        raise UserError(
            "tasks: labels that arrive over time need all clients in one process (fedhl run); leave tasks "
            "out for clients on other machines"
        )
    for name, given in (
        ("participation.only", config.participation.only),
        ("participation.pooled", config.participation.pooled),
    ):
        if given:
            raise UserError(
                f"{name} needs all rows in one process (fedhl run, fedhl compare); leave it out for clients "
                "on other machines"
            )
    number = config.federation.clients or getattr(config.partition, "clients", nodes)
    if number is None:
        raise UserError(
            "federation.clients is missing: give the number of clients for which the first round waits"
        )
    return number
