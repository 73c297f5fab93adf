"""Full fine-tuning of the adapted layers, the baseline `pooled_full`: against plain loops of torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_federation import federate, kinds
from support.small_models import HEADS, TARGETS, build, rows
from support.tiny import fedhl
from torch import Tensor, nn

from fedhl.config.conduct import TrainingConfig
from fedhl.config.settings import Settings
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.lora import dense, initial
from fedhl.model import peft
from fedhl.model.training import batches, learning_rate, train
from fedhl.record import read_summary
from fedhl.seeds import derive
from fedhl.server import Client, Reply, init
from fedhl.server.layers import Layers
from fedhl.server.refusals import refusal
from fedhl.task import CausalTask, ClassificationTask
from fedhl.task.texts import Texts

EPS32 = torch.finfo(torch.float32).eps
POOLED = {"participation": {"pooled": True}}


def objective_of(kind: str) -> Texts:
    return Texts(ClassificationTask if kind == "bert" else CausalTask, pad_id=0)


def weight_of(model: nn.Module, name: str, kind: str) -> Tensor:
    """(out, in), also where the module holds it transposed."""
    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.T if kind == "gpt2" else weight


def plainly(
    kind: str,
    model: nn.Module,
    names: list[str],
    examples: list[Any],
    config: TrainingConfig,
    rates: list[float],
    seed: int,
) -> None:
    """Train these layers' weights, and the head, in place: torch alone, on a model without adapters."""
    parameters = [model.get_parameter(f"{name}.weight") for name in names]
    parameters += [model.get_parameter(name) for name in HEADS[kind]]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
    optimizer = make(parameters, lr=1.0, weight_decay=0.0)
    order, objective = batches(len(examples), config.batch_size, seed), objective_of(kind)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        objective.loss(model, objective.batch([examples[k] for k in next(order)])).backward()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@kinds
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_changes_train_as_the_weights_would(kind: str, optimizer: Any) -> None:
    """In float64, to its rounding, steps with clipped gradients; the adapter beside them, which is not zero,
    rests."""
    config = TrainingConfig(batch_size=4, optimizer=optimizer, max_grad_norm=0.5)
    examples, rates = rows(kind, 11), [0.02, 0.03, 0.01, 0.02, 0.02]
    slots = peft.attach(build(kind), {2: 4}, TARGETS[kind], head=HEADS[kind])
    plain, names = build(kind).double(), [*slots.modules]
    slots.model.double()
    with torch.no_grad():
        for name, (A, B) in slots.factors[2].items():
            B.normal_(generator=torch.Generator().manual_seed(len(name)))
            part = slots.scales[2] * B @ A
            plain.get_parameter(f"{name}.weight").add_(part.T if kind == "gpt2" else part)
    before = {name: weight_of(plain, name, kind).clone() for name in names}
    with peft.changes(slots, names) as changes:
        parameters = [*peft.activate(slots, 2, frozenset()), *changes.values()]
        train(
            *(slots.model, parameters, examples, config),
            objective=objective_of(kind),
            steps=len(rates),
            rate=rates.__getitem__,
            autocast=nullcontext,
            seed=3,
        )
    plainly(kind, plain, names, examples, config, rates, seed=3)
    for name in names:
        moved = weight_of(plain, name, kind) - before[name]
        assert changes[name].dtype == torch.float64 and float(moved.norm()) > 1e-3
        assert float((changes[name].detach() - moved).norm()) <= 1e-10 * float(moved.norm())
    for name in HEADS[kind]:
        ours, theirs = slots.head[name].detach(), plain.get_parameter(name).detach()
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@kinds
@pytest.mark.parametrize("rank", [2, 4])
def test_two_rounds_of_a_federation_of_one_are_a_plain_loop(kind: str, rank: int) -> None:
    """With rslora's scale, whatever the rank. SGD, whose steps do not depend on the sign of a rounding."""
    training = {"optimizer": "sgd", "learning_rate": 0.2}
    federation = federate(kind, {"pooled": rank}, "flora", dropout=0.0, training=training)
    (client,) = federation.clients
    federation = replace(federation, clients=[replace(client, full=True)])
    state, config = initial_state(federation), federation.config
    assert federation.steps_for(client.examples) == 3
    plain, names = build(kind), [*federation.slots.modules]
    before = {name: weight_of(plain, name, kind).clone() for name in names}
    for round in (1, 2):
        state, outcome = run_round(federation, state)
        assert not outcome.refused and len(outcome.clients) == 1
        rates = [learning_rate(config.training, 4, round - 1 + (k + 0.5) / 3) for k in range(3)]
        seed = derive(config.seed, "training", round, "pooled")
        given = [*federation.rows["pooled"]]
        plainly(kind, plain, names, given, config.training, rates, seed)
        for name, layer in state.layers.items():
            moved = weight_of(plain, name, kind) - before[name]
            delta = federation.method.delta(layer)
            assert delta is not None and float(moved.norm()) > 1e-3
            assert float((dense(delta) - moved).norm()) <= 1e-4 * float(moved.norm())
            assert torch.linalg.matrix_rank(moved) > rank
    for name, value in state.head.items():
        assert torch.allclose(value, plain.get_parameter(name).detach(), rtol=1e-4, atol=1e-6)


def test_a_change_that_a_narrow_base_would_round_away_is_kept() -> None:
    slots = peft.attach(build("bert").bfloat16(), {2: 4}, TARGETS["bert"], head=HEADS["bert"])
    config, examples = TrainingConfig(batch_size=4), rows("bert", 8)
    with peft.changes(slots, slots.modules) as changes:
        train(
            *(slots.model, [*changes.values()], examples, config),
            objective=objective_of("bert"),
            steps=1,
            rate=lambda k: 1e-5,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16),
            seed=0,
        )
    for D in changes.values():
        assert D.dtype == torch.float32 and float(D.detach().abs().max()) == pytest.approx(1e-5)
    assert not any(module.get_base_layer()._forward_hooks for module in slots.modules.values())


@pytest.mark.parametrize("full", [False, True])
def test_whole_changes_come_from_clients_who_train_them_alone(full: bool) -> None:
    """`min(m, n)` components more than were sent are expected of such a client, and of no other."""
    federation = federate("bert", {"pooled": 2}, "flora", dropout=0.0)
    client = Client("pooled", 2, 1.5, 9, full=full)
    adapter = {"query": initial(8, 6, 2, 1.5, seed=1)}
    state = init(federation.method, adapter, {}, seed=0)
    for extra in (0, 6):
        lora = replace(adapter["query"], A=torch.zeros(2 + extra, 6), B=torch.zeros(8, 2 + extra))
        layers = Layers(federation.method, state, 0)
        version = layers.versions([client])["pooled"]
        reply = Reply(client, 1, {"query": lora}, {}, 0.5, 1, version=version)
        reason = refusal(layers, reply)
        assert (reason is None) == (extra == (6 if full else 0)), reason
        assert reason is None or "got A" in reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "flora"}, "set participation.pooled: true"),
        ({"method": "fedit", **POOLED}, "use method: flora"),
        ({"method": "fedhl", **POOLED}, "use method: flora"),
        ({"method": "rac_lora", **POOLED}, "use method: flora"),
    ],
)
def test_what_full_fine_tuning_needs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"training.full.*{said}"):
        Settings.model_validate({"training": {"full": True}} | changes)
    Settings.model_validate({"training": {"full": True}, "method": "flora", **POOLED})


def test_a_run_changes_the_adapted_layers_and_the_head_alone(project: Path) -> None:
    """From the command line, to the merged model."""
    changes = ["method=flora", "participation.pooled=true", "training.full=true", "rounds=1"]
    changes += ["training.steps=2", "lora.targets=[query]", "name=full"]
    overrides = [word for change in changes for word in ("--set", change)]
    checked = fedhl(project, "check", "tiny.yaml", *overrides)
    assert checked.code == 0, checked
    done = fedhl(project, "run", "tiny.yaml", *overrides, "--out", "runs/full")
    assert done.code == 0, done
    layers = 2 * 32 * 32
    head = read_summary(project / "runs/full")["parameters"]["head"]
    assert f"{layers + head:,}" in checked.out
    done = fedhl(project, "export", "runs/full", "--merged", "--out", "full-merged")
    assert done.code == 0, done
    merged = load_file(project / "full-merged/model.safetensors")
    base = load_file(project / "bert/model.safetensors")
    shared = [name for name in merged if name in base]
    moved = {name for name in shared if not torch.equal(merged[name], base[name])}
    expected = {f"bert.encoder.layer.{k}.attention.self.query.weight" for k in (0, 1)}
    assert moved == expected and len(shared) > 20
    for name in moved:
        assert int(torch.linalg.matrix_rank(merged[name] - base[name])) > 8
