"""A client on its own machine: its settings, its rows, and its introduction to the server.

Only the config is the server's; the owner of the machine decides where its rows and its model are.
`fedhl.network.participant` trains: a model and PEFT are not imported for an introduction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedhl.config import Config
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.federation.examine import examine
from fedhl.federation.first_look import check_config
from fedhl.files import cache, file_name
from fedhl.model.processors import load_processor, processor_hash
from fedhl.names import unknown
from fedhl.network import wire

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
