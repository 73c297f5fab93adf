"""A config made real: data read and partitioned, model loaded, adapters attached."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fedhl.config import Config
from fedhl.config.ranks import RankShares
from fedhl.config.settings import Settings
from fedhl.data import shards
from fedhl.errors import UserError
from fedhl.federation.examine import Examined, examine, refuse_unknown_clients
from fedhl.federation.federation import Federation, initial_state
from fedhl.federation.first_look import check_config
from fedhl.lora import LoRA
from fedhl.model import adapters, peft
from fedhl.model.activation_cache import CachedObjective
from fedhl.model.loading import Loaded, load_model
from fedhl.model.reading import check_first, check_rows
from fedhl.names import listed
from fedhl.server import Client, ServerState
from fedhl.server.channel import AirComp
from fedhl.server.participation import matching
from fedhl.server.privacy import SECRET_BYTES, Mechanism
from fedhl.task.examples import Encoded
from fedhl.task.objective import Objective
from fedhl.task.texts import TextKind
from fedhl.watch import SILENT, Watcher


@dataclass(frozen=True)
class Prepared:
    """A config made real: data read, model loaded, adapters attached."""

    config: Config
    data: shards.Shards
    tokenised: shards.Tokenised
    loaded: Loaded
    federation: Federation
    start: dict[str, LoRA]
    start_head: dict[str, Tensor]

    def initial_state(self) -> ServerState:
        return initial_state(self.federation, self.start, self.start_head)

    def joined_by(self, clients: Sequence[Client]) -> Prepared:
        """The same, with `clients` in the federation: new clients are added, known clients replaced."""
        known = {client.id: client for client in (*self.federation.clients, *clients)}
        everyone = [known[id] for id in sorted(known)]
        return replace(self, federation=replace(self.federation, clients=everyone))


def pick_device(config: Settings) -> str:
    """The device of the config; `auto` is cuda, else mps, else cpu."""
    if config.compute.device != "auto":
        return config.compute.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_federation(
    config: Config, labels: Sequence[str] | None, ranks: Mapping[str, int]
) -> tuple[Loaded, Federation]:
    """The model with its adapter slots, and a federation of clients that have no rows yet."""
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    device = pick_device(config)
    loaded = load_model(
        config.model.source,
        config.task.kind,
        labels=labels,
        revision=config.model.revision,
        dtype=getattr(torch, config.model.dtype),
        four_bit=config.model.four_bit,
        device=device,
        gradient_checkpointing=config.model.gradient_checkpointing,
        dropout=config.model.dropout,
        fresh_head=config.model.fresh_head,
        seed=config.seed,
    )
    refuse_padding(config, loaded)
    objective = config.task.objective(
        loaded.processor, getattr(loaded.model.config, "vocab_size", 1)
    )
    return loaded, federate(config, loaded.model, loaded.head, ranks, objective, device)


def federate(
    config: Settings,
    model: nn.Module,
    head: Sequence[str],
    ranks: Mapping[str, int],
    objective: Objective,
    device: str,
) -> Federation:
    """A federation of clients of these `ranks` by id, who have no rows yet, around `model`, which is changed:
    its layers get adapter slots. `head`: the parameters that are trained whole. Raises UserError for settings
    that do not fit the model or the ranks."""
    slots = peft.attach(
        model,
        {rank: config.lora.alpha_of(rank) for rank in sorted(set(ranks.values()))},
        config.lora.targets,
        rslora=config.lora.rslora,
        dropout=config.lora.dropout,
        head=head,
    )
    method = config.method.build()
    layers = trained_layers(config, slots.order)
    wire = config.wire
    clients = [
        Client(
            name,
            r,
            peft.scale(slots, r),
            0,
            layers.get(name),
            wire.payload,
            wire.download,
            config.training.full,
        )
        for name, r in sorted(ranks.items())
    ]
    refuse_mixed_ranks(config, method.mixed_ranks, clients)
    return Federation(
        config=config,
        method=method,
        weighting=config.weighting_used.build(),
        clients=clients,
        rows={},
        own={},
        held_out=[],
        slots=slots,
        objective=objective,
        device=torch.device(device),
        channel=config.channel
        and AirComp(snr_db=config.channel.snr_db, power=config.channel.power),
        guard=config.robust and config.robust.build(),
        privacy=mechanism(config, len(clients)),
    )


def mechanism(config: Settings, clients: int) -> Mechanism | None:
    """The mechanism of `config.privacy`, with a new secret from the operating system; None without
    privacy."""
    if config.privacy is None:
        return None
    rate, secret = config.participation.rate(clients), secrets.token_bytes(SECRET_BYTES)
    return Mechanism(config.privacy.clip, config.privacy.noise, rate, clients, secret)


def prepare(
    config: Config, watcher: Watcher = SILENT, examined: Examined | None = None
) -> Prepared:
    """Read the data, load the model, attach the adapters. Raises UserError before any training.

    `examined`: the rows and the ranks, if they have been read already.
    """
    check_config(config)
    data, ranks = examined or examine(config)
    watcher.say(f"{len(data.rows):,} rows for {len(ranks)} clients; loading {config.model.source}")
    return assemble(config, data, ranks, watcher)


def prepare_server(
    config: Config,
    clients: Mapping[str, int],
    labels: Sequence[str] | None,
    watcher: Watcher,
    registered: int | None = None,
) -> Prepared:
    """The server's part alone, where the `clients` (id: rank) have the data, and the labels are known from
    them.

    `registered`: the number of clients when the run began, N of its privacy, if clients have joined since.
    Raises UserError before any training.
    """
    check_config(config)
    if config.data.validation is not None:
        raise UserError(
            "data.validation: the validation rows are a part of data.source, which the server does not have "
            "when clients have their own data; leave data.validation out"
        )
    refuse_unknown_clients(config, sorted(clients))
    watcher.say(f"{len(clients)} clients with data of their own; loading {config.model.source}")
    prepared = assemble(config, shards.server_shards(config, labels), clients, watcher)
    if registered is None:
        return prepared
    private = mechanism(config, registered)
    return replace(prepared, federation=replace(prepared.federation, privacy=private))


def prepare_server_again(config: Config, summary: Mapping[str, Any], watcher: Watcher) -> Prepared:
    """`prepare_server` for a run that has begun, with the clients, the labels and N from its summary."""
    ranks = {client["id"]: client["rank"] for client in summary["clients"]}
    registered = (summary["privacy"] or {}).get("clients")  # N is a constant
    return prepare_server(config, ranks, summary["labels"], watcher, registered)


def assemble(
    config: Config, data: shards.Shards, ranks: Mapping[str, int], watcher: Watcher
) -> Prepared:
    """The model and the adapters for these rows and clients."""
    loaded, federation = load_federation(config, data.labels, ranks)
    if data.tasks and data.labels:
        peft.output_layer(federation.slots)  # raises UserError if the head has no rows by label
        names = "; ".join(", ".join(data.labels[k] for k in task) for task in data.tasks)
        watcher.say(f"{len(data.tasks)} tasks of {config.period} rounds: {names}")
    tokenised = shards.tokenise(
        config, data, loaded.processor, readable(config, federation, loaded, watcher)
    )
    if isinstance(config.lora.ranks, RankShares) and (remark := config.lora.ranks.remark()):
        watcher.say(remark)
    for line in shards.losses(config, tokenised):
        watcher.say(line)
    federation = replace(
        federation,
        clients=[
            replace(c, examples=len(tokenised.train.get(c.id, ()))) for c in federation.clients
        ],
        rows=tokenised.train,
        own=tokenised.client_held_out,
        held_out=tokenised.held_out,
        validation=tokenised.validation,
        tasks=data.tasks,
        pooled=data.pooled,
    )
    federation = with_cache(config, federation)
    start, head = read_start(config, federation) if config.lora.start else ({}, {})
    if head and data.labels is not None:
        check_start_labels(config, data.labels, watcher)
    head = peft.read_head(federation.slots) | head  # copied now: training will change the model's
    return Prepared(config, data, tokenised, loaded, federation, start, head)


def readable(
    config: Config, federation: Federation, loaded: Loaded, watcher: Watcher = SILENT
) -> Callable[[Encoded], Encoded]:
    """A function that completes encoded rows by what the base model says of them, where the kind of task
    wants to know. It raises RowError unless the model can read the rows."""
    task, objective, model = config.task, federation.objective, federation.slots.model

    @torch.no_grad()
    def outputs(rows: Sequence[Any]) -> Tensor:
        return objective.outputs(model, send_to_device(objective.batch(rows), federation.device))

    def complete(encoded: Encoded) -> Encoded:
        done = 0

        def counted(rows: Sequence[Any]) -> Tensor:
            nonlocal done
            watcher.step("reading the rows with the base model", done, len(encoded.examples))
            done += len(rows)
            return outputs(rows)

        with federation.autocast():
            if isinstance(task, TextKind):
                for part in zip(*map(task.sequences, encoded.examples), strict=True):
                    read = Encoded([*part], encoded.rows, encoded.truncated)
                    check_rows(loaded.model, loaded.processor, read, task.max_length)
            else:
                check_first(loaded.model, objective, encoded)
            with peft.base_only(federation.slots):
                examples = task.with_base(encoded.examples, counted)
        return replace(encoded, examples=[*examples])

    return complete


def with_cache(config: Config, federation: Federation) -> Federation:
    """The same with the activations of all of its rows computed once, if the config says so. Raises UserError
    for a model whose layers do not allow it."""
    if not config.compute.cache_activations:
        return federation
    of_clients = [*federation.rows.values(), *federation.own.values()]
    objective = CachedObjective(
        federation.objective,
        federation.slots,
        [*of_clients, federation.held_out, federation.validation],
        config.task.length,
        federation.autocast,
        federation.device,
    )
    return replace(federation, objective=objective)


def trained_layers(config: Settings, layers: Sequence[str]) -> dict[str, frozenset[str]]:
    """The layers of each client that trains only some, by client id. Raises UserError, naming the client."""
    found = {}
    for name, parts in config.participation.layers.items():
        try:
            found[name] = frozenset(matching(layers, parts))
        except ValueError as error:
            raise UserError(f"participation.layers: client {name!r}: {error}") from None
    return found


def refuse_mixed_ranks(config: Settings, mixed: bool, clients: list[Client]) -> None:
    """Raises UserError if the method cannot serve clients of different ranks or scales."""
    kinds = sorted({(client.rank, client.scale) for client in clients})
    if not mixed and len(kinds) > 1:
        raise UserError(
            f"method {config.method.name!r} needs one rank and scale for all clients, got ranks "
            f"{listed(rank for rank, _ in kinds)}; set lora.ranks to one number, or use "
            "method: fedhl, which takes any ranks"
        )


def refuse_padding(config: Config, loaded: Loaded) -> None:
    """Raises UserError if batches would mix rows whose padding the model does not ignore."""
    together = -(-config.training.batch_size // config.training.accumulation)
    if not loaded.batches and max(together, config.evaluation.batch_size) > 1:
        raise UserError(
            f"model {config.model.source!r}: a {type(loaded.model).__name__} does not ignore padding, so "
            "that the logits of a row depend on the rows beside it in the batch; have the model read each "
            "row alone: set evaluation.batch_size: 1, and training.accumulation: "
            f"{config.training.batch_size}, which is training.batch_size"
        )


def read_start(config: Config, federation: Federation) -> tuple[dict[str, LoRA], dict[str, Tensor]]:
    """The adapter and head that `lora.start` names, if they fit this model and these ranks."""
    assert config.lora.start is not None
    adapter, head, _, frozen = adapters.load_adapter(Path(config.lora.start))
    shapes, top = peft.layers(federation.slots), federation.top_rank
    for name, lora in adapter.items():
        if name not in shapes:
            raise UserError(
                f"lora.start: the adapter has layer {name!r}, which lora.targets does not adapt; "
                "choose the same targets"
            )
        if lora.shape != shapes[name] or lora.rank > top:
            raise UserError(
                f"lora.start: layer {name!r} has shape {lora.shape} and rank {lora.rank}, expected "
                f"{shapes[name]} and at most {top}, the largest of lora.ranks; `fedhl merge "
                f"{config.lora.start} --rank {top} --out DIR` makes one that fits"
            )
    for name, weight in frozen.items():
        base = federation.slots.modules[name].get_base_layer().weight
        assert isinstance(base, Tensor)
        if not torch.equal(adapters.cpu_copy(base), weight):
            raise UserError(
                f"lora.start: the adapter was trained on another weight of {name} than this model has; start "
                "from the base model of the adapter"
            )
    own = federation.slots.head
    for name, value in head.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(
                f"lora.start: head parameter {name!r} of shape {tuple(value.shape)} does not fit this "
                "model and these labels"
            )
    return adapter, head


def check_start_labels(config: Config, labels: Sequence[str], watcher: Watcher) -> None:
    """Raises UserError if the head that `lora.start` brings has other labels than the data, or the same in
    another order; warns if nothing says which it has."""
    assert config.lora.start is not None
    theirs = adapters.adapter_labels(Path(config.lora.start))
    if theirs is None:
        watcher.say(
            f"warning: nothing says which labels the head of {config.lora.start} has; starting from it "
            f"is right only if they are {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}, in this "
            "order"
        )
    elif theirs != list(labels):
        raise UserError(
            f"lora.start: the head of {config.lora.start} has the labels {', '.join(map(repr, theirs[:5]))}, "
            f"the data has {', '.join(map(repr, labels[:5]))}; start from an adapter of the same labels in "
            "the same order"
        )
