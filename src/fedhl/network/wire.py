"""Broadcasts and replies as messages (`fedhl.network.message`, docs/wire.md).

A reply is not trusted: its size, fields and tensors are compared with the broadcast, and a mistake raises
`Malformed`, with the reason. Its numbers are checked by `fedhl.server.refusals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedhl.lora import LoRA, initial
from fedhl.method import Broadcast
from fedhl.network.message import (
    NAMES,
    WHOLE,
    Entry,
    Limit,
    Malformed,
    Message,
    opened,
    sealed,
    shown,
)
from fedhl.server import Client, Reply
from fedhl.server.payload import (
    PAYLOADS,
    factor_of,
    from_payload,
    returned_factors,
    rows,
    sent_factors,
    to_payload,
)

PROTOCOL = 3
"""The version of the format; both ends must have the same."""
FIELDS: dict[str, type] = {
    **{"protocol": int, "payload": str, "run": str, "model": str, "tokenizer": str},
    **{"round": int, "client": str, "rank": int, "scale": float, "examples": int},
    **{"loss": float, "steps": int, "bound": float, "version": str},
}
"""The fields of a reply's header."""
LAYER: dict[str, Callable[[Any], bool]] = {
    "shape": lambda x: natural(x, 2),
    "scale": lambda x: positive(x),
    "drawn": lambda x: x is None or natural(x, 2),
    **dict.fromkeys(("past", "merged"), lambda x: x is None or positive(x)),
    "also": lambda x: isinstance(x, list) and x == [kind for kind in ALSO if kind in x],
    "absorbed": lambda x: type(x) is bool,
    **dict.fromkeys(("factors", "train", "keep"), lambda x: x in ("", "A", "B", "AB")),
}
"""The fields of a layer in a broadcast's header, and what each must be."""
ALSO = ("base", "magnitudes", "index")
"""The kinds of tensors that a layer's `also` announces; the other kinds have fields of their own."""
UNKNOWN = ("loss", "bound")
"""The fields that are null if training diverged, since JSON has no NaN."""
NULLABLE = (*UNKNOWN, "version")
"""The fields that may be null; `version` is, if the method's clients remember nothing."""


class Run(NamedTuple):
    """The facts on which both ends must agree: the run's id, and the hashes of the base model and the
    tokenizer."""

    run: str
    model: str
    tokenizer: str


# --- broadcasts ---------------------------------------------------------------------------------


def encode_broadcast(
    header: Mapping[str, Any],
    sent: Mapping[str, Broadcast],
    head: Mapping[str, Tensor],
    payload: str,
    held: str | None = None,
) -> bytes:
    """The message of the broadcasts of all layers, as they travel (see `fedhl.server.layers`), and of the
    head; `header`: further fields, as JSON; `held`: the version of the client's memory to which the
    broadcasts are relative.

    `decode_broadcast` gives `fedhl.server.payload.carried` of each broadcast, to the bit; the head travels as
    float32. Raises ValueError or TypeError for a header that is not JSON.
    """
    tensors, layers = head_tensors(head), {}
    for name, b in sent.items():
        factors = sent_factors(b)
        if factors:
            tensors |= packed("lora", name, [rows(b.lora, f, payload) for f in factors], payload)
        if b.base is not None:
            tensors |= packed("base", name, [b.base], payload)
        if b.past is not None:
            tensors |= packed("past", name, [rows(b.past, f, payload) for f in "AB"], payload)
        if b.merged is not None:
            leaves = [rows(b.merged, f, payload) for f in "AB"]
            tensors |= packed("merged", name, leaves, payload)
        if b.magnitudes is not None:
            tensors[f"magnitudes::{name}"] = b.magnitudes.float()
        if b.index is not None:
            tensors[f"index::{name}"] = b.index.long()
        layers[name] = {
            "shape": b.lora.shape,
            "scale": float(b.lora.scale),
            "drawn": None if b.drawn is None else [b.lora.rank, b.drawn],
            "past": None if b.past is None else float(b.past.scale),
            "merged": None if b.merged is None else float(b.merged.scale),
            "also": [kind for kind in ALSO if getattr(b, kind) is not None],
            "absorbed": b.absorbed,
            "factors": "".join(factors),
            "train": "".join(sorted(b.train)),
            "keep": "".join(sorted(b.keep)),
        }
    known = {"protocol": PROTOCOL, "payload": payload, "held": held, "layers": layers}
    return sealed({**header, **known}, tensors)


def decode_broadcast(
    source: Path | bytes,
) -> tuple[dict[str, Any], dict[str, Broadcast], dict[str, Tensor]]:
    """The header, the broadcast of every layer and the head. Raises Malformed."""
    message = opened(source)
    check_protocol(message.header)
    try:
        header = dict(message.header)
        layers, payload = header.pop("layers"), header["payload"]
        if not isinstance(header["held"], str | None):
            raise ValueError(f"its version is {shown(header['held'])}")
        if payload not in PAYLOADS:
            raise ValueError(f"unknown payload {payload!r}")
        if not isinstance(layers, dict):
            raise ValueError(f"its layers are {shown(layers)}")
        check_broadcast(message, layers, payload)
        sent = {name: broadcast_of(message, name, said, payload) for name, said in layers.items()}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Malformed(f"it is not a broadcast: {error!r}") from error
    return header, sent, head_of(message)


def natural(x: Any, count: int) -> bool:
    """Whether x is a list of `count` whole numbers that JSON readers agree on."""
    return (
        isinstance(x, list)
        and len(x) == count
        and all(type(k) is int and 0 <= k < WHOLE for k in x)
    )


def positive(x: Any) -> bool:
    return type(x) is float and 0 < x < math.inf


def check_broadcast(message: Message, layers: Mapping[str, Any], payload: str) -> None:
    """Raises ValueError for a field of a layer that is missing, unknown or makes no sense, and for a tensor
    that the header does not announce, or that is of another type or shape than it says."""
    narrow, expected = NAMES[PAYLOADS[payload]], set[str]()
    for name, said in layers.items():
        for field in sorted(LAYER.keys() ^ said.keys()):
            what = "missing" if field in LAYER else "unknown"
            raise ValueError(f"field {shown(field)} of layer {shown(name)} is {what}")
        for field, right in LAYER.items():
            if not right(said[field]):
                raise ValueError(f"{field} of layer {shown(name)} is {shown(said[field])}")
        m, n = said["shape"]
        widths = {"past": n + m, "merged": n + m, "base": n}
        kinds = [kind for kind in ("past", "merged") if said[kind] is not None] + said["also"]
        if said["drawn"] is None and said["factors"]:
            kinds.append("lora")
            widths["lora"] = sum({"A": n, "B": m}[f] for f in said["factors"])
        for kind in kinds:
            key, dtype = f"{kind}::{name}", narrow
            if kind in ("magnitudes", "index"):
                dtype = {"magnitudes": "F32", "index": "I64"}[kind]
            elif payload == "int8":
                expected.add(f"{kind}.steps::{name}")
            expected.add(key)
            got = message.tensors.get(key)
            tail = (widths[kind],) if kind in widths else ()
            if got and (
                got.dtype != dtype or len(got.shape) != 1 + len(tail) or got.shape[1:] != tail
            ):
                raise ValueError(f"tensor {shown(key)} is {got}, expected {dtype} {['k', *tail]}")
            if got and kind == "base" and got.shape[0] != m:
                raise ValueError(f"tensor {shown(key)} is {got}, expected {m} rows")
    for key, got in message.tensors.items():
        if key.startswith("head::") and got.dtype != "F32":
            raise ValueError(f"tensor {shown(key)} is {got}, expected F32")
    tensors = {key for key in message.tensors if not key.startswith("head::")}
    for key in sorted(expected ^ tensors):
        raise ValueError(
            f"tensor {shown(key)} is {'missing' if key in expected else 'not expected'}"
        )


def broadcast_of(message: Message, name: str, said: Mapping[str, Any], payload: str) -> Broadcast:
    """The broadcast of one layer; `said`: the layer's entry in the header."""
    m, n = said["shape"]

    def adapter(kind: str, scale: float, factors: str = "AB") -> LoRA:
        widths = [{"A": n, "B": m}[f] for f in factors]
        blocks = unpacked(message, kind, name, widths, payload)
        given = {f: factor_of(x, f, scale, payload) for f, x in zip(factors, blocks, strict=True)}
        rank = len(blocks[0])
        zero = {"A": torch.zeros(rank, n), "B": torch.zeros(m, rank)}
        return LoRA(**{**zero, **given}, scale=scale)

    rank, drawn = said["drawn"] or (0, None)
    return Broadcast(
        adapter("lora", said["scale"], said["factors"])
        if drawn is None
        else initial(m, n, rank, said["scale"], drawn),
        drawn=drawn,
        base=unpacked(message, "base", name, [n], payload)[0] if "base" in said["also"] else None,
        train=frozenset(said["train"]),
        keep=frozenset(said["keep"]),
        index=message[f"index::{name}"] if "index" in said["also"] else None,
        past=None if said["past"] is None else adapter("past", said["past"]),
        magnitudes=message[f"magnitudes::{name}"] if "magnitudes" in said["also"] else None,
        merged=None if said["merged"] is None else adapter("merged", said["merged"]),
        absorbed=said["absorbed"],
    )


# --- replies ------------------------------------------------------------------------------------


def encode_reply(run: Run, reply: Reply, sent: Mapping[str, Broadcast]) -> bytes:
    """The message of a reply: the factors that the client trained and does not keep, magnitudes, head, and
    the numbers that it reports. Raises ValueError if a layer has another scale than the client.
    """
    client, payload = reply.client, reply.client.payload
    for name, lora in reply.adapter.items():
        if abs(lora.scale - client.scale) > 1e-6 * client.scale:
            raise ValueError(
                f"layer {name!r} has scale {lora.scale}, expected {client.scale}, its client's"
            )
    tensors = head_tensors(reply.head)
    for name, lora in reply.adapter.items():
        leaves = [rows(lora, factor, payload) for factor in returned_factors(sent[name])]
        tensors |= packed("lora", name, leaves, payload)
    tensors |= {f"magnitudes::{name}": x.float() for name, x in reply.magnitudes.items()}
    header = {
        **{"protocol": PROTOCOL, "payload": payload, **run._asdict()},
        **{"round": reply.round, "client": client.id, "rank": client.rank},
        **{"scale": float(client.scale), "examples": client.examples},
        **{"loss": number(reply.loss), "steps": reply.steps, "bound": number(reply.bound)},
        "version": reply.version,
    }
    return sealed(header, tensors)


def number(x: float) -> float | None:
    """The number; None if it is not finite, since JSON has no NaN."""
    return float(x) if math.isfinite(x) else None


def read_reply(
    source: Path | bytes,
    run: Run,
    client: Client,
    layers: Iterable[str],
    sent: Callable[[str], Broadcast],
    head: Mapping[str, Tensor],
) -> Reply:
    """The reply of `client`, whose adapter is read a layer at a time when it is asked for.

    `layers`: the model's layers; `sent`: gives the broadcast to this client for a layer; `head`: the server's
    head. A reply may lack layers: `fedhl.server.refusals` checks which. Raises Malformed, with the reason.
    """
    parts = {name: parts_of(sent(name)) for name in layers}
    by_layer = {name: layer_table(name, known, client) for name, known in parts.items()}
    heads = {f"head::{name}": Entry("F32", tuple(x.shape)) for name, x in head.items()}
    message = opened(source, limit([*by_layer.values(), heads], (*run, client.id)))
    check_header(message.header, run, client)
    returned = {name: known for name, known in parts.items() if f"lora::{name}" in message.tensors}
    asked = heads | {key: x for name in returned for key, x in by_layer[name].items()}
    for name in sorted(asked.keys() ^ message.tensors.keys()):
        what = "missing" if name in asked else "not expected"
        raise Malformed(f"tensor {shown(name)} is {what}")
    for name, entry in asked.items():
        got = message.tensors[name]
        if got != entry:
            raise Malformed(f"tensor {name!r} is {got}, expected {entry}")
    header = message.header
    loss, bound = (math.nan if header[name] is None else header[name] for name in UNKNOWN)
    return Reply(
        client,
        header["round"],
        ReplyAdapter(message, client, returned, sent),
        head_of(message),
        loss,
        header["steps"],
        bound,
        {name: message[key] for name in returned if (key := f"magnitudes::{name}") in asked},
        header["version"],
    )


class Parts(NamedTuple):
    """The tensors of a layer in a reply: factors with `rank` rows each, their widths by factor, and the
    number of magnitudes, if the layer has any."""

    rank: int
    widths: dict[str, int]
    magnitudes: int | None


@dataclass(frozen=True, eq=False)
class ReplyAdapter(Mapping[str, LoRA]):
    """The adapters of a checked reply, read a layer at a time. A factor that did not travel is taken from the
    broadcast that `sent` gives."""

    message: Message
    client: Client
    layers: Mapping[str, Parts]
    sent: Callable[[str], Broadcast]

    def __getitem__(self, layer: str) -> LoRA:
        widths, scale, payload = self.layers[layer].widths, self.client.scale, self.client.payload
        blocks = unpacked(self.message, "lora", layer, list(widths.values()), payload)
        back = {
            factor: factor_of(x, factor, scale, payload)
            for factor, x in zip(widths, blocks, strict=True)
        }
        if back.keys() == {"A", "B"}:
            return LoRA(back["A"], back["B"], scale)
        return replace(self.sent(layer).lora, scale=scale, **back)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def parts_of(sent: Broadcast) -> Parts:
    """The tensors of a layer in the reply to this broadcast."""
    (m, n), magnitudes = sent.lora.shape, sent.magnitudes
    widths = {factor: {"A": n, "B": m}[factor] for factor in returned_factors(sent)}
    return Parts(sent.lora.rank, widths, None if magnitudes is None else len(magnitudes))


def layer_table(name: str, parts: Parts, client: Client) -> dict[str, Entry]:
    """The tensors that a reply has for a layer."""
    kind = NAMES[PAYLOADS[client.payload]]
    table = {f"lora::{name}": Entry(kind, (parts.rank, sum(parts.widths.values())))}
    if client.payload == "int8":
        table[f"lora.steps::{name}"] = Entry("BF16", (len(parts.widths), parts.rank))
    if parts.magnitudes is not None:
        table[f"magnitudes::{name}"] = Entry("F32", (parts.magnitudes,))
    return table


def limit(tables: Iterable[Mapping[str, Entry]], texts: Iterable[str]) -> Limit:
    """The largest reply with these tensors, and with these texts in its header.

    A character takes at most 14 bytes, since it is written as JSON twice; the other fields of our header and
    its checksum take less than 1024. An entry of the safetensors header takes less than 200 bytes without its
    name: type, shape and offsets, each number of at most 16 digits.
    """
    everything = [item for table in tables for item in table.items()]
    header = 1024 + 14 * sum(len(text) for text in texts)
    header += sum(200 + 14 * len(name) for name, _ in everything)
    return Limit(header, sum(entry.size for _, entry in everything))


def check_protocol(header: Mapping[str, Any]) -> None:
    """Raises Malformed unless the message is of this version of the format."""
    if type(header.get("protocol")) is not int or header["protocol"] != PROTOCOL:
        raise Malformed(
            f"it has protocol version {shown(header.get('protocol'))}, expected version {PROTOCOL}; "
            "install the same fedhl on both sides"
        )


def check_header(header: Mapping[str, Any], run: Run, client: Client) -> None:
    """Raises Malformed for a field that is missing, unknown, of another type, or of another value."""
    check_protocol(header)
    for name in sorted(FIELDS.keys() ^ header.keys()):
        what = "missing" if name in FIELDS else "unknown"
        raise Malformed(f"header field {shown(name)} is {what}")
    for name, kind in FIELDS.items():
        value = header[name]
        if name in NULLABLE and value is None:
            continue
        if type(value) is not kind:  # a bool is not a whole number here
            raise Malformed(f"header field {name!r} is {shown(value)}, expected {KINDS[kind]}")
        if kind is int and not 0 <= value < WHOLE:
            raise Malformed(f"header field {name!r} is {shown(value)}, expected 0 to 2^53")
        if kind is float and not math.isfinite(value):
            raise Malformed(f"header field {name!r} is {value}, expected a finite number")
    expected = {
        **{"payload": client.payload, **run._asdict(), "client": client.id},
        **{"rank": client.rank, "examples": client.examples},
    }
    if not math.isclose(header["scale"], client.scale, rel_tol=1e-6):
        raise Malformed(f"its scale is {header['scale']:g}, expected {client.scale:g}")
    for name, value in expected.items():
        if header[name] != value:
            raise Malformed(
                f"its {MEANING.get(name, name)} is {shown(header[name])}, expected {value!r}"
            )


KINDS = {int: "a whole number", float: "a number like 0.5", str: "text"}
MEANING = {
    **{"model": "base model", "client": "client id", "payload": "payload type"},
    "examples": "number of training rows",
}


# --- tensors ------------------------------------------------------------------------------------


def packed(kind: str, name: str, blocks: Sequence[Tensor], payload: str) -> dict[str, Tensor]:
    """Matrices of equally many rows, side by side, as they travel: `KIND::NAME`, and with int8
    `KIND.steps::NAME` (blocks, rows)."""
    parts = [to_payload(x, payload) for x in blocks]
    tensors = {f"{kind}::{name}": torch.cat([x for x, _ in parts], dim=1)}
    steps = [step for _, step in parts if step is not None]
    return tensors | ({f"{kind}.steps::{name}": torch.stack(steps)} if steps else {})


def unpacked(
    message: Message, kind: str, name: str, widths: Sequence[int], payload: str
) -> list[Tensor]:
    """The matrices that `packed` has put side by side, of these widths, in float32."""
    blocks = message[f"{kind}::{name}"].split(list(widths), dim=1)
    steps = message[f"{kind}.steps::{name}"] if payload == "int8" else [None] * len(blocks)
    return [from_payload(x, step) for x, step in zip(blocks, steps, strict=True)]


def head_tensors(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"head::{name}": value.float() for name, value in head.items()}


def head_of(message: Message) -> dict[str, Tensor]:
    """The head parameters, by name."""
    keys = [key for key in message.tensors if key.startswith("head::")]
    return {key.removeprefix("head::"): message[key] for key in keys}
