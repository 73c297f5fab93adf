"""Clients that misbehave: fedhl's ClientApp, with what it returns spoilt. Runs in real client processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedhl.flower import client
from fedhl.flower.records import pack, unpack
from fedhl.network.message import opened, sealed

Parts = tuple[dict[str, Any], dict[str, Tensor]]


def missing(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, {name: x for name, x in tensors.items() if name != layer(tensors)}


def surplus(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, tensors | {"lora::bert.nowhere": torch.ones(2, 2)}


def shape(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, tensors | {layer(tensors): tensors[layer(tensors)][:, :-1]}


def rank(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, tensors | {layer(tensors): tensors[layer(tensors)][:-1]}


def scale(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"scale": header["scale"] * 2}, tensors


def not_finite(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, tensors | {layer(tensors): tensors[layer(tensors)] * torch.nan}


def huge(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header, tensors | {layer(tensors): tensors[layer(tensors)] * 1e30}


def stale(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"round": header["round"] - 1}, tensors


def another_sender(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"client": "client-99"}, tensors


def another_model(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"model": "0" * 64}, tensors


def another_tokenizer(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"tokenizer": "0" * 64}, tensors


def another_protocol(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"protocol": 999}, tensors


def another_start(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    return header | {"version": "0" * 64}, tensors


def layer(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.startswith("lora::"))


KINDS: list[tuple[Callable[..., Parts] | str, str]] = [
    # what is done to a reply, and what the server's reason says of it
    (missing, "is missing"),
    (surplus, "'lora::bert.nowhere' is not expected"),
    (shape, "expected F32 [{rank}, 64]"),
    (rank, "expected F32 [{rank}, 64]"),
    (scale, "its scale is"),
    (not_finite, "got a non-finite value"),
    (huge, "got an update that may be as large as"),
    (stale, "the reply is for round"),
    (another_sender, "its client id is 'client-99', expected '{id}'"),
    (another_model, "its base model is '000"),
    (another_tokenizer, "its tokenizer is '000"),
    (another_protocol, "it has protocol version 999, expected version 3"),
    (another_start, "its client holds version 000000000000, expected version"),
    ("damaged", "it does not match its own checksum"),
    ("garbage", "it is not a safetensors file"),
    ("nothing", "its reply has no payload"),
    ("crash", "its node reports an error"),
]


def spoilt(reply: Message, kind: Callable[..., Parts] | str) -> Any:
    """The content of `reply`, spoilt in this way."""
    header, payload = unpack(reply.content)
    assert payload is not None
    if kind == "crash":
        raise RuntimeError("this client has crashed")
    if kind == "nothing":
        return pack(header)
    if kind == "garbage":
        return pack(header, b"abc")
    if kind == "damaged":
        return pack(header, payload[:-1] + bytes([payload[-1] ^ 1]))
    assert callable(kind)
    parts = opened(payload)
    tensors = {name: parts[name] for name in parts.tensors}
    return pack(header, sealed(*kind(dict(parts.header), tensors)))


# Each of the first clients spoils every reply in a way of its own; of the others, three in ten drop out of
# every round.

MALLORIES = {f"client-{k:02d}": kind for k, kind in enumerate(KINDS)}

unreliable = ClientApp()
unreliable.query()(client.hello)


def drops(id: str, round: int) -> bool:
    """Whether this client drops out of this round: 3 chances in 10, drawn from a hash."""
    drawn = hashlib.sha256(f"{id} {round}".encode()).digest()[0]
    return id not in MALLORIES and drawn < 0.3 * 256


@unreliable.train()
def train_unreliable(message: Message, context: Context) -> Message:
    asked, _ = unpack(message.content)
    if drops(asked["client"], asked["round"]):
        raise ConnectionError("lost on the way")
    reply = client.train(message, context)
    if asked["client"] in MALLORIES:
        kind, _ = MALLORIES[asked["client"]]
        return Message(spoilt(reply, kind), reply_to=message)
    return reply


# In the rounds of $SLOW, "CLIENT:ROUND,...", a client does not answer before the folder $GO has a file of the
# name "CLIENT:ROUND".

slow = ClientApp()
slow.query()(client.hello)


@slow.train()
def train_slow(message: Message, context: Context) -> Message:
    asked, _ = unpack(message.content)
    turn = f"{asked['client']}:{asked['round']}"
    while turn in os.environ["SLOW"].split(",") and not Path(os.environ["GO"], turn).exists():
        sleep(0.1)
    return client.train(message, context)
