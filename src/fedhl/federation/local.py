"""One client's part of a round: deploy what was sent, train, return; or evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedhl import server
from fedhl.federation.federation import Federation, at_current_rank
from fedhl.lora import LoRA, pad, plus
from fedhl.method import Broadcast, SelfPruning
from fedhl.model import peft
from fedhl.model.evaluation import Metrics, evaluate
from fedhl.model.training import Trained, learning_rate, train
from fedhl.seeds import derive
from fedhl.server import Client, Reply, ServerState
from fedhl.server.carried import carried_reply
from fedhl.server.participation import reached
from fedhl.weighting import moment_bounds

if TYPE_CHECKING:
    from fedhl.config.conduct import TrainingConfig


class Local(NamedTuple):
    """The result of a client's local training: its reply as the server receives it, the tensors that it keeps
    for itself, and the seconds spent in forward, backward and optimizer."""

    reply: Reply
    kept: dict[str, Tensor]
    seconds: float


def train_client(
    federation: Federation,
    client: Client,
    sent: Mapping[str, Broadcast],
    head: Mapping[str, Tensor],
    round: int,
    on_step: Callable[[], None] = lambda: None,
    layers: Sequence[str] | None = None,
    own: Mapping[str, Tensor] | None = None,
    version: str | None = None,
) -> Local:
    """One client's part of a round, from its start `sent`. `layers`: the layers that it trains (None: the
    layers that it reaches); `own`: the tensors that it has kept from earlier rounds; `version`: the memory
    that it holds once it has received the broadcast (see `fedhl.server.ledger`).
    """
    config, slots, slot = federation.config, federation.slots, federation.slot_of(client)
    period = config.period
    if layers is None:
        chance = config.participation.stragglers
        late = derive(config.seed, "straggler", round, client.id)
        layers = reached(federation.layers_of(client), chance, late)
    own, steps = own or {}, federation.steps_for(len(federation.rows[client.id]))
    before = start_of(sent, own)
    known = federation.known_labels(federation.labels_of(round))
    whole = peft.changes(slots, layers if client.full else ())
    with deployed(federation, slot, sent, head, own) as alphas, known, whole as changes:
        trained = fit(
            federation,
            client,
            sent,
            before,
            alphas,
            layers,
            config.training,
            steps=steps,
            rate=lambda k: learning_rate(
                config.training, period, (round - 1) % period + (k + 0.5) / steps
            ),
            seed=derive(config.seed, "training", round, client.id),
            on_step=on_step,
            changes=changes,
        )
    after = {name: prefix_of(lora, sent[name]) for name, lora in peft.read(slots, slot).items()}
    after |= {name: plus(after[name], D.detach().cpu()) for name, D in changes.items()}
    kept = {
        f"{name}.{factor}": getattr(after[name], factor)
        for name in layers
        for factor in sorted(sent[name].keep)
    }
    adapter = {name: shared(after[name], sent[name]) for name in sorted(layers)}
    if isinstance(federation.method, SelfPruning):
        rank = federation.method.pruned_rank(before, after)
        if rank < client.rank:
            kept["rank"] = torch.tensor(rank)
    head, bound = peft.read_head(slots), disagreement(trained.losses)
    magnitudes = {n: alphas[n].detach().cpu() for n in sorted(layers) if n in alphas}
    reply = Reply(client, round, adapter, head, trained.loss, steps, bound, magnitudes, version)
    return Local(carried_reply(reply, sent), kept, trained.seconds)


def fit(
    federation: Federation,
    client: Client,
    sent: Mapping[str, Broadcast],
    start: Mapping[str, LoRA],
    alphas: Mapping[str, nn.Parameter],
    layers: Sequence[str],
    training: TrainingConfig,
    *,
    steps: int,
    rate: Callable[[int], float],
    seed: int,
    on_step: Callable[[], None],
    changes: Mapping[str, nn.Parameter] | None = None,
) -> Trained:
    """Train the deployed model in place, on the client's rows: of these `layers` the factors and magnitudes
    `alphas` that the method trains, or if there are any the `changes` of whole weights; and the head."""
    slots, slot = federation.slots, federation.slot_of(client)
    factors = {} if changes else {name: sent[name].train for name in layers}
    return train(
        slots.model,
        [
            *peft.activate(slots, slot, factors),
            *(alphas[name] for name in layers if name in alphas),
            *(changes or {}).values(),
        ],
        federation.rows[client.id],
        training,
        objective=federation.objective,
        steps=steps,
        rate=rate,
        autocast=federation.autocast,
        seed=seed,
        on_step=on_step,
        penalty=penalty(federation, slot, start, layers),
    )


def disagreement(losses: Sequence[float]) -> float:
    """The distance between the bounds that a client estimates; NaN, which the server refuses, if its
    training diverged."""
    try:
        lower, upper = moment_bounds(losses)
    except ValueError:
        return math.nan
    return upper - lower


def start_of(sent: Mapping[str, Broadcast], own: Mapping[str, Tensor]) -> dict[str, LoRA]:
    """The adapters that a client starts from: as they were sent, but with the factors that it has kept."""
    return {
        name: replace(
            b.lora, **{f: own[f"{name}.{f}"] for f in sorted(b.keep) if f"{name}.{f}" in own}
        )
        for name, b in sent.items()
    }


def prefix_of(lora: LoRA, sent: Broadcast) -> LoRA:
    """The components that were sent, from the adapter in the slot, which may have more."""
    rank = sent.lora.rank
    return LoRA(lora.A[:rank].contiguous(), lora.B[:, :rank].contiguous(), lora.scale)


def shared(lora: LoRA, sent: Broadcast) -> LoRA:
    """The adapter that leaves the client: the factors that it keeps are replaced by the factors it was
    sent."""
    return replace(lora, **{factor: getattr(sent.lora, factor) for factor in sorted(sent.keep)})


def penalty(
    federation: Federation, slot: int, start: Mapping[str, LoRA], layers: Sequence[str]
) -> Callable[[], Tensor] | None:
    """The method's own term of the client's loss, over the trained layers; None if the method has none."""
    method = federation.method
    if not isinstance(method, SelfPruning):
        return None
    factors, scale = federation.slots.factors[slot], peft.scale(federation.slots, slot)

    def term() -> Tensor:
        terms = []
        for name in layers:
            (A, B), rank = factors[name], start[name].rank
            terms.append(method.penalty(LoRA(A[:rank], B[:, :rank], scale)))
        return torch.stack(terms).sum()

    return term


@contextmanager
def deployed(
    federation: Federation,
    slot: int,
    sent: Mapping[str, Broadcast],
    head: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block the model is the broadcast `sent` with this head, in the slot of rank `slot`. Gives
    the trainable magnitudes of the frozen directions, by layer.

    An adapter of lower rank fills the slot's first components; the others are zero in both factors,
    and so they stay. `own`: the factors that the client has kept.
    """
    slots = federation.slots
    start = start_of(sent, own or {})
    peft.write(slots, slot, {name: pad(lora, slot) for name, lora in start.items()})
    peft.write_head(slots, head)
    peft.activate(slots, slot, frozenset())
    bases = {name: b.base for name, b in sent.items() if b.base is not None}
    past = {name: b.past for name, b in sent.items() if b.past is not None}
    magnitudes = {name: b.magnitudes for name, b in sent.items() if b.magnitudes is not None}
    with peft.offset(slots, bases), peft.directions(slots, past, magnitudes) as alphas:
        yield alphas


def evaluate_client(
    federation: Federation, state: ServerState, client: Client, rows: Sequence[Any]
) -> Metrics:
    """Metrics on these rows of the model from which this client would start the next round."""
    client = at_current_rank(client, state)
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    own = state.clients.get(client.id)
    with deployed(federation, federation.slot_of(client), sent, state.head, own):
        return evaluate_rows(federation, rows)


def evaluate_rows(federation: Federation, rows: Sequence[Any]) -> Metrics:
    """Metrics of the current model on these rows."""
    return evaluate(
        federation.slots.model,
        rows,
        objective=federation.objective,
        batch_size=federation.config.evaluation.batch_size,
        device=federation.device,
        autocast=federation.autocast,
    )
