"""A server of three small layers, four clients, and what the clients reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedhl import get_method, get_weighting, server
from fedhl.lora import LoRA, initial
from fedhl.method import flatten, remembers
from fedhl.seeds import generator
from fedhl.server import Client, Outcome, Reply, ServerState
from fedhl.server.ledger import next_version

SEED = 3
TOP = 6
SHAPES = {"block.0.query": (13, 9), "block.0.value": (7, 11), "block.1.query": (9, 8)}
HEAD = {"classifier.weight": (3, 7), "classifier.bias": (3,)}
CLIENTS = [
    Client("ada", 2, 4.0, 30),
    Client("bob", 6, 4 / 3, 10),
    Client("cyd", 4, 2.0, 60),
    Client("dan", 2, 0.7, 25),
]
OF_RANK_4 = [replace(client, rank=4, scale=2.0) for client in CLIENTS]
FEDHL = get_method("fedhl")
TRUNCATION = get_weighting("truncation", power=1, epsilon=0.1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape))


def reply(
    state: ServerState, client: Client, method: Any = FEDHL, step: float = 0.1, seed: int = 0
) -> Reply:
    """What a client returns whose training moved everything at random."""
    sent = server.broadcast(method, state, client, SEED)
    k = sum(client.id.encode()) + 1000 * state.round + 7 * seed
    adapter = {
        name: LoRA(
            b.lora.A + step * draw(k, *b.lora.A.shape),
            b.lora.B + step * draw(k + 1, *b.lora.B.shape),
            client.scale,
        )
        for name, b in sent.items()
    }
    head = {name: t + step * draw(k + 2, *t.shape) for name, t in state.head.items()}
    version = holds(method, state, client)
    return Reply(client, state.round + 1, adapter, head, loss=0.5, steps=3, version=version)


def holds(method: Any, state: ServerState, client: Client) -> str | None:
    """The version that a client holds once it has received its broadcast."""
    sent = server.travelling(method, state, client, SEED)
    return next_version(state.ledger.version(client.id), sent) if remembers(method) else None


def play(
    state: ServerState, replies: Sequence[Reply], method: Any = FEDHL, weighting: Any = TRUNCATION
) -> tuple[ServerState, Outcome]:
    return server.aggregate(method, weighting, state, replies, SEED)


def start(method: Any = FEDHL, top: int = TOP, scale: float = 1.0) -> ServerState:
    adapter = {name: initial(m, n, top, scale, seed=0) for name, (m, n) in SHAPES.items()}
    return server.init(method, adapter, {n: draw(9, *shape) for n, shape in HEAD.items()}, SEED)


def begun() -> ServerState:
    """After two rounds of everybody, so that W has more rank than anyone is sent."""
    state = start()
    for _ in range(2):
        state, _ = play(state, [reply(state, client) for client in CLIENTS])
    return state


def exact(lora: LoRA) -> Tensor:
    return lora.scale * lora.B.double() @ lora.A.double()


def tensors(state: ServerState) -> dict[str, Tensor]:
    layers = {f"{n}/{k}": t for n, s in state.layers.items() for k, t in flatten(s).items()}
    return layers | dict(state.head)


def same(a: ServerState, b: ServerState) -> bool:
    """To the bit."""
    x, y = tensors(a), tensors(b)
    return a.round == b.round and list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


def obedient(method, state: ServerState, client: server.Client) -> Reply:
    """A reply in which only the factors that are trained have moved."""
    answer = reply(state, client, method)
    adapter = {}
    for name, sent in server.broadcast(method, state, client, SEED).items():
        frozen = {"A", "B"} - (sent.train - sent.keep)
        adapter[name] = replace(
            answer.adapter[name], **{factor: getattr(sent.lora, factor) for factor in frozen}
        )
    return replace(answer, adapter=adapter)


def louder(answer: Reply, times: float) -> Reply:
    """The same client with an update that many times as large."""
    adapter = {name: LoRA(x.A, times * x.B, x.scale) for name, x in answer.adapter.items()}
    return replace(answer, adapter=adapter)
