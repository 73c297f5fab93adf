"""Flower's grid in this process: fedhl's ClientApp answers when its reply is pulled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedhl.flower import client

Answers = list[Message]


def as_it_is(node: int, message: Message, reply: Message) -> Answers:
    """Every node gives the one answer that it has."""
    return [reply]


class InProcessGrid(Grid):
    """`nodes`: the node config of each node that is there; `between`: what becomes of a reply."""

    def __init__(
        self,
        nodes: Mapping[int, dict[str, Any]],
        between: Callable[[int, Message, Message], Answers] = as_it_is,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        self.nodes, self.between = dict(nodes), between
        self.number = 0
        self.asked: list[tuple[int, str]] = []
        self.meant: dict[str, tuple[int, str]] = {}  # for whom each message is, and of which type
        self.waiting: dict[str, Answers] = {}
        self.deaf: set[int] = set()  # nodes that Flower takes no message for

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node in self.deaf:
            return ""
        self.number += 1
        message.metadata.__dict__["_message_id"] = id = f"message-{self.number}"
        self.meant[id] = node, message.metadata.message_type
        self.asked.append(self.meant[id])
        self.waiting[id] = self.answer(message)  # here, since a pull may be in another thread
        return id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for id in message_ids for reply in self.waiting.pop(id, [])]

    def answer(self, message: Message) -> Answers:
        node = message.metadata.dst_node_id
        try:
            reply = client.app(message, Context(1, node, self.nodes[node], RecordDict(), {}))
        except Exception as error:  # as Flower's processes do
            reply = Message(Error(2, str(error)), reply_to=message)
        return self.between(node, message, reply)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError("a message is made by its own class")

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("there is one run")

    @property
    def run(self) -> Run:
        raise NotImplementedError("there is one run")
