"""A client at work on its own machine: its training, its evaluation, its personal model.

Knows nothing of networks: a header and a payload come in, a header and a payload go out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedhl import __version__
from fedhl.config import Config
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.export.own import keep_own
from fedhl.federation.federation import Federation
from fedhl.federation.local import deployed, evaluate_rows, train_client
from fedhl.federation.personal import change_of, go_on
from fedhl.federation.prepare import load_federation, readable, with_cache
from fedhl.locate import absolute
from fedhl.method import Broadcast, remembers
from fedhl.model.evaluation import Metrics
from fedhl.model.loading import Loaded
from fedhl.model.processors import processor_hash
from fedhl.network import wire
from fedhl.network.memory import Holdings, Kept
from fedhl.network.node import Node, own_config, partition, rows_of, unquoted
from fedhl.record import FINISHED, PERSONAL
from fedhl.server import Client
from fedhl.server.ledger import after, base_of, next_version

logger = logging.getLogger(__name__)


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
    client, sent, head, own = next_start(here, node, header, payload)
    slot = here.federation.slot_of(client)
    with deployed(here.federation, slot, sent, head, own):
        return evaluate_rows(here.federation, rows)


def personalise(
    config: Config, node: Node, header: Mapping[str, Any], payload: bytes, together: bool = False
) -> dict[str, Any]:
    """The record of the client's personal model, which goes on from its next start and stays here, in the
    folder `personal` of the client's own files (see `fedhl.export.own`)."""
    here = participant(config.model_dump_json(), node, tuple(header["labels"] or ()), together)
    if not here.federation.own.get(node.client):
        raise UserError("it has no held-out rows of its own to judge a personal model on")
    client, sent, head, own = next_start(here, node, header, payload)
    personal, record = go_on(here.federation, client, sent, head, own)
    folder = (node.place(header["run"]) / PERSONAL).absolute()
    summary = card_of(config, here, client, header, record)
    source = absolute(node.model or config.model.source)
    model = config.model.model_copy(update={"source": source})
    here_now = config.model_copy(update={"model": model})
    keep_own(folder, here_now, summary, change_of(personal, sent), personal.head)
    logger.info("personal model: %s", folder)
    logger.info("  as an adapter: fedhl export %s --rank %d --out DIR", folder, client.rank)
    return record


def card_of(
    config: Config,
    here: Participant,
    client: Client,
    header: Mapping[str, Any],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """What the card of a personal model says, as in the summary of a run, by a client that knows no other."""
    weighting, labels = config.weighting_used, header["labels"]
    return {
        "name": config.name,
        "status": FINISHED,
        "fedhl": __version__,
        "task": config.task.kind,
        "labels": labels,
        "method": {"name": config.method.name, **config.method.hyperparameters},
        "weighting": {"name": weighting.name, **weighting.hyperparameters},
        "rounds": config.rounds,
        "rounds_done": header["round"],
        "final": None,
        "among": header["clients"],
        "clients": [{"id": client.id, "rank": client.rank, "examples": client.examples}],
        "personal": {"clients": {client.id: record}},
        "seeds": {"root": config.seed},
        "hashes": {"model": here.loaded.hash, "tokenizer": here.tokenizer},
    }


def next_start(
    here: Participant, node: Node, header: Mapping[str, Any], payload: bytes
) -> tuple[Client, dict[str, Broadcast], Mapping[str, Tensor], dict[str, Tensor]]:
    """The client with what it would start the next round from: what it is sent, with all of its base; the
    head; the factors that it has kept. Raises UserError if it has lost what it held."""
    said, sent, head = wire.decode_broadcast(payload)
    own = Kept(node.place(header["run"])).before(header["round"] + 1)
    held = Holdings(node.place(header["run"])).memory(said["held"])
    if held is None:
        raise UserError("it no longer has what it was sent in earlier rounds")
    return here.client(header["rank"]), starts(held, sent), head, own


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
    federation = with_cache(settings, federation)
    return Participant(federation, loaded, processor_hash(loaded.processor), node.client)
