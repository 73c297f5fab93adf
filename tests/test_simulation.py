"""The in-process federation against the obvious one: for every client a fresh model and a fresh adapter.

If shared slots, in-place copies or a round before left anything behind, the two would differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.characters import characters
from support.reference import dense as reference
from support.small_federation import RANKS, federate, kinds, same, tensors
from support.small_models import HEADS, build
from torch import Tensor
from transformers import PreTrainedModel

from fedhl import METHODS, server
from fedhl.config import Config
from fedhl.federation import local, scores
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation, at_current_rank, initial_state
from fedhl.federation.prepare import prepare
from fedhl.lora import LoRA, add_products, dense, initial, own, prefix
from fedhl.method import Broadcast, Method, Traffic, Update, checked, remembers
from fedhl.model import peft
from fedhl.model.evaluation import Metrics, evaluate
from fedhl.model.training import batches, learning_rate
from fedhl.seeds import derive
from fedhl.server import Client, Reply, ServerState
from fedhl.server.ledger import next_version
from fedhl.task.examples import Example, collate

# PEFT asks transformers for a property that a newer transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

EPS32 = torch.finfo(torch.float32).eps


# --- the obvious federation ---------------------------------------------------------------------


def fresh(kind: str, client: Client, sent: Mapping[str, Broadcast]) -> tuple[Any, PreTrainedModel]:
    """A new base model with what is sent in an adapter that PEFT makes: (PEFT model, base)."""
    base = build(kind, dropout=0.1)
    for name, b in sent.items():
        if b.base is not None:
            weight = base.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.data += b.base.T if kind == "gpt2" else b.base
    config = LoraConfig(
        r=client.rank,
        lora_alpha=8,
        use_rslora=True,
        target_modules=list(sent),
        lora_dropout=0.1,
        fan_in_fan_out=kind == "gpt2",
    )
    model = get_peft_model(base, config)
    for name, b in sent.items():
        layer: Any = base.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(b.lora.scale)
        layer.lora_A["default"].weight.data = b.lora.A.clone()
        layer.lora_B["default"].weight.data = b.lora.B.clone()
    return model, base


def naive_client(
    federation: Federation,
    kind: str,
    client: Client,
    state: ServerState,
    own: dict[str, dict[str, Tensor]] | None = None,
) -> Reply:
    """Load, train with the seeds of this client and round, read. `own`: the factors of each layer that
    the client keeps, which this replaces."""
    config, round = federation.config, state.round + 1
    training, seed = config.training, derive(config.seed, "training", round, client.id)
    sent = server.broadcast(federation.method, state, client, config.seed)
    own = {} if own is None else own
    begin = {n: replace(b, lora=replace(b.lora, **own.get(n, {}))) for n, b in sent.items()}
    model, base = fresh(kind, client, begin)
    parameters: list[Any] = []
    for name, b in sent.items():
        layer: Any = base.get_submodule(name)
        factors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        for key, parameter in factors.items():
            parameter.requires_grad_(key in b.train)
            parameters += [parameter] if key in b.train else []
    for name in HEADS[kind]:
        parameter = base.get_parameter(name)
        parameter.data = state.head[name].clone()
        parameters.append(parameter.requires_grad_(True))
    optimizer = torch.optim.AdamW(parameters, weight_decay=training.weight_decay)
    order = batches(len(federation.rows[client.id]), training.batch_size, seed)
    steps, losses = training.steps_for(len(federation.rows[client.id])), []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "dropout"))
        for k in range(steps):
            progress = state.round + (k + 0.5) / steps
            optimizer.param_groups[0]["lr"] = learning_rate(training, config.rounds, progress)
            batch = collate([federation.rows[client.id][j] for j in next(order)], 0)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or torch.inf)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    adapter = {}
    for name in sent:
        layer = base.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        trained = {"A": A.detach(), "B": B.detach()}
        own[name] = {factor: trained[factor] for factor in sent[name].keep}
        theirs = trained | {factor: getattr(sent[name].lora, factor) for factor in sent[name].keep}
        adapter[name] = LoRA(**theirs, scale=layer.scaling["default"])
    head = {name: base.get_parameter(name).detach() for name in state.head}
    travels = server.travelling(federation.method, state, client, federation.config.seed)
    held = state.ledger.version(client.id)
    version = next_version(held, travels) if remembers(federation.method) else None
    return Reply(client, round, adapter, head, sum(losses) / steps, steps, version=version)


def measure(federation: Federation, model: PreTrainedModel, examples: Sequence[Example]) -> Metrics:
    return evaluate(
        model.eval(),
        examples,
        objective=federation.objective,
        batch_size=5,
        device=torch.device("cpu"),
        autocast=federation.autocast,
    )


def close(metrics: Metrics) -> dict[str, Any]:
    """Forward passes whose weights were put together in another order: rounding of logits of about 10."""
    return {name: pytest.approx(value, abs=200 * EPS32) for name, value in metrics.items()}


# --- rounds -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", ["fedhl", "flexlora"])
def test_rounds_are_those_of_separate_fresh_models(kind: str, name: str) -> None:
    """Two rounds: in the second, W has rank and every slot has been used by others."""
    federation = federate(kind, method=name)
    state = initial_state(federation)
    before = {n: p.detach().clone() for n, p in federation.slots.model.named_parameters()}
    for _ in range(2):
        following, outcome = run_round(federation, state)
        cohort = sorted(federation.clients, key=lambda client: client.id)
        replies = [naive_client(federation, kind, client, state) for client in cohort]
        want, _ = server.aggregate(
            federation.method, federation.weighting, state, replies, federation.config.seed
        )
        assert same(following, want)
        assert [c["loss"] for c in outcome.clients] == [r.loss for r in replies]
        assert [c["id"] for c in outcome.clients] == sorted(RANKS) and outcome.refused == []
        for layer, x in following.layers.items():
            clients = [
                reference.Client(c["weight"], c["scale"], r.adapter[layer].B, r.adapter[layer].A)
                for c, r in zip(outcome.clients, replies, strict=True)
            ]
            W = state.layers[layer].W
            dense_want = (
                reference.fedhl(W, clients) if name == "fedhl" else reference.flexlora(clients)
            )
            size = W.norm() + sum(c.p * c.s * c.B.norm() * c.A.norm() for c in clients)
            assert (x.W - dense_want).norm() <= 20 * EPS32 * size
            assert (x.W - W).norm() > 1e3 * EPS32 * size, "something was learned"
        state = following
    changeable = set(HEADS[kind])
    for n, p in federation.slots.model.named_parameters():
        if ".lora_" not in n and n not in changeable:
            assert torch.equal(p, before[n]), f"{n}: the base is frozen"


ALIKE = dict.fromkeys(RANKS, 4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_as_separate_fresh_models_would(name: str) -> None:
    """Bases, frozen factors, factors that stay with the client, masks: all through PEFT's own layers,
    for three rounds, so that methods which alternate have done both."""
    ranks = {client: RANKS[client] for client in ("ada", "bob")}
    ranks = ranks if METHODS[name].mixed_ranks else dict.fromkeys(ranks, 4)
    federation = federate("bert", ranks, method=name, training={"steps": 2})
    state, kept = initial_state(federation), {client: {} for client in ranks}
    for _ in range(3):
        following, outcome = run_round(federation, state)
        assert not outcome.refused
        cohort = sorted(federation.clients, key=lambda client: client.id)
        cohort = [at_current_rank(client, state) for client in cohort]
        if name in PENALISED:
            # another loss than that of the fresh models; that it trains at all is seen here
            assert all(client["drift"] > 0 for client in outcome.clients)
            state = following
            continue
        replies = [
            naive_client(federation, "bert", client, state, kept[client.id]) for client in cohort
        ]
        want, _ = server.aggregate(
            federation.method, federation.weighting, state, replies, federation.config.seed
        )
        assert same(*(replace(x, clients={}) for x in (following, want)))
        state = following
    for layer, x in state.layers.items():
        if federation.method.delta(x) is None:
            assert all(f"{layer}.B" in state.clients[client] for client in ranks)
    assert scores.evaluate_round(federation, state, every_rank=True)["metric"] == "accuracy"


PENALISED = {"hetlora"}
"""Methods whose clients add a term of their own to the loss."""


def test_evaluating_between_rounds_changes_nothing() -> None:
    looked, blind = federate("bert", own=4), federate("bert", own=4)
    a, b = initial_state(looked), initial_state(blind)
    for _ in range(2):
        scores.evaluate_round(looked, a, every_rank=True)
        a, first = run_round(looked, a)
        b, second = run_round(blind, b)
        assert same(a, b) and first.clients == second.clients


def test_a_model_that_has_learnt_nothing_is_evaluated_once() -> None:
    """W = 0 and its truncations are one model."""
    federation, passes = federate("bert", own=0), []
    hook = federation.slots.model.register_forward_hook(lambda *_: passes.append(1))
    state = initial_state(federation)
    scores.evaluate_global(federation, state)
    once = len(passes)
    at_zero = scores.evaluate_round(federation, state, every_rank=True)
    assert len(passes) == 2 * once
    before, rank = at_zero["full"], federation.top_rank
    assert at_zero["truncated"] == {"rank": rank, **before}
    assert all(metrics == before for metrics in at_zero["ranks"].values())
    assert at_zero["ranks"].keys() == {str(client.rank) for client in federation.clients}
    state, _ = run_round(federation, state)
    passes.clear()
    scores.evaluate_round(federation, state, every_rank=True)
    assert len(passes) == once * (1 + len(at_zero["ranks"]))
    hook.remove()


def test_a_round_depends_on_the_seed_and_on_the_round() -> None:
    def play(seed: int) -> ServerState:
        federation = federate("bert", seed=seed)
        return run_round(federation, initial_state(federation))[0]

    assert same(play(0), play(0))
    assert not same(play(0), play(1))


def test_the_global_random_state_is_left_alone() -> None:
    federation = federate("llama")
    state = initial_state(federation)
    before = torch.random.get_rng_state()
    run_round(federation, state)
    scores.evaluate_round(federation, state, every_rank=True)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("participation", [{"fraction": 0.5}, {"count": 2}])
def test_partial_participation(participation: dict[str, Any]) -> None:
    federation = federate("bert", participation=participation, rounds=9)
    state, seen, calls = initial_state(federation), set(), []
    for round in range(1, 6):
        calls.clear()
        state, outcome = run_round(federation, state, on_step=lambda: calls.append(None))
        ids = [c["id"] for c in outcome.clients]
        cohort = server.sample(federation.clients, 2, federation.config.seed, round)
        assert ids == [client.id for client in cohort] and len(ids) == 2
        assert len(calls) == 2 * 3
        seen |= set(ids)
    assert seen == set(RANKS)


def test_an_update_that_diverged_is_refused_and_the_round_goes_on() -> None:
    """At an absurd learning rate everything becomes NaN; the next client finds no trace of it."""
    federation = federate("bert")
    state = initial_state(federation)
    steep = federation.config.training.model_copy(update={"learning_rate": 1e30})
    wild = replace(federation, config=federation.config.model_copy(update={"training": steep}))
    following, outcome = run_round(wild, state)
    assert {r["id"] for r in outcome.refused} == set(RANKS) and outcome.clients == []
    assert all("did training diverge?" in r["reason"] for r in outcome.refused)
    assert same(replace(following, round=0), state)
    following, outcome = run_round(federation, replace(following, round=0))
    assert same(following, run_round(federate("bert"), state)[0])


def test_a_client_that_diverged_keeps_what_it_had() -> None:
    """Its own factors, as they were: else it would start from NaN in every later round."""
    federation = federate("bert", ALIKE, method="fedsa_lora", own=4)
    state, _ = run_round(federation, initial_state(federation))
    steep = federation.config.training.model_copy(update={"learning_rate": 1e30})
    wild = replace(federation, config=federation.config.model_copy(update={"training": steep}))
    lost, outcome = run_round(wild, state)
    assert len(outcome.refused) == len(RANKS)
    for client, kept in state.clients.items():
        assert all(torch.equal(x, lost.clients[client][name]) for name, x in kept.items())
    _, outcome = run_round(federation, lost)
    assert not outcome.refused and len(outcome.clients) == len(RANKS)


def test_personal_models_are_judged_by_their_mean_on_validation_rows() -> None:
    federation = federate("bert", ALIKE, method="fedsa_lora", own=4)
    federation = replace(federation, validation=federation.held_out)
    state, _ = run_round(federation, initial_state(federation))
    losses = [
        local.evaluate_client(federation, state, client, federation.validation)["loss"]
        for client in federation.clients
    ]
    got = scores.evaluate_round(federation, state, every_rank=True)
    assert got["validation"]["loss"] == pytest.approx(sum(losses) / len(losses))
    assert got["full"] is got["truncated"] is None and got["ranks"] == {}
    # of a global model it is that of the full update
    federation = replace(federate("bert"), validation=federation.validation)
    got = scores.evaluate_round(federation, initial_state(federation), every_rank=False)
    assert got["validation"] == got["full"]


def test_bfloat16_autocast_runs() -> None:
    federation = federate("llama", compute={"precision": "bfloat16"})
    state, outcome = run_round(federation, initial_state(federation))
    assert len(outcome.clients) == len(RANKS)
    assert {t.dtype for t in tensors(state)} == {torch.float32}
    metrics = scores.evaluate_global(federation, state)
    plain = replace(federation, config=federate("llama").config)
    exact = scores.evaluate_global(plain, state)
    assert metrics and exact and metrics["loss"] != exact["loss"]
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=2**-5)  # roundings of 2^-9


# --- bytes --------------------------------------------------------------------------------------


@kinds
def test_bytes_are_those_of_the_tensors_that_travel(kind: str) -> None:
    federation = federate(kind)
    state = initial_state(federation)
    _, outcome = run_round(federation, state)
    for client, record in zip(
        sorted(federation.clients, key=lambda c: c.id), outcome.clients, strict=True
    ):
        sent = server.broadcast(federation.method, state, client, federation.config.seed)
        reply = local.train_client(federation, client, sent, state.head, 1).reply
        down = [t for b in sent.values() for t in (b.lora.A, b.lora.B)] + list(state.head.values())
        up = [t for x in reply.adapter.values() for t in (x.A, x.B)] + list(reply.head.values())
        assert record["bytes_down"] == sum(t.numel() * t.element_size() for t in down)
        assert record["bytes_up"] == sum(t.numel() * t.element_size() for t in up)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2"])
def trained(request: pytest.FixtureRequest) -> tuple[str, Federation, ServerState]:
    """Two rounds in, and the slots dirty."""
    federation = federate(request.param, own=4)
    state = initial_state(federation)
    for _ in range(2):
        state, _ = run_round(federation, state)
    return request.param, federation, state


def merged(kind: str, state: ServerState, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
    """A fresh base model with dense updates and the head written into its weights."""
    model = build(kind)
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data += (delta.T if kind == "gpt2" else delta).to(weight)
    for name, value in state.head.items():
        model.get_parameter(name).data = value.clone()
    return model


def test_the_global_model_is_the_merged_one(trained: tuple[str, Federation, ServerState]) -> None:
    kind, federation, state = trained
    model = merged(kind, state, {n: s.W for n, s in state.layers.items()})
    want = measure(federation, model, federation.held_out)
    got = scores.evaluate_global(federation, state)
    assert got == close(want)
    untouched = measure(federation, merged(kind, state, {}), federation.held_out)
    assert got and abs(got["loss"] - untouched["loss"]) > 1e-3, "the update is in it"


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_rank_is_the_model_with_the_best_truncation(
    trained: tuple[str, Federation, ServerState], rank: int
) -> None:
    kind, federation, state = trained
    truncated = {n: reference.truncation(s.W, rank) for n, s in state.layers.items()}
    want = measure(federation, merged(kind, state, truncated), federation.held_out)
    got = scores.evaluate_rank(federation, state, rank)
    assert got == close(want)
    # and so is what a client of this rank is sent, in an adapter of PEFT's own
    client = Client("x", rank, peft.scale(federation.slots, rank), 0)
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    model, base = fresh(kind, client, sent)
    for name, value in state.head.items():
        base.get_parameter(name).data = value.clone()
    assert got == close(measure(federation, model.eval(), federation.held_out))


def test_clients_on_their_own_rows(trained: tuple[str, Federation, ServerState]) -> None:
    kind, federation, state = trained
    got = scores.evaluate_clients(federation, state)
    assert got is not None and set(got["by_client"]) == set(RANKS)
    for name, rank in RANKS.items():
        deltas = {n: reference.truncation(s.W, rank) for n, s in state.layers.items()}
        model = merged(kind, state, deltas)
        assert got["by_client"][name] == close(measure(federation, model, federation.own[name]))
    table = got["by_client"]
    metrics = ("loss", "accuracy") if kind == "bert" else ("loss",)
    assert got["mean"] == {
        m: pytest.approx(sum(row[m] for row in table.values()) / len(RANKS)) for m in metrics
    }
    # all clients have the same number of rows, so that the order of the intervals is that of the accuracies
    key = (lambda n: (-table[n]["accuracy"], table[n]["loss"])) if kind == "bert" else None
    worst = max(table, key=key or (lambda n: table[n]["loss"]))
    assert got["worst"] == {"client": worst, **table[worst]}


def test_evaluate_round(trained: tuple[str, Federation, ServerState]) -> None:
    kind, federation, state = trained
    got = scores.evaluate_round(federation, state, every_rank=True)
    assert got["metric"] == ("accuracy" if kind == "bert" else "loss")
    assert got["full"] == scores.evaluate_global(federation, state)
    assert got["truncated"] == {"rank": 4, **got["ranks"]["4"]}
    assert list(got["ranks"]) == ["2", "3", "4"]
    for rank in (2, 3, 4):
        assert got["ranks"][str(rank)] == scores.evaluate_rank(federation, state, rank)
    assert got["clients"] == scores.evaluate_clients(federation, state)
    assert scores.evaluate_round(federation, state, every_rank=False)["ranks"] == {}


def test_a_server_without_rows(trained: tuple[str, Federation, ServerState]) -> None:
    _, federation, state = trained
    got = scores.evaluate_round(replace(federation, held_out=[]), state, every_rank=True)
    assert (got["full"], got["truncated"], got["ranks"]) == (None, None, {})
    assert got["clients"] == scores.evaluate_clients(federation, state)
    nobody = replace(federation, held_out=[], own={})
    assert scores.evaluate_round(nobody, state, every_rank=True)["clients"] is None


# --- the start ----------------------------------------------------------------------------------


@kinds
def test_the_initial_state(kind: str) -> None:
    """The model as it was, and `A_r` the first r rows of `A_rmax`, different in every layer."""
    federation = federate(kind)
    state = initial_state(federation)
    sent = {
        c.rank: server.broadcast(federation.method, state, c, federation.config.seed)
        for c in federation.clients
    }
    for name in state.layers:
        top = sent[4][name].lora
        for rank, layers in sent.items():
            lora = layers[name].lora
            assert torch.equal(lora.A, top.A[:rank]) and not lora.B.any()
            assert lora.A.any(dim=1).all()
    firsts = [layers.lora.A[0, :8] for layers in sent[4].values()]
    assert len({tuple(a.tolist()) for a in firsts}) == len(firsts)
    want = measure(federation, build(kind), federation.held_out)
    assert scores.evaluate_global(federation, state) == want
    for rank in (2, 3, 4):
        assert scores.evaluate_rank(federation, state, rank) == want
    own = {name: build(kind).get_parameter(name) for name in HEADS[kind]}
    assert state.head.keys() == own.keys()
    assert all(torch.equal(state.head[name], own[name]) for name in own)


def test_a_prepared_run_always_starts_from_the_same_state(tmp_path: Path) -> None:
    """Also after rounds have been played, which leave a trained head in the model."""
    model = build("bert")
    model.resize_token_embeddings(128, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    characters().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": f"text {k}", "label": "abc"[k % 3]}) for k in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config: dict[str, Any] = {
        "name": "prepared",
        "model": {"source": str(tmp_path / "model")},
        "task": {"kind": "sequence-classification", "max_length": 8},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "partition": {"kind": "iid", "clients": 3},
        "lora": {"targets": ["query"], "ranks": [2, 4, 4]},
        "training": {"steps": 1},
        "compute": {"device": "cpu"},
    }
    prepared = prepare(Config.model_validate(config))
    first = prepared.initial_state()
    after, _ = run_round(prepared.federation, first)
    assert not torch.equal(after.head["classifier.weight"], first.head["classifier.weight"])
    assert same(prepared.initial_state(), first)


def given_adapter(federation: Federation, rank: int, scale: float) -> dict[str, LoRA]:
    """An adapter as another training left it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return {
            name: LoRA(torch.randn(rank, n) / 6, torch.randn(m, rank) / 6, scale)
            for name, (m, n) in peft.layers(federation.slots).items()
        }


@pytest.mark.parametrize("name", ["fedhl", "flexlora", "fedit"])
def test_starting_from_a_smaller_adapter_of_another_scale(name: str) -> None:
    """Its change to the model is reproduced, and every component of the top rank can still learn."""
    ranks = dict.fromkeys(RANKS, 4) if name == "fedit" else RANKS
    federation = federate("llama", ranks, method=name)
    given = given_adapter(federation, rank=2, scale=3.7)
    state = initial_state(federation, given)
    for layer, x in given.items():
        got = federation.method.delta(state.layers[layer])
        assert got is not None
        want = 3.7 * x.B.double() @ x.A.double()
        # products of inner size 2 with a scale before and a scale after: element by element
        bound = 8 * EPS32 * 3.7 * x.B.abs() @ x.A.abs()
        assert ((dense(got) - want).abs() <= bound).all()
    model = merged("llama", state, {n: x.delta() for n, x in given.items()})
    want = measure(federation, model, federation.held_out)
    assert scores.evaluate_global(federation, state) == close(want)
    assert scores.evaluate_rank(federation, state, 4) == close(want)
    client = Client("bob", 4, peft.scale(federation.slots, 4), 8)
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    reply = local.train_client(federation, client, sent, state.head, 1).reply
    for layer, b in sent.items():
        moved = (reply.adapter[layer].B - b.lora.B).norm(dim=0)
        assert (moved > 0).all(), f"{layer}: a dead component"


def test_a_start_is_evaluated_without_the_dropout_of_the_adapters() -> None:
    """Adapters are attached after the model was put in evaluation mode."""
    plain, dropping = (federate("llama", lora={"dropout": p}) for p in (0.0, 0.5))
    assert not any(module.training for module in dropping.slots.model.modules())
    given = given_adapter(plain, rank=4, scale=2.0)
    want, got = (scores.evaluate_rank(x, initial_state(x, given), 4) for x in (plain, dropping))
    assert got == want


def test_a_start_for_some_layers_and_with_a_head() -> None:
    federation = federate("bert")
    given = given_adapter(federation, rank=4, scale=2.0)
    first = sorted(given)[0]
    head = {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])}
    state = initial_state(federation, {first: given[first]}, head)
    for layer, x in state.layers.items():
        assert bool(x.W.any()) == (layer == first)
    assert torch.equal(state.head["classifier.bias"], head["classifier.bias"])
    own = build("bert").get_parameter("classifier.weight")
    assert torch.equal(state.head["classifier.weight"], own)


# --- methods from elsewhere ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kept:
    """`W`: what has been learned; `A`: the A that every round starts from."""

    W: Tensor
    A: Tensor


@dataclass(frozen=True)
class Restart(Method[Kept]):
    """Every round a new adapter on top of the merged model: `base = W`, `B = 0`; `W ← W + Σ p ΔW`."""

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "gauge", "one client"})

    def init(self, lora: LoRA, seed: int = 0) -> Kept:
        del seed
        return Kept(lora.delta(), own(lora).A)

    def broadcast(self, state: Kept, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        B = torch.zeros(state.W.shape[0], rank)
        return Broadcast(LoRA(state.A[:rank].clone(), B, scale), base=state.W)

    def aggregate(self, state: Kept, updates: Iterable[Update]) -> Kept:
        m, n = state.W.shape
        terms = ((u.weight, u.lora) for u in checked(updates, (m, n)))
        return Kept(add_products(state.W, terms), state.A)

    def delta(self, state: Kept) -> Tensor:
        return state.W

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        del cohort
        return Traffic(down=rank * (m + n) + m * n, up=rank * (m + n))


@dataclass(frozen=True)
class FrozenA(Method[LoRA]):
    """Only B is trained and sent back; A is the initial one for ever."""

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset()

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        del seed
        return own(lora)

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        return Broadcast(prefix(state, rank, scale), train=frozenset({"B"}))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        B = torch.zeros_like(state.B)
        for u in checked(updates, state.shape):
            B[:, : u.lora.rank] += u.weight * (u.lora.scale / state.scale) * u.lora.B
        return LoRA(state.A, B, state.scale)

    def delta(self, state: LoRA) -> LoRA:
        return state

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        del cohort
        return Traffic(down=(m + n) * rank, up=m * rank)


@kinds
def test_a_base_is_trained_upon_and_taken_off_again(kind: str) -> None:
    federation = federate(kind, method=Restart())
    state = initial_state(federation)
    before = {n: p.detach().clone() for n, p in federation.slots.model.named_parameters()}
    for _ in range(2):
        following, _ = run_round(federation, state)
        replies = [naive_client(federation, kind, c, state) for c in federation.clients]
        want, outcome = server.aggregate(
            federation.method, federation.weighting, state, replies, federation.config.seed
        )
        assert same(following, want)
        # the start of every client is all of W, so nobody lacks anything
        assert [c["error"] for c in outcome.clients] == [0.0] * len(RANKS)
        state = following
    for name, parameter in federation.slots.model.named_parameters():
        if ".lora_" not in name and name not in HEADS[kind]:
            assert torch.equal(parameter, before[name])
    assert all(x.W.any() for x in state.layers.values())
    # a fresh B adds nothing to the base, at any rank
    full = scores.evaluate_global(federation, state)
    assert full is not None
    client = Client("evaluation", 2, peft.scale(federation.slots, 2), 0)
    sent = local.evaluate_client(federation, state, client, federation.held_out)
    assert sent == close(full)
    # a rank of 2 is less than that
    cut = scores.evaluate_rank(federation, state, 2)
    assert cut is not None and cut["loss"] != pytest.approx(full["loss"], abs=200 * EPS32)


@kinds
def test_a_factor_that_is_not_trained_stays(kind: str) -> None:
    federation = federate(kind, method=FrozenA(), training={"weight_decay": 0.1})
    state = initial_state(federation)
    start = {name: x.A.clone() for name, x in state.layers.items()}
    for _ in range(2):
        for client in federation.clients:
            sent = server.broadcast(federation.method, state, client, federation.config.seed)
            reply = local.train_client(federation, client, sent, state.head, 1).reply
            for name, x in reply.adapter.items():
                assert torch.equal(x.A, start[name][: client.rank])
                assert not torch.equal(x.B, sent[name].lora.B)
        following, outcome = run_round(federation, state)
        replies = [naive_client(federation, kind, c, state) for c in federation.clients]
        want, _ = server.aggregate(
            federation.method, federation.weighting, state, replies, federation.config.seed
        )
        assert same(following, want)
        state = following
        for record in outcome.clients:  # A travels one way
            A = 4 * record["rank"] * sum(x.A.shape[1] for x in state.layers.values())
            assert record["bytes_down"] - record["bytes_up"] == A


def test_the_methods_here_follow_the_contract() -> None:
    """The toys hold what they promise: one client of full rank, and delta is its update."""
    for method in (Restart(), FrozenA()):
        state: Any = method.init(initial(5, 4, 4, 2.0, seed=0))
        sent = method.broadcast(state, 4, 2.0)
        lora = LoRA(sent.lora.A, torch.ones(5, 4), 2.0)
        after: Any = method.aggregate(state, [Update(sent, lora, 1.0)])
        torch.testing.assert_close(dense(method.delta(after)), lora.delta())
