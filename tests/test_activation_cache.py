"""Activations that are computed once: the same losses, gradients and bits as without; or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_federation import federate, same
from support.small_models import CLASSES, HEADS, build, rows
from support.tiny import classification, save_bert, write_rows
from support.tiny import rows as table_rows
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation, initial_state
from fedhl.federation.local import evaluate_rows
from fedhl.federation.prepare import prepare, with_cache
from fedhl.model import peft
from fedhl.model.activation_cache import SETTING, CachedObjective
from fedhl.model.loading import enable_checkpointing
from fedhl.run.estimate import duration
from fedhl.run.overview import memory_table
from fedhl.task.images import Images, ImageTask, Picture
from fedhl.task.objective import Objective
from fedhl.task.preferences import Pair, Preferences, PreferenceTask

CPU, RANKS = torch.device("cpu"), (2, 3, 4)
LAST = {
    "bert": ["layer.1.attention.self.query", "layer.1.output.dense"],
    "llama": ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"],
    "gpt2": ["h.1.attn.c_attn"],
}


def last_layer(kind: str, dropout: float = 0.0, **settings: Any) -> Federation:
    """A federation that adapts the last of the two layers of a tiny model."""
    made = federate(kind, dropout=dropout, own=2, **settings)
    alphas = {rank: made.config.lora.alpha_of(rank) for rank in RANKS}
    base = build(kind, dropout)
    slots = peft.attach(base, alphas, LAST[kind], rslora=True, head=HEADS[kind])
    return replace(made, slots=slots)


def cached(federation: Federation) -> Federation:
    compute = federation.config.compute.model_copy(update={"cache_activations": True})
    config: Any = federation.config.model_copy(update={"compute": compute})
    return with_cache(config, federation)


def cache_of(federation: Federation) -> CachedObjective:
    assert isinstance(federation.objective, CachedObjective)
    return federation.objective


def vit() -> tuple[peft.Slots, Objective, Sequence[Any]]:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_labels": CLASSES}
    noise = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    model = ViTForImageClassification(ViTConfig(**sizes)).eval()
    targets = ["layers.1.attention.q_proj"]
    return (
        peft.attach(model, {4: 8.0}, targets, head=("classifier.weight", "classifier.bias")),
        Images(ImageTask, None),
        [Picture(x, k % CLASSES) for k, x in enumerate(noise)],
    )


def texts(kind: str) -> tuple[peft.Slots, Objective, Sequence[Any]]:
    federation = last_layer(kind)
    return federation.slots, federation.objective, rows(kind, 7)


def checkpointed() -> tuple[peft.Slots, Objective, Sequence[Any]]:
    slots, objective, examples = texts("llama")
    enable_checkpointing(slots.model, "llama")
    return slots, objective, examples


def pairs() -> tuple[peft.Slots, Objective, Sequence[Any]]:
    slots, _, examples = texts("llama")
    made = [Pair(*examples[k : k + 2], reference=0.1 * k) for k in range(6)]
    return slots, Preferences(PreferenceTask, 0, 48, beta=0.5), made


def length(row: Any) -> int:
    parts = row[:2] if isinstance(row, Pair) else (row,)
    return max(len(part.input_ids) if hasattr(part, "input_ids") else 1 for part in parts)


CASES = {
    **{kind: lambda kind=kind: texts(kind) for kind in LAST},
    **{"vit": vit, "checkpointed": checkpointed, "pairs": pairs},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole_model(case: str) -> None:
    slots, objective, some = CASES[case]()
    cache = CachedObjective(objective, slots, [some], length, nullcontext, CPU)
    parameters = peft.activate(slots, max(slots.factors))
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)

    def results(of: Objective) -> tuple[float, Tensor, Tensor]:
        """The loss in training, its gradient, and the outputs in evaluation."""
        slots.model.train()
        loss = of.loss(slots.model, of.batch(some))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        slots.model.zero_grad()
        slots.model.eval()
        with torch.no_grad():
            return loss.item(), gradient, of.outputs(slots.model, of.batch(some))

    loss, gradient, outputs = results(objective)
    first = cache.batch(some)
    assert cache.bytes == sum(x.nbytes for x in cache.activations.values())
    ran: list[Any] = []
    for module in cache.frozen.below[0].modules():
        if module is not cache.frozen.below[0]:
            module.register_forward_hook(lambda *_: ran.append(1))
    quick, theirs, others = results(cache)
    assert not ran and torch.equal(first.activations, cache.batch(some).activations)  # pyright: ignore
    assert quick == pytest.approx(loss, rel=1e-5)
    assert (theirs - gradient).norm() <= 1e-5 * gradient.norm()
    if objective.tokens(objective.batch(some)) is not None and outputs.ndim == 3:
        real = objective.batch(some)["attention_mask"][..., None]
        outputs, others = outputs * real, others * real
    assert (others - outputs).norm() <= 1e-5 * outputs.norm()


def test_changes_of_whole_weights_go_with_it() -> None:
    slots, objective, some = texts("bert")
    cache = CachedObjective(objective, slots, [some], length, nullcontext, CPU)
    before = objective.loss(slots.model, objective.batch(some)).item()
    with peft.changes(slots, [*slots.modules]) as changes:
        for change in changes.values():
            nn.init.normal_(change, std=0.3)
        whole, quick = (of.loss(slots.model, of.batch(some)).item() for of in (objective, cache))
    assert quick == pytest.approx(whole, rel=1e-5) != before


def test_a_run_that_is_resumed_has_the_same_bits() -> None:
    """The second process computes only what the rest of the run draws, in batches of its own."""
    whole = cached(last_layer("bert"))
    state = between = initial_state(whole)
    for _ in range(3):
        state, between = run_round(whole, state)[0], state
    again = cached(last_layer("bert"))
    evaluate_rows(again, again.held_out[:2])
    assert same(run_round(again, between)[0], state)
    assert len(cache_of(again).activations) < len(cache_of(whole).group)


def test_rows_that_were_never_announced_are_read_by_the_whole_model() -> None:
    plain = last_layer("bert")
    others = rows("bert", 5, seed=7)
    before = evaluate_rows(plain, others)
    assert evaluate_rows(cached(plain), others) == before


def test_what_the_cache_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match=f"{SETTING}: .*layer.0.*first layer of the model"):
        cached(federate("bert", dropout=0.0))
    with pytest.raises(UserError, match=r"set model.dropout: 0.0"):
        cached(last_layer("bert", dropout=0.1))
    slots, objective, some = texts("bert")
    early = replace(slots, head={"e": slots.model.bert.embeddings.word_embeddings.weight})
    with pytest.raises(
        UserError, match=r"bert.embeddings.word_embeddings is trained and runs before"
    ):
        CachedObjective(objective, early, [some], length, nullcontext, CPU)
    flat = peft.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {2: 4.0}, ["1"])
    with pytest.raises(UserError, match="expected the adapted layers of a Sequential in one list"):
        CachedObjective(objective, flat, [], length, nullcontext, CPU)


def test_check_tells_the_memory_and_the_time(tmp_path: Path) -> None:
    config = classification(
        model={"source": str(save_bert(tmp_path / "bert")), "dropout": 0.0},
        data={"source": str(write_rows(tmp_path / "rows.jsonl", table_rows(300)))},
        lora={"targets": ["layer.1.attention.self.query"]},
        compute={"cache_activations": True},
    )
    prepared = prepare(Config.model_validate(config))
    assert cache_of(prepared.federation).bytes > 0
    (line,) = duration(prepared)
    assert "for the cached activations" in line
    table = memory_table(prepared)
    assert "cached activations of all rows, in main memory" in [*table.columns[0].cells]
