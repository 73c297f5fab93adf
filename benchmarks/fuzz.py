"""Damaged and forged messages: each is refused, or means what the honest one means.

    python benchmarks/fuzz.py [--messages 1000000] [--seed 0] [--json FILE]

Takes a broadcast and a reply of a small model in every type of payload, and changes them at random: bytes
(flips, cuts, insertions, repetitions, another length), fields of the header, and the table of the tensors,
the last two with a checksum that is right. Counts what was refused by the reader, what was refused by the
server, and what was read with the same meaning. Any other exception, or a damaged message that is read with
another meaning, is printed, and the exit code is 1. A million messages take minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedhl import __version__, get_method, server
from fedhl.lora import LoRA, initial
from fedhl.network.message import Malformed, opened, sealed
from fedhl.network.wire import Run, decode_broadcast, encode_broadcast, encode_reply, read_reply
from fedhl.run.commit import commit
from fedhl.seeds import generator
from fedhl.server import Client, Reply, refusals
from fedhl.server.layers import Layers
from fedhl.server.payload import PAYLOADS

SHAPES = {"layer.0.query": (6, 5), "layer.1.value": (5, 7)}
METHOD, RUN, SEED = get_method("fedhl"), Run("run", "model", "tokenizer"), 0
OWN = {"loss", "steps", "bound"}
"""What a client says of itself, and nobody can check."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 2**31, 2**53, 2**63, 10**40, -0.0, 0.5, 1e-300, 1e300),
    *("", "0", "run", "a" * 200, "\x00", "\ud800", "é", [], [1], [[]], {}, {"a": 1}, [None, {}]),
)
TYPES = (torch.int8, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float64)


class Honest:
    """The honest messages in one type of payload, and what they mean."""

    def __init__(self, payload: str) -> None:
        adapter = {name: initial(m, n, 4, 2.0, seed=0) for name, (m, n) in SHAPES.items()}
        self.state = server.init(METHOD, adapter, {"bias": torch.ones(3)}, SEED)
        self.client = Client("ada", 2, 0.7, 12, payload=payload)
        self.sent = server.broadcast(METHOD, self.state, self.client, SEED)
        g = generator(SEED, "fuzz")
        moved = {
            name: LoRA(
                b.lora.A + torch.randn(b.lora.A.shape, generator=g),
                b.lora.B + torch.randn(b.lora.B.shape, generator=g),
                0.7,
            )
            for name, b in self.sent.items()
        }
        reply = Reply(self.client, 1, moved, {"bias": torch.zeros(3)}, 0.5, 3, 0.25)
        self.broadcast = encode_broadcast({"round": 1}, self.sent, self.state.head, payload)
        self.reply = encode_reply(RUN, reply, self.sent)
        self.layers = Layers(METHOD, self.state, SEED)
        self.meaning = {False: self.of_broadcast(self.broadcast), True: self.of_reply(self.reply)}

    def of_broadcast(self, message: bytes) -> Any:
        return decode_broadcast(message)

    def of_reply(self, message: bytes) -> Reply:
        got = read_reply(
            message, RUN, self.client, self.sent, self.sent.__getitem__, self.state.head
        )
        return replace(got, adapter=dict(got.adapter))

    def judged(self, message: bytes, is_reply: bool) -> str:
        """What becomes of a message."""
        try:
            got = self.of_reply(message) if is_reply else self.of_broadcast(message)
        except Malformed:
            return "refused by the reader"
        if is_reply and refusals.refusal(self.layers, got) is not None:
            return "refused by the server"
        return "the same meaning" if equal(got, self.meaning[is_reply]) else "another meaning"


def equal(a: Any, b: Any) -> bool:
    """To the bit and in type."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return type(a) is type(b) and a == b


# --- changes ------------------------------------------------------------------------------------


def bytes_changed(message: bytes, luck: random.Random) -> bytes:
    held = bytearray(message)
    for _ in range(luck.randint(1, 3)):
        place = luck.randrange(len(held) or 1)
        match luck.choice(("flip", "flip", "byte", "cut", "insert", "repeat", "length")):
            case "flip" if held:
                held[place] ^= 1 << luck.randrange(8)
            case "byte" if held:
                held[place] = luck.randrange(256)
            case "cut":
                del held[place : place + luck.randint(1, 40)]
            case "insert":
                held[place:place] = luck.randbytes(luck.randint(1, 40))
            case "repeat":
                held[place:place] = held[place : place + 60]
            case _:
                held[:8] = luck.getrandbits(64).to_bytes(8, "little")
    return bytes(held)


def header_changed(message: bytes, luck: random.Random) -> bytes:
    whole = opened(message)
    name = luck.choice([*sorted(whole.header.keys() - OWN), "another"])
    header = {**whole.header, name: luck.choice(VALUES)}
    if luck.random() < 0.2:
        del header[name]
    return sealed(header, {key: whole[key] for key in whole.tensors})


def table_changed(message: bytes, luck: random.Random) -> bytes:
    whole = opened(message)
    tensors = {key: whole[key] for key in whole.tensors}
    name, other = luck.choice(sorted(tensors)), luck.choice([*sorted(tensors), "x", "lora::", "é"])
    match luck.choice(("drop", "rename", "add", "shape", "type")):
        case "drop":
            del tensors[name]
        case "rename":
            tensors[other] = tensors.pop(name)
        case "add":
            tensors[other + "+"] = tensors[name].clone()
        case "shape":
            shape = [luck.randrange(6) for _ in range(luck.randrange(4))]
            tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
        case _:
            tensors[name] = tensors[name].to(luck.choice(TYPES))
    return sealed(dict(whole.header), tensors)


Change = Callable[[bytes, random.Random], bytes]
CHANGES: tuple[tuple[str, Change, tuple[bool, ...], float], ...] = (
    ("bytes of a reply", bytes_changed, (True,), 0.4),
    ("bytes of a broadcast", bytes_changed, (False,), 0.4),
    ("header of a reply, checksum right", header_changed, (True,), 0.1),
    ("tensors of a reply, checksum right", table_changed, (True,), 0.1),
)
"""What is changed, how, in which messages, and in which share of all messages. A broadcast with a right
checksum is the server's word."""


def same_numbers(message: bytes, honest: Honest) -> bool:
    """Whether a message has the honest one's tensors but for their numbers, and its header: those are what a
    client may say."""
    got, whole = opened(message), opened(honest.reply)
    return got.tensors == whole.tensors and got.header == whole.header


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    luck, honest = random.Random(given.seed), [Honest(payload) for payload in PAYLOADS]
    found = {name: Counter[str]() for name, *_ in CHANGES}
    wrong, began = 0, perf_counter()
    for k in range(given.messages):
        ((name, change, of, _),) = luck.choices(CHANGES, [share for *_, share in CHANGES])
        whole, is_reply = luck.choice(honest), of[0]
        try:
            message = change(whole.reply if is_reply else whole.broadcast, luck)
        except ValueError:  # this value is not JSON, or this type does not travel: nothing to send
            found[name]["could not be made"] += 1
            continue
        try:
            what = whole.judged(message, is_reply)
            if (
                what == "another meaning"
                and change is table_changed
                and same_numbers(message, whole)
            ):
                what = "other numbers of the sender's own"
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:200]
        found[name][what] += 1
        if what not in FINE:
            wrong += 1
            print(f"message {k}, {name}: {what}: {message!r:.300}", file=sys.stderr)
        if (k + 1) % 100_000 == 0:
            print(f"{k + 1:,} messages, {perf_counter() - began:.0f} s, {wrong} wrong", flush=True)
    told = {
        **{"messages": given.messages, "seed": given.seed, "wrong": wrong, "fedhl": __version__},
        "commit": commit(),
        **{"payloads": list(PAYLOADS), "found": {name: dict(n) for name, n in found.items()}},
    }
    print(json.dumps(told, indent=1))
    if given.json:
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


FINE = {
    *("refused by the reader", "refused by the server", "the same meaning"),
    "other numbers of the sender's own",
}

if __name__ == "__main__":
    sys.exit(main())
