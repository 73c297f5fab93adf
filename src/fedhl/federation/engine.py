"""A federation in one process: the loop to read first, and the oracle for every other engine.

One base model stays in memory with one adapter slot per distinct rank. A client is a set of rows
and a rank: the adapter that it is sent is copied into the slot of its rank, trained there, and copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedhl import server
from fedhl.data.label_groups import begins
from fedhl.federation.federation import Federation, at_current_rank
from fedhl.federation.local import evaluate_client, train_client
from fedhl.federation.personal import Personal, personal_models
from fedhl.federation.traffic import bytes_moved
from fedhl.method import remembers
from fedhl.model.evaluation import Metrics
from fedhl.model.training import training_mode
from fedhl.server import Client, Outcome, Reply, ServerState
from fedhl.server.layers import Layers
from fedhl.watch import Watcher


class Returned(NamedTuple):
    """What came back from a cohort.

    `replies`; `kept`: the tensors that each client keeps for itself, by client id; `missing`: the clients
    without a reply, each with its `id` and the `reason`; `traffic`: bytes down and up, by client id;
    `seconds`: by phase; `forgotten`: the ids of the clients that had lost what they held.
    """

    replies: list[Reply]
    kept: dict[str, dict[str, Tensor]]
    missing: list[dict[str, Any]]
    traffic: dict[str, tuple[int, int]]
    seconds: dict[str, float]
    forgotten: frozenset[str] = frozenset()


class Engine(Protocol):
    """The place of a federation's clients: in this process, or somewhere else."""

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
        """The metrics of each client on its own held-out rows, by client id; {} if no client has such
        rows."""
        ...

    def personal(
        self, federation: Federation, state: ServerState, watcher: Watcher
    ) -> Iterator[tuple[Client, Personal | None, dict[str, Any]]]:
        """One client after the other with its personal model, None if that is elsewhere, and the record of
        it (see `fedhl.federation.personal`); without the clients that do not answer."""
        ...


@dataclass(frozen=True)
class InProcess:
    """All clients in this process, one after the other, on one model.

    `answered(client id, round)`: whether the client answers in this round. A client on another machine may
    not answer; a client that does not counts as absent. `forgets(client id, round)`: whether it has lost what
    it held, and begins this round as a newcomer.
    """

    answered: Callable[[str, int], bool] = lambda id, round: True
    forgets: Callable[[str, int], bool] = lambda id, round: False

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
        forgotten = frozenset(client.id for client in cohort if self.forgets(client.id, round))
        state = server.forget(state, forgotten)
        seconds = {"broadcast": 0.0, "train": 0.0, "compute": 0.0}
        layers, replies, kept, traffic = Layers(method, state, seed), [], {}, {}
        versions = layers.versions(cohort) if remembers(method) else {}
        with training_mode(federation.slots.model):
            for client in cohort:
                start = perf_counter()
                travels = {layer.name: layer.sender()(client) for layer in layers}
                sent = {layer.name: layer.start(client, travels[layer.name]) for layer in layers}
                seconds["broadcast"] += perf_counter() - start
                start = perf_counter()
                own = state.clients.get(client.id, {})
                version = versions.get(client.id)
                local = train_client(
                    federation, client, sent, state.head, round, on_step, own=own, version=version
                )
                seconds["train"] += perf_counter() - start
                seconds["compute"] += local.seconds
                replies.append(local.reply)
                kept[client.id] = own | local.kept
                moved = bytes_moved(travels, local.reply)
                traffic[client.id] = (0, 0) if federation.pooled else moved
        return Returned(replies, kept, [], traffic, seconds, forgotten)

    def evaluate(self, federation: Federation, state: ServerState) -> dict[str, Metrics]:
        clients = {client.id: client for client in federation.clients}
        if federation.pooled:  # one model for all
            clients = dict.fromkeys(federation.own, federation.clients[0])
        return {
            id: evaluate_client(federation, state, client, federation.own[id])
            for id, client in clients.items()
            if federation.own
        }

    def personal(
        self, federation: Federation, state: ServerState, watcher: Watcher
    ) -> Iterator[tuple[Client, Personal | None, dict[str, Any]]]:
        return personal_models(federation, state, watcher)


IN_PROCESS = InProcess()


def run_round(
    federation: Federation,
    state: ServerState,
    on_step: Callable[[], None] = lambda: None,
    engine: Engine = IN_PROCESS,
) -> tuple[ServerState, Outcome]:
    """One round: sample a cohort, send, let each client train, aggregate.

    Returns the next state and what happened, with bytes per client and seconds per phase.
    """
    config, method, seed = federation.config, federation.method, federation.config.seed
    round = state.round + 1
    federation = federation.in_round(round)
    labels = federation.labels_of(round)
    if labels is not None and begins(round, config.period):
        state = server.next_task(method, state)
    cohort = [at_current_rank(client, state) for client in federation.cohort(round)]
    returned = engine.train(federation, state, cohort, on_step)
    state, replies = server.forget(state, returned.forgotten), returned.replies
    if federation.privacy is not None:
        following, outcome = server.release(federation.privacy, method, state, replies, seed)
    else:
        rules = federation.rules(cohort, labels)
        weighting = federation.weighting
        following, outcome = server.aggregate(method, weighting, state, replies, seed, rules)
    refused = [*outcome.refused, *returned.missing]
    for record in (*outcome.clients, *refused):
        record["bytes_down"], record["bytes_up"] = returned.traffic[record["id"]]
        if record["id"] in returned.forgotten:
            record["forgotten"] = True
    # a client whose training diverged begins again from what it had
    kept = returned.kept | {r["id"]: state.clients.get(r["id"], {}) for r in refused}
    clients = {id: own for id, own in (state.clients | kept).items() if own}
    seconds = returned.seconds | outcome.seconds
    return replace(following, clients=clients), replace(outcome, refused=refused, seconds=seconds)
