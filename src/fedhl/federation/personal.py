"""Personal models: after the last round each client goes on from what it would be sent, for itself alone.

Client i starts from its broadcast as in a round, `W0 + base_i + ΔW(sent_i)`, trains on its own rows, and
keeps the result; the server's state is read, and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fedhl import server
from fedhl.errors import UserError
from fedhl.federation.federation import Federation, at_current_rank
from fedhl.federation.local import deployed, evaluate_rows, fit, prefix_of, start_of
from fedhl.lora import LoRA, add_products
from fedhl.method import Broadcast, with_past
from fedhl.model import peft
from fedhl.names import unknown
from fedhl.seeds import derive
from fedhl.server import Client, ServerState
from fedhl.watch import SILENT, Watcher

Json = dict[str, Any]


class Personal(NamedTuple):
    """What one client alone has after its personal training: the adapter (B_i, A_i) of each layer, the
    magnitudes of the frozen directions, by layer, if it was sent any, and the head, which is trained
    whole."""

    adapter: Mapping[str, LoRA]
    magnitudes: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


def personal_steps(federation: Federation, client: Client) -> int:
    """The optimizer steps of this client's personal training."""
    config = federation.config
    assert config.personal is not None
    return config.personal.training(config.training).steps_for(len(federation.rows[client.id]))


def personal_models(
    federation: Federation, state: ServerState, watcher: Watcher = SILENT
) -> Iterator[tuple[Client, Personal, Json]]:
    """`personalise` for one client after the other, with each client; `watcher` is told of every step."""
    total = sum(personal_steps(federation, client) for client in federation.clients)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        watcher.step("personal models: training", done, total)

    for client in federation.clients:
        yield client, *personalise(federation, state, client, step)


def personalise(
    federation: Federation,
    state: ServerState,
    client: Client,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Personal, Json]:
    """The personal model of this client, and its record: `steps`, `loss` (the mean training loss), and the
    metrics on the client's own held-out rows, `global` of its start and `personal` of its end."""
    client = at_current_rank(client, state)
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    return go_on(federation, client, sent, state.head, state.clients.get(client.id, {}), on_step)


def go_on(
    federation: Federation,
    client: Client,
    sent: Mapping[str, Broadcast],
    head: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Personal, Json]:
    """`personalise` from what the client was `sent`, and what it has `kept` from earlier rounds."""
    config, slots, slot = federation.config, federation.slots, federation.slot_of(client)
    assert config.personal is not None
    training = config.personal.training(config.training)
    held_out = federation.own[client.id]
    with deployed(federation, slot, sent, head, kept) as alphas:
        before = evaluate_rows(federation, held_out)
        trained = fit(
            federation,
            client,
            sent,
            start_of(sent, kept),
            alphas,
            federation.layers_of(client),
            training,
            steps=personal_steps(federation, client),
            rate=lambda k: training.learning_rate,
            seed=derive(config.seed, "personal", client.id),
            on_step=on_step,
        )
        after = evaluate_rows(federation, held_out)
    adapter = {name: prefix_of(lora, sent[name]) for name, lora in peft.read(slots, slot).items()}
    magnitudes = {name: alpha.detach().cpu() for name, alpha in alphas.items()}
    record: Json = {"steps": trained.steps, "loss": trained.loss}
    record |= {"global": before, "personal": after}
    return Personal(adapter, magnitudes, peft.read_head(slots)), record


def personal_change(
    federation: Federation, state: ServerState, client: Client, personal: Personal
) -> dict[str, LoRA | Tensor]:
    """`change_of` a personal model that started from this state."""
    client = at_current_rank(client, state)
    return change_of(
        personal, server.broadcast(federation.method, state, client, federation.config.seed)
    )


def change_of(personal: Personal, sent: Mapping[str, Broadcast]) -> dict[str, LoRA | Tensor]:
    """What a personal model adds to the base model in each layer, `base_i + s Σ_k α_k D_k + s B_i A_i`, shape
    (m, n), an adapter where there is no base. `sent`: what its client started from."""
    change: dict[str, LoRA | Tensor] = {}
    for name, lora in personal.adapter.items():
        base = sent[name].base
        own = with_past(lora, sent[name].past, personal.magnitudes.get(name))
        change[name] = own if base is None else add_products(base, [(1.0, own)])
    return change


def client_named(federation: Federation, id: str) -> Client:
    """The client of this id. Raises UserError if there is none."""
    for client in federation.clients:
        if client.id == id:
            return client
    raise UserError(unknown("client", id, [client.id for client in federation.clients]))
