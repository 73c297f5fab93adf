"""Flower's ClientApp: passes each message to `fedhl.network`, and the answer back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from fedhl.config import Config
from fedhl.config.text import explain
from fedhl.errors import UserError
from fedhl.flower.records import PERSONAL, pack, unpack
from fedhl.network import node, wire
from fedhl.network.message import Malformed
from fedhl.network.node import Node

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """The node's introduction: its client, the number of its rows, its rank."""

    def answer(config: Config, here: Node, header: dict[str, Any], payload: bytes | None) -> Any:
        return pack(node.introduce(config, here))

    return reply(message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""

    def answer(config: Config, here: Node, header: dict[str, Any], payload: bytes | None) -> Any:
        # only now: what is imported for training takes longer than an introduction
        from fedhl.network import participant

        return pack(*participant.train(config, here, header, payload or b"", simulated(context)))

    return reply(message, context, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The metrics of the client's next start on its own held-out rows."""

    def answer(config: Config, here: Node, header: dict[str, Any], payload: bytes | None) -> Any:
        from fedhl.network import participant

        metrics = participant.evaluate(config, here, header, payload or b"", simulated(context))
        return pack({"metrics": metrics})

    return reply(message, context, answer)


@app.train(PERSONAL.partition(".")[2])
def personalise(message: Message, context: Context) -> Message:
    """The record of the client's personal model, which stays where it is."""

    def answer(config: Config, here: Node, header: dict[str, Any], payload: bytes | None) -> Any:
        from fedhl.network import participant

        record = participant.personalise(config, here, header, payload or b"", simulated(context))
        return pack({"record": record})

    return reply(message, context, answer)


def simulated(context: Context) -> bool:
    """Whether this node is simulated by Flower, in a process that serves all nodes."""
    return "client" not in context.node_config


def reply(message: Message, context: Context, answer: Callable[..., Any]) -> Message:
    """The answer; if there is none, the reason, for the server's log."""
    try:
        header, payload = unpack(message.content)
        wire.check_protocol(header)  # before anything whose meaning depends on it
        if not isinstance(header.get("config"), str):
            raise Malformed("it has no readable config")
        config = Config.model_validate_json(header["config"])
        here = node.node_of(context.node_config, config)
        content = answer(config, here, header, payload)
    except (UserError, Malformed) as error:
        content = pack({"error": str(error)})
    except ValidationError as error:
        content = pack({"error": f"it cannot read the config: {explain(error)}"})
    return Message(content, reply_to=message)
