"""A client on its own machine: its introduction, its training, its evaluation and its memory.

Knows nothing of networks: a header and a payload come in, a header and a payload go out. Only the
config is the server's; the owner of the machine decides where its rows and its model are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedhl.config import Config
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.federation.examine import examine
from fedhl.federation.federation import Federation
from fedhl.federation.local import deployed, evaluate_rows, train_client
from fedhl.federation.prepare import check_config, load_federation, readable
from fedhl.files import cache, file_name
from fedhl.method import Broadcast, remembers
from fedhl.model.evaluation import Metrics
from fedhl.model.loading import Loaded, load_processor
from fedhl.model.processors import processor_hash
from fedhl.names import unknown
from fedhl.network import wire
from fedhl.network.memory import Holdings, Kept
from fedhl.server import Client
from fedhl.server.ledger import after, base_of, next_version

logger = logging.getLogger(__name__)

SHARED = "partition"
"""The value of `Node.data` that stands for this client's part of the config's `data.source`."""


@dataclass(frozen=True)
class Node:
    """The settings of a machine, by its owner.

    `client`: the client's id; `data`: a file of its own rows, or `partition` for its part of the config's
    data; `model`: the model's place on this machine (default: the config's); `rank` (default: the config's);
    `state`: the folder for the tensors that it keeps between rounds; `fields`: the fields of its rows that a
    config may use (default: all).
    """

    client: str
    data: str
    model: str | None = None
    rank: int | None = None
    state: Path | None = None
    fields: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path:
        return (self.state or cache() / "clients").expanduser()

    def place(self, run: str) -> Path:
        """The folder of the client's own files in the run of this id."""
        return self.folder / file_name(run) / file_name(self.client)


def node_of(settings: Mapping[str, Any], config: Config) -> Node:
    """The node that `--node-config` describes. A simulated node has a number k instead: its client is the
    k-th, from 0, of the config's partition. Raises UserError, naming the key."""
    known = ["client", "data", "fields", "model", "rank", "state"]
    numbered = {"partition-id", "num-partitions"}
    for key in settings:
        if key not in known and key not in numbered:
            raise UserError(f"node config: {unknown('key', key, known)}")
    given = {key: settings[key] for key in known if key in settings}
    if not given and "partition-id" in settings:
        clients, k = sorted(partition(config)[1]), int(settings["partition-id"])
        if k >= len(clients):
            raise UserError(
                f"node config: partition-id {k} is too large: the config has {len(clients)} clients, "
                "numbered from 0"
            )
        return Node(clients[k], SHARED)
    for key, example in (("client", "hospital-a"), ("data", "/srv/rows.jsonl")):
        if not isinstance(given.get(key), str) or not given[key]:
            raise UserError(
                f"node config: {key} must be text, got {given.get(key)!r}; start the node with, e.g., "
                f"--node-config '{key}=\"{example}\"'"
                + (
                    f" ({SHARED!r} stands for its part of the config's data.source)"
                    * (key == "data")
                )
            )
    rank = given.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UserError(f"node config: rank must be a whole number of at least 1, got {rank!r}")
    for key in ("fields", "model", "state"):
        if not isinstance(given.get(key, "."), str) or not given.get(key, "."):
            raise UserError(f"node config: {key} must be text, got {given[key]!r}")
    if "state" in given:
        given["state"] = Path(given["state"])
    if "fields" in given and given["data"] == SHARED:
        raise UserError(
            f"node config: fields goes with a file of the client's own rows, but data is {SHARED!r}; "
            "leave one out"
        )
    if "fields" in given:
        given["fields"] = tuple(name.strip() for name in given["fields"].split(","))
    return Node(**given)


def introduce(config: Config, node: Node) -> dict[str, Any]:
    """A node's introduction to the server. Raises UserError if it cannot take part."""
    data, rank = rows_of(config, node)
    source = node.model or config.model.source
    processor = load_processor(source, config.task.kind, config.model.revision)
    with unquoted(node):
        tokenised = shards.tokenise(own_config(config, node), data, processor)
    for line in shards.losses(config, tokenised):
        logger.info("%s", line)
    return {
        "protocol": wire.PROTOCOL,
        "client": node.client,
        "rank": rank,
        "examples": len(tokenised.train[node.client]),
        "labels": data.labels,
        "own": node.data != SHARED,
        "tokenizer": processor_hash(processor),
    }


def train(
    config: Config, node: Node, header: Mapping[str, Any], payload: bytes, together: bool = False
) -> tuple[dict[str, Any], bytes | None]:
    """A client's part of a round: from the server's message to its reply, with its rank for the next round.
    A client that has lost what the broadcast is relative to says so, and has no reply.

    `together`: this process serves all clients of the config, on one model.
    """
    here = participant(config.model_dump_json(), node, tuple(header["labels"] or ()), together)
    client = here.client(header["rank"])
    said, sent, head = wire.decode_broadcast(payload)
    factors, holdings = Kept(node.place(header["run"])), Holdings(node.place(header["run"]))
    own, before = factors.before(header["round"]), said["held"]
    held = holdings.memory(before)
    if held is None:
        logger.warning("this machine no longer has what it was sent in earlier rounds")
        return {"forgotten": before}, None
    version = next_version(before, sent) if remembers(here.federation.method) else None
    local = train_client(
        here.federation,
        client,
        starts(held, sent),
        head,
        header["round"],
        own=own,
        version=version,
    )
    if version is not None:
        memory = {name: after(held.get(name), b) for name, b in sent.items()}
        holdings.keep(before, version, memory)
    rank = int(local.kept.pop("rank", client.rank))
    kept = own | local.kept
    values = [torch.tensor(local.reply.loss), *kept.values()]
    # A client whose training diverged is refused, and begins again from what it had before.
    if kept and all(x.isfinite().all() for x in values):
        factors.keep(header["round"], kept)
    run = wire.Run(header["run"], here.loaded.hash, here.tokenizer)
    return {"next_rank": rank}, wire.encode_reply(run, local.reply, sent)


def evaluate(
    config: Config, node: Node, header: Mapping[str, Any], payload: bytes, together: bool = False
) -> Metrics | None:
    """The metrics of a client's next start on its own held-out rows; None without such rows."""
    here = participant(config.model_dump_json(), node, tuple(header["labels"] or ()), together)
    rows = here.federation.own.get(node.client)
    if not rows:
        return None
    client = here.client(header["rank"])
    said, sent, head = wire.decode_broadcast(payload)
    own = Kept(node.place(header["run"])).before(header["round"] + 1)
    held = Holdings(node.place(header["run"])).memory(said["held"])
    if held is None:
        raise UserError("it no longer has what it was sent in earlier rounds")
    slot = here.federation.slot_of(client)
    with deployed(here.federation, slot, starts(held, sent), head, own):
        return evaluate_rows(here.federation, rows)


def starts(held: Mapping[str, Tensor], sent: Mapping[str, Broadcast]) -> dict[str, Broadcast]:
    """The broadcasts with all of the client's base, by layer; `held`: what it holds, {} for nothing."""
    return {
        name: replace(b, base=base_of(held.get(name), b), merged=None) for name, b in sent.items()
    }


@dataclass(frozen=True)
class Participant:
    """A client with its model and its rows; `tokenizer`: the hash of the tokenizer that tokenised them."""

    federation: Federation
    loaded: Loaded
    tokenizer: str
    id: str

    def client(self, rank: int) -> Client:
        """The client at the rank in the server's message. Raises UserError unless that is the client's own
        rank or, after pruning, a lower one."""
        own = next(c for c in self.federation.clients if c.id == self.id)
        if not 1 <= rank <= own.rank:
            raise UserError(f"client {self.id!r} has rank {own.rank}, but was sent rank {rank}")
        return replace(own, rank=rank)


@lru_cache(maxsize=1)
def base(
    config: str, model: str | None, labels: tuple[str, ...], ranks: tuple[tuple[str, int], ...]
) -> tuple[Loaded, Federation]:
    """The model with slots for these clients; a process that serves several messages loads it once."""
    settings = Config.model_validate_json(config)
    if model is not None:
        place = settings.model.model_copy(update={"source": model})
        settings = settings.model_copy(update={"model": place})
    return load_federation(settings, list(labels) or None, dict(ranks))


@lru_cache(maxsize=256)
def participant(
    config: str, node: Node, labels: tuple[str, ...], together: bool = False
) -> Participant:
    """The model and this client's rows. `together`: with slots for the ranks of all clients."""
    settings = Config.model_validate_json(config)
    data, rank = rows_of(settings, node)
    ranks = partition(settings)[1] if together else {node.client: rank}
    loaded, federation = base(config, node.model, labels, tuple(sorted(ranks.items())))
    data = replace(data, labels=list(labels) or None)
    with unquoted(node):
        complete = readable(settings, federation, loaded)
        own = shards.tokenise(own_config(settings, node), data, loaded.processor, complete)
    clients = [replace(c, examples=len(own.train.get(c.id, ()))) for c in federation.clients]
    federation = replace(
        federation, clients=clients, rows=own.train, own=own.client_held_out, config=settings
    )
    return Participant(federation, loaded, processor_hash(loaded.processor), node.client)


def partition(config: Config) -> tuple[shards.Shards, dict[str, int]]:
    """The config's rows and clients; a process that serves several messages reads them once."""
    return cached_partition(config.model_dump_json())


@lru_cache(maxsize=1)
def cached_partition(config: str) -> tuple[shards.Shards, dict[str, int]]:
    read = Config.model_validate_json(config)
    check_config(read)
    return examine(read)


def rows_of(config: Config, node: Node) -> tuple[shards.Shards, int]:
    """The rows of one client alone, and its rank. Raises UserError if the config has no such client."""
    if node.data != SHARED:
        with unquoted(node):
            data = shards.client_shards(config, node.client, node.data, node.fields)
        return data, node.rank or rank_of(config, node.client)
    everyone, ranks = partition(config)
    if node.client not in ranks:
        raise UserError(f"node config: {unknown('client', node.client, sorted(ranks))}")
    if node.rank not in (None, ranks[node.client]):
        raise UserError(
            f"node config: rank of client {node.client!r}: expected {ranks[node.client]}, as in the config, "
            f"got {node.rank}; leave the node's rank out, or change lora.ranks"
        )
    held: dict[str, Any] = everyone.client_held_out
    alone = replace(
        everyone,
        clients={node.client: everyone.clients[node.client]},
        client_held_out={node.client: held[node.client]} if held else {},
        held_out=[],
        validation=everyone.validation[:0],
    )
    return alone, ranks[node.client]


@contextmanager
def unquoted(node: Node) -> Iterator[None]:
    """A mistake in a client's own rows is reported here, in its own log, and not to the server, since the
    message may quote the rows. Raises a UserError that says so."""
    try:
        yield
    except UserError as error:
        if node.data == SHARED:
            raise
        logger.error("%s", error)
        raise UserError("its rows do not fit the config; the client's own log says why") from error


def rank_of(config: Config, client: str) -> int:
    """The rank of a client with its own data, if the config gives it without the other clients."""
    rank = config.lora.ranks.rank_of(client)
    if rank is None:
        raise UserError(
            f"node config: lora.ranks is a rule for all clients together; give client {client!r} a rank "
            "of its own, e.g. with --node-config 'rank=8'"
        )
    return rank


def own_config(config: Config, node: Node) -> Config:
    """The config with this machine's data, for messages that name the source of a row."""
    if node.data == SHARED:
        return config
    data = config.data.model_copy(update={"source": node.data, "split": None})
    return config.model_copy(update={"data": data})
