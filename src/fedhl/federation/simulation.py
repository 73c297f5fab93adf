"""A federation in one process: the loop to read first, and the oracle for every other engine.

One base model stays in memory with one adapter slot per distinct rank. A client is a set of rows
and a rank: what it is sent is copied into the slot of its rank, trained there, and copied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedhl import server
from fedhl.config import Config
from fedhl.data.label_groups import begins, task_of
from fedhl.data.prompts import Example
from fedhl.lora import LoRA, dense, initial, pad, prefix, truncate
from fedhl.method import Broadcast, Method, SelfPruning
from fedhl.model import peft
from fedhl.model.evaluation import Metrics, evaluate
from fedhl.model.training import learning_rate, train, training_mode
from fedhl.network.wire import carried_reply
from fedhl.seeds import derive
from fedhl.server import Client, Reply, Round, ServerState, rounds
from fedhl.server.channel import AirComp
from fedhl.server.participation import reached, silence
from fedhl.server.payload import number_bytes
from fedhl.server.privacy import Mechanism
from fedhl.server.robust import Guard
from fedhl.weighting import Weighting, moment_bounds


@dataclass(frozen=True)
class Federation:
    """Everything that does not change between rounds.

    `rows` and `own`: each client's training and held-out rows; `held_out`: the server's rows, and
    `validation` those it chooses settings by; `tasks`: the labels of each task, if labels arrive over
    time; `guard`: what becomes of clients who move too far; `privacy`: what hides each of them.
    """

    config: Config
    method: Method[Any]
    weighting: Weighting
    clients: list[Client]
    rows: Mapping[str, Sequence[Example]]
    own: Mapping[str, Sequence[Example]]
    held_out: Sequence[Example]
    slots: peft.Slots
    pad_id: int
    device: torch.device
    channel: AirComp | None = None
    tasks: Sequence[Sequence[int]] = ()
    validation: Sequence[Example] = ()
    guard: Guard | None = None
    privacy: Mechanism | None = None

    @property
    def top_rank(self) -> int:
        return max(self.slots.factors)

    def slot_of(self, client: Client) -> int:
        """The slot of the rank that the client began with; its own rank may have become smaller."""
        known = (other.rank for other in self.clients if other.id == client.id)
        return next(known, client.rank)

    def layers_of(self, client: Client) -> list[str]:
        """The layers that this client trains, from the input of the model to its output."""
        layers = self.slots.order
        return [name for name in layers if client.layers is None or name in client.layers]

    def labels_of(self, round: int) -> Sequence[int] | None:
        """The labels of this round's task; None: all."""
        return self.tasks[task_of(round, self.config.period)] if self.tasks else None

    def in_round(self, round: int) -> Federation:
        """Those who can take part in this round: with tasks, the clients that have rows of its labels,
        and only these rows."""
        labels = self.labels_of(round)
        if labels is None:
            return self
        rows = {
            id: [ex for ex in theirs if ex.labels in labels] for id, theirs in self.rows.items()
        }
        clients = [replace(c, examples=len(rows[c.id])) for c in self.clients if rows[c.id]]
        return replace(self, clients=clients, rows=rows)

    def cohort(self, round: int) -> list[Client]:
        """Those who take part in this round, by id; with privacy each on its own, maybe none."""
        if self.privacy is not None:
            by_id = sorted(self.clients, key=lambda client: client.id)
            return [client for client in by_id if self.privacy.takes_part(client.id, round)]
        size = self.config.participation.size(len(self.clients))
        return server.sample(self.clients, size, self.config.seed, round)

    def known_labels(self, labels: Sequence[int] | None) -> AbstractContextManager[None]:
        """Inside the block the model knows only these labels; None: all."""
        return nullcontext() if labels is None else peft.only_labels(self.slots, labels)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.compute.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def initial_state(
    federation: Federation,
    start: Mapping[str, LoRA] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The server's state before round 1: an untrained adapter of the top rank, or one that continues
    the adapter `start` (of at most that rank); the head that the model has now, or `head`.
    """
    rank, seed = federation.top_rank, federation.config.seed
    scale = peft.scale(federation.slots, rank)
    adapter = {
        name: initial(m, n, rank, scale, derive(seed, "initial adapter", name))
        for name, (m, n) in peft.layers(federation.slots).items()
    }
    for name, given in (start or {}).items():
        fresh = adapter[name]
        B = given.B.float() * (given.scale / scale)
        adapter[name] = LoRA(
            torch.cat([given.A.float(), fresh.A[given.rank :]]),
            torch.cat([B, fresh.B[:, given.rank :]], dim=1),
            scale,
        )
    own_head = peft.read_head(federation.slots)
    return server.init(federation.method, adapter, {**own_head, **(head or {})}, seed)


class Returned(NamedTuple):
    """What came back from a cohort: replies; what each client keeps for itself, by id; those that sent
    none, each with its `id` and the `reason`; bytes down and up, by id; and seconds per phase."""

    replies: list[Reply]
    kept: dict[str, dict[str, Tensor]]
    missing: list[dict[str, Any]]
    traffic: dict[str, tuple[int, int]]
    seconds: dict[str, float]


class Engine(Protocol):
    """Where the clients of a federation are: in this process, or somewhere else."""

    def present(self, federation: Federation, round: int) -> Federation:
        """The federation with the clients that can be reached in this round."""
        ...

    def train(
        self,
        federation: Federation,
        state: ServerState,
        cohort: Sequence[Client],
        on_step: Callable[[], None],
    ) -> Returned:
        """Send each client what the state broadcasts, let it train, and gather the replies."""
        ...

    def evaluate(self, federation: Federation, state: ServerState) -> dict[str, Metrics]:
        """The metrics of each client on its own held-out rows, by id; {} if there are none."""
        ...


@dataclass(frozen=True)
class InProcess:
    """All clients in this process, one after the other, on one model. `answered`: whether this client
    answers in this round, as one on another machine may not; who does not is as if absent."""

    answered: Callable[[str, int], bool] = lambda id, round: True

    def present(self, federation: Federation, round: int) -> Federation:
        return federation

    def train(
        self,
        federation: Federation,
        state: ServerState,
        cohort: Sequence[Client],
        on_step: Callable[[], None],
    ) -> Returned:
        method, seed, round = federation.method, federation.config.seed, state.round + 1
        cohort = [client for client in cohort if self.answered(client.id, round)]
        seconds = {"broadcast": 0.0, "train": 0.0, "compute": 0.0}
        replies, kept = [], {}
        with training_mode(federation.slots.model):
            for client in cohort:
                start = perf_counter()
                sent = server.broadcast(method, state, client, seed)
                seconds["broadcast"] += perf_counter() - start
                start = perf_counter()
                own = state.clients.get(client.id, {})
                local = train_client(federation, client, sent, state.head, round, on_step, own=own)
                seconds["train"] += perf_counter() - start
                seconds["compute"] += local.seconds
                replies.append(local.reply)
                kept[client.id] = own | local.kept
        returned = {reply.client.id: reply.adapter for reply in replies}
        traffic = bytes_per_client(federation, cohort, returned)
        return Returned(replies, kept, [], traffic, seconds)

    def evaluate(self, federation: Federation, state: ServerState) -> dict[str, Metrics]:
        return {
            client.id: evaluate_client(federation, state, client, federation.own[client.id])
            for client in federation.clients
            if federation.own
        }


IN_PROCESS = InProcess()


def run_round(
    federation: Federation,
    state: ServerState,
    on_step: Callable[[], None] = lambda: None,
    engine: Engine = IN_PROCESS,
) -> tuple[ServerState, Round]:
    """One round: sample a cohort, send, let each client train, aggregate.

    Returns the next state and what happened, with bytes per client and seconds per phase.
    """
    config, method, seed = federation.config, federation.method, federation.config.seed
    round = state.round + 1
    federation = federation.in_round(round)
    labels = federation.labels_of(round)
    if labels is not None and begins(round, config.period):
        state = server.next_task(method, state)
    cohort = [as_now(client, state) for client in federation.cohort(round)]
    chance = config.participation.stragglers
    returned = engine.train(federation, state, cohort, on_step)
    if federation.privacy is not None:
        following, outcome = server.release(
            federation.privacy, method, state, returned.replies, seed
        )
    else:
        following, outcome = server.aggregate(
            method,
            federation.weighting,
            state,
            returned.replies,
            seed,
            silence=silence([federation.layers_of(c) for c in cohort], chance) if chance else None,
            channel=federation.channel,
            head_rows=None if labels is None else peft.label_rows(federation.slots, labels),
            guard=federation.guard,
        )
    refused = [*outcome.refused, *returned.missing]
    for record in (*outcome.clients, *refused):
        record["bytes_down"], record["bytes_up"] = returned.traffic[record["id"]]
    # a client whose training diverged begins again from what it had
    kept = returned.kept | {r["id"]: state.clients.get(r["id"], {}) for r in refused}
    clients = {id: own for id, own in (state.clients | kept).items() if own}
    seconds = returned.seconds | outcome.seconds
    return replace(following, clients=clients), replace(outcome, refused=refused, seconds=seconds)


def as_now(client: Client, state: ServerState) -> Client:
    """The client with the rank that it has come down to."""
    rank = state.clients.get(client.id, {}).get("rank")
    return client if rank is None else replace(client, rank=int(rank))


class Local(NamedTuple):
    """What came of a client's local training: its reply as it arrives, what it keeps for itself, and the
    seconds spent in forward, backward and optimizer."""

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
) -> Local:
    """What one client does in a round. `layers`: those it trains (None: those it reaches); `own`: what
    it has kept from earlier rounds.
    """
    config, slots, slot = federation.config, federation.slots, federation.slot_of(client)
    period = config.period
    if layers is None:
        chance = config.participation.stragglers
        late = derive(config.seed, "straggler", round, client.id)
        layers = reached(federation.layers_of(client), chance, late)
    rows, own = federation.rows[client.id], own or {}
    steps = config.training.steps_for(len(rows))
    before = start_of(sent, own)
    known = federation.known_labels(federation.labels_of(round))
    with deployed(federation, slot, sent, head, own) as alphas, known:
        trained = train(
            slots.model,
            [
                *peft.activate(slots, slot, {name: sent[name].train for name in layers}),
                *(alphas[name] for name in layers if name in alphas),
            ],
            rows,
            config.training,
            steps=steps,
            rate=lambda k: learning_rate(
                config.training, period, (round - 1) % period + (k + 0.5) / steps
            ),
            pad_id=federation.pad_id,
            autocast=federation.autocast,
            seed=derive(config.seed, "training", round, client.id),
            on_step=on_step,
            penalty=penalty(federation, slot, before, layers),
        )
    after = {name: prefix_of(lora, sent[name]) for name, lora in peft.read(slots, slot).items()}
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
    reply = Reply(client, round, adapter, head, trained.loss, steps, bound, magnitudes)
    return Local(carried_reply(reply, sent), kept, trained.seconds)


def disagreement(losses: Sequence[float]) -> float:
    """The distance of the bounds that a client estimates; NaN, which the server refuses, if its
    training diverged."""
    try:
        lower, upper = moment_bounds(losses)
    except ValueError:
        return math.nan
    return upper - lower


def start_of(sent: Mapping[str, Broadcast], own: Mapping[str, Tensor]) -> dict[str, LoRA]:
    """The adapters a client starts from: as sent, but with the factors that it keeps for itself."""
    return {
        name: replace(
            b.lora, **{f: own[f"{name}.{f}"] for f in sorted(b.keep) if f"{name}.{f}" in own}
        )
        for name, b in sent.items()
    }


def prefix_of(lora: LoRA, sent: Broadcast) -> LoRA:
    """The components that were sent, of the slot that held them."""
    rank = sent.lora.rank
    return LoRA(lora.A[:rank].contiguous(), lora.B[:, :rank].contiguous(), lora.scale)


def shared(lora: LoRA, sent: Broadcast) -> LoRA:
    """What leaves the client: its adapter, with the factors that it keeps as they were sent."""
    return replace(lora, **{factor: getattr(sent.lora, factor) for factor in sorted(sent.keep)})


def penalty(
    federation: Federation, slot: int, start: Mapping[str, LoRA], layers: Sequence[str]
) -> Callable[[], Tensor] | None:
    """The method's own term of the clients' loss, over the layers trained; None without one."""
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
    """Inside the block the model is what was sent, with this head, in the slot of rank `slot`. Gives the
    magnitudes of frozen directions, which can be trained, by layer.

    An adapter of lower rank fills the slot's first components; the others are zero in both factors,
    and so they stay. `own`: factors that the client has kept.
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


def bytes_per_client(
    federation: Federation,
    cohort: Sequence[Client],
    returned: Mapping[str, Collection[str]] | None = None,
    ranks: Sequence[int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Bytes down and up for each client of this cohort: adapters in the type of its payload, with int8 the
    steps, too, and the head in float32; without headers.

    `returned`: the layers that each client returned, by id; those that it trains unless given. `ranks`:
    those of the round's cohort, if these clients are not just that.
    """
    ranks = [client.rank for client in cohort] if ranks is None else ranks
    head = sum(p.numel() for p in federation.slots.head.values())
    shapes = peft.layers(federation.slots)
    table = {}
    for client in cohort:
        traffic = {
            name: federation.method.traffic(m, n, client.rank, ranks)
            for name, (m, n) in shapes.items()
        }
        layers = federation.layers_of(client) if returned is None else returned[client.id]
        size = {name: number_bytes(client.payload, m, n) for name, (m, n) in shapes.items()}
        down = sum(size[name] * t.down for name, t in traffic.items())
        up = sum(size[name] * traffic[name].up for name in layers)
        table[client.id] = (round(down + 4 * head), round(up + 4 * head))
    return table


def evaluate_global(federation: Federation, state: ServerState) -> Metrics | None:
    """Metrics of the model with the full-rank update; None without one, or without held-out rows."""
    full = {name: dense(delta) for name, delta in server.deltas(federation.method, state).items()}
    return evaluate_change(federation, state, full)


def evaluate_rank(
    federation: Federation,
    state: ServerState,
    rank: int,
    cut: Mapping[str, LoRA] | None = None,
) -> Metrics | None:
    """Metrics of `T_rank(W)` in every layer, what `fedhl export --rank` gives; None as above.

    `cut`: a truncation to at least this rank, of which it is a prefix, if there is one already.
    """
    cut = truncation(federation, state, rank) if cut is None else cut
    change = {name: prefix(lora, rank, 1.0).delta() for name, lora in cut.items()}
    return evaluate_change(federation, state, change)


def truncation(federation: Federation, state: ServerState, rank: int) -> dict[str, LoRA]:
    """`T_rank(W)` of every layer; {} if there is no global model."""
    deltas = server.deltas(federation.method, state)
    cut = rounds.side_by_side(lambda _, delta: truncate(delta, min(rank, *delta.shape)), deltas)
    return dict(cut)


def evaluate_change(
    federation: Federation, state: ServerState, change: Mapping[str, Tensor]
) -> Metrics | None:
    """Metrics of the base model with this change, on the server's rows; None without either."""
    if not change or not federation.held_out:
        return None
    slots = federation.slots
    with peft.offset(slots, change), peft.base_only(slots):
        peft.write_head(slots, state.head)
        return measure(federation, federation.held_out)


def evaluate_client(
    federation: Federation, state: ServerState, client: Client, rows: Sequence[Example]
) -> Metrics:
    """Metrics of what this client would start the next round from, on these rows."""
    client = as_now(client, state)
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    own = state.clients.get(client.id)
    with deployed(federation, federation.slot_of(client), sent, state.head, own):
        return measure(federation, rows)


def evaluate_clients(
    federation: Federation, state: ServerState, engine: Engine = IN_PROCESS
) -> dict[str, Any] | None:
    """Each client's metrics on its own held-out rows, their mean, and the worst; None without such rows."""
    by_client = engine.evaluate(federation, state)
    if not by_client:
        return None
    names = [name for name in ("loss", "accuracy") if name in next(iter(by_client.values()))]
    mean = {
        name: sum(metrics[name] for metrics in by_client.values()) / len(by_client)
        for name in names
    }
    # the worst client: by accuracy where there is one, by loss among equals
    worst = min(
        by_client, key=lambda id: (by_client[id].get("accuracy", 0.0), -by_client[id]["loss"])
    )
    return {"mean": mean, "worst": {"client": worst, **by_client[worst]}, "by_client": by_client}


def evaluate_tasks(federation: Federation, state: ServerState) -> dict[str, Any] | None:
    """The task that the last round belongs to, and the accuracy on the server's rows of each task so
    far, among all labels so far, of the full update. None before the first round, without a global
    model and without rows of the server's."""
    if state.round == 0:
        return None
    tasks = federation.tasks[: task_of(state.round, federation.config.period) + 1]
    accuracy = []
    with federation.known_labels([label for labels in tasks for label in labels]):
        for labels in tasks:
            rows = [example for example in federation.held_out if example.labels in labels]
            part = replace(federation, held_out=rows)
            metrics = evaluate_global(part, state)
            if metrics is None:
                return None
            accuracy.append(metrics["accuracy"])
    return {"current": len(tasks), "accuracy": accuracy}


def evaluate_round(
    federation: Federation, state: ServerState, every_rank: bool, engine: Engine = IN_PROCESS
) -> dict[str, Any]:
    """The full update, its truncation to the top rank, the clients' own rows; and every deployed
    rank, if asked for; with tasks, each task so far."""
    top = federation.top_rank
    cut = truncation(federation, state, top) if federation.held_out else {}
    full = evaluate_global(federation, state)
    truncated = evaluate_rank(federation, state, top, cut)
    ranks = sorted({client.rank for client in federation.clients})
    return (
        {
            "metric": "accuracy"
            if federation.config.task.kind == "sequence-classification"
            else "loss",
            "full": full,
            "truncated": truncated and {"rank": top, **truncated},
            "ranks": {
                str(rank): truncated if rank == top else evaluate_rank(federation, state, rank, cut)
                for rank in ranks
            }
            if every_rank and truncated
            else {},
            "clients": evaluate_clients(federation, state, engine),
        }
        | evaluate_validation(federation, state, engine)
        | ({"tasks": evaluate_tasks(federation, state)} if federation.tasks else {})
    )


def evaluate_validation(
    federation: Federation, state: ServerState, engine: Engine = IN_PROCESS
) -> dict[str, Any]:
    """The full update on the rows that settings are chosen by, or, without one, the mean over the
    clients' models, if they are in this process; {} without such rows."""
    rows = federation.validation
    if not rows:
        return {}
    metrics = evaluate_global(replace(federation, held_out=rows), state)
    if metrics is None and not isinstance(engine, InProcess):
        return {}
    if metrics is None:
        every = replace(federation, own={client.id: rows for client in federation.clients})
        metrics = (evaluate_clients(every, state) or {})["mean"]
    return {"validation": metrics}


def measure(federation: Federation, rows: Sequence[Example]) -> Metrics:
    """Metrics of the model as it is now."""
    return evaluate(
        federation.slots.model,
        rows,
        batch_size=federation.config.evaluation.batch_size,
        pad_id=federation.pad_id,
        device=federation.device,
        autocast=federation.autocast,
    )
