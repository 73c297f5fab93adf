"""Local training: the steps that were asked for, on the rows and parameters that were asked for."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.small_models import HEADS, TARGETS, both, build, rows
from torch import Tensor, nn

from fedhl.config.conduct import TrainingConfig
from fedhl.model import peft
from fedhl.model.training import SHORT, Trained, batches, learning_rate, train
from fedhl.seeds import generator
from fedhl.task import ClassificationTask
from fedhl.task.examples import IGNORED, Example
from fedhl.task.texts import Texts

# PEFT asks transformers for a property that a newer transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

EPS32 = torch.finfo(torch.float32).eps


def attach(
    kind: str, dropout: float = 0.0, checkpointing: bool = False, double: bool = False
) -> peft.Slots:
    """Two slots with something in them: at B = 0 half of all gradients vanish."""
    model = build(kind, dropout)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    slots = peft.attach(model, {2: 4, 4: 8}, TARGETS[kind], dropout=dropout, head=HEADS[kind])
    draw = generator(1, "factors")
    with torch.no_grad():
        for slot in slots.factors.values():
            for pair in slot.values():
                for p in pair:
                    p.copy_(torch.randn(p.shape, generator=draw) / 8)
    if double:
        model.double()
    return slots


def learn(
    slots: peft.Slots,
    examples: list[Example],
    *,
    seed: int = 0,
    steps: int = 4,
    factors: frozenset[str] = frozenset({"A", "B"}),
    bfloat16: bool = False,
    lr: float = 0.05,
    **config: Any,
) -> tuple[list[Tensor], Trained]:
    """The trained parameters of the slot of rank 4 after some steps."""
    settings = TrainingConfig(**({"batch_size": 8, "max_grad_norm": None} | config))
    parameters = peft.activate(slots, 4, factors)
    trained = train(
        slots.model,
        parameters,
        examples,
        settings,
        steps=steps,
        rate=lambda k: lr,
        objective=Texts(ClassificationTask, pad_id=0),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext(),
        seed=seed,
    )
    return [p.detach().clone() for p in parameters], trained


def equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """To the bit."""
    return len(xs) == len(ys) and all(map(torch.equal, xs, ys))


# --- the learning rate --------------------------------------------------------------------------

SCHEDULES = ["constant", "linear", "cosine"]


def rates(rounds: int, steps: int, **config: Any) -> list[float]:
    """The rate of every step of a run, as the simulation asks for it."""
    settings = TrainingConfig(learning_rate=2.0, **config)
    return [
        learning_rate(settings, rounds, round + (k + 0.5) / steps)
        for round in range(rounds)
        for k in range(steps)
    ]


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_at_known_points(schedule: Any, warmup: int) -> None:
    settings = TrainingConfig(learning_rate=2.0, schedule=schedule, warmup_rounds=warmup)
    rounds = 7

    def rate(progress: float) -> float:
        return learning_rate(settings, rounds, progress)

    if warmup:
        assert rate(0) == 0 and rate(warmup / 2) == pytest.approx(1)
    assert rate(warmup) == pytest.approx(2), "the peak"
    middle = (warmup + rounds) / 2
    end = {"constant": 2, "linear": 0, "cosine": 0}[schedule]
    assert rate(rounds) == pytest.approx(end, abs=1e-12)
    assert rate(middle) == pytest.approx(2 if schedule == "constant" else 1)
    quarter = warmup + (rounds - warmup) / 4
    expected = {"constant": 2, "linear": 1.5, "cosine": 1 + 0.5**0.5}[schedule]
    assert rate(quarter) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_has_no_step_at_the_border_of_rounds(schedule: str, warmup: int) -> None:
    """It depends on the share of the run that is done alone, however it is cut into rounds: the
    change from one step to the next is at most the steepest slope, π/2 of the peak over the run.
    """
    config: dict[str, Any] = {"schedule": schedule, "warmup_rounds": warmup}
    values = rates(6, 5, **config)
    slope = 2.0 / (warmup * 5) if warmup else 0.0
    slope = max(slope, 2.0 * torch.pi / 2 / ((6 - warmup) * 5))
    assert all(abs(b - a) <= slope * (1 + 1e-9) for a, b in itertools.pairwise(values))
    assert min(values) > 0 and max(values) <= 2
    if not warmup:
        assert values == pytest.approx(rates(3, 10, **config))


def test_more_warm_up_than_rounds_never_reaches_the_peak() -> None:
    values = rates(2, 4, schedule="cosine", warmup_rounds=4)
    assert values == sorted(values) and values[-1] < 1


def test_each_step_runs_at_its_rate() -> None:
    """Plain SGD moves by rate x gradient, so a rate of zero at all steps but k leaves step k alone."""
    examples = rows("bert", 8)

    def move(values: list[float]) -> list[Tensor]:
        slots = attach("bert")
        parameters = peft.activate(slots, 4)
        before = [p.detach().clone() for p in parameters]
        train(
            slots.model,
            parameters,
            examples,
            TrainingConfig(batch_size=8, optimizer="sgd", max_grad_norm=None),
            steps=3,
            rate=values.__getitem__,
            objective=Texts(ClassificationTask, pad_id=0),
            autocast=nullcontext,
            seed=0,
        )
        return [p.detach() - b for p, b in zip(parameters, before, strict=True)]

    one, other = move([0.0, 0.25, 0.0]), move([0.5, 0.0, 0.0])
    assert not any(x.any() for x in move([0.0, 0.0, 0.0]))
    for x, y in zip(one, other, strict=True):  # all rows in every batch: the same gradient
        torch.testing.assert_close(2 * x, y, rtol=1e-4, atol=8 * EPS32)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "size"), [(12, 4), (13, 4), (5, 8), (7, 7), (1, 3)])
def test_every_row_once_per_epoch(examples: int, size: int) -> None:
    epochs = 6
    stream = list(itertools.islice(batches(examples, size, seed=0), epochs * examples))
    flat = [k for batch in stream for k in batch]
    assert {len(batch) for batch in stream} == {min(size, examples)}
    orders = [flat[e * examples : (e + 1) * examples] for e in range(epochs)]
    assert all(sorted(order) == list(range(examples)) for order in orders)
    if examples > 4:  # 6 equal shuffles of 5 rows: once in 120^5
        assert len({tuple(order) for order in orders}) > 1


def test_batches_follow_from_the_seed_alone() -> None:
    def first(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + len(torch.random.get_rng_state()))
        return list(itertools.islice(batches(20, 6, seed), 8))

    with torch.random.fork_rng():
        assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(
    ("examples", "size", "epochs", "steps"),
    [
        (32, 16, 1.0, 2),
        (33, 16, 1.0, 3),
        (32, 16, 0.5, 1),
        (32, 16, 0.01, 1),
        (5, 16, 3.0, 3),  # a batch is all five rows, three passes are three steps
        (16, 16, 2.0, 2),
        (17, 16, 2.0, 3),
    ],
)
def test_epochs_as_steps(examples: int, size: int, epochs: float, steps: int) -> None:
    config = TrainingConfig(batch_size=size, epochs=epochs)
    assert config.steps_for(examples) == steps
    stream = itertools.islice(batches(examples, size, 0), steps)
    seen = Counter(k for batch in stream for k in batch)
    if epochs >= 1:
        assert len(seen) == examples and min(seen.values()) >= int(epochs)


# --- the steps themselves -----------------------------------------------------------------------


@both
@pytest.mark.parametrize(("count", "accumulation"), [(16, 2), (16, 8), (5, 4)])
def test_accumulation_equals_the_full_batch(kind: str, count: int, accumulation: int) -> None:
    """In float64, but for the loss of a language model, which transformers forms in float32: four steps
    of rate 0.05 then differ by less than ε. Parts that count equally, or by rows instead of tokens,
    would be off by a per cent. Five rows in four parts: two, two and one.
    """
    examples = rows(kind, count)
    for limit in (0.5, None):
        config: dict[str, Any] = {"optimizer": "sgd", "max_grad_norm": limit}
        whole, trained = learn(attach(kind, double=True), examples, **config)
        parts, again = learn(
            attach(kind, double=True), examples, accumulation=accumulation, **config
        )
        for x, y in zip(whole, parts, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=EPS32)
        assert again.loss == pytest.approx(trained.loss, rel=EPS32)
        assert again.steps == trained.steps == 4


def test_terms_are_what_the_models_average_over() -> None:
    texts = Texts(ClassificationTask, pad_id=0)
    assert texts.terms({"labels": torch.tensor([0, 2, 1])}) == 3
    labels = torch.tensor([[IGNORED, 5, 6], [7, IGNORED, 8]])  # the 7 is predicted from nothing
    assert texts.terms({"labels": labels}) == 3
    model = build("llama")
    ids = torch.tensor([[3, 5, 6], [7, 4, 8]])
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    terms = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    want = -terms[labels[:, 1:] != IGNORED].sum() / 3
    torch.testing.assert_close(output.loss, want)


@both
def test_training_lowers_the_loss(kind: str) -> None:
    examples = rows(kind, 8)
    slots = attach(kind)
    losses = [learn(slots, examples, steps=5, lr=0.01)[1].loss for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert not slots.model.training


def test_clipping() -> None:
    """One step of plain SGD at rate 1 moves by the gradient, or by so much of it."""
    examples = rows("bert", 8)

    def distance(limit: float | None) -> float:
        slots = attach("bert")
        before = [p.detach().clone() for p in peft.activate(slots, 4)]
        after, _ = learn(slots, examples, steps=1, lr=1.0, optimizer="sgd", max_grad_norm=limit)
        squares = [(x - y).double().square().sum() for x, y in zip(after, before, strict=True)]
        return float(torch.stack(squares).sum().sqrt())

    whole = distance(None)
    assert distance(whole / 3) == pytest.approx(whole / 3, rel=1e-4)
    assert distance(whole * 3) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_is_decoupled(optimizer: str) -> None:
    """While B = 0 nothing reaches A but the decay: `A ← (1 - rate · decay) A`."""
    slots = attach("bert")
    with torch.no_grad():
        for _, B in slots.factors[4].values():
            B.zero_()
    before = [A.detach().clone() for A, _ in slots.factors[4].values()]
    learn(slots, rows("bert", 8), steps=1, lr=0.1, optimizer=optimizer, weight_decay=0.5)
    for (A, _), was in zip(slots.factors[4].values(), before, strict=True):
        torch.testing.assert_close(A.detach(), 0.95 * was, rtol=4 * EPS32, atol=0)


# --- what may change, and what follows from the seed --------------------------------------------


@both
@pytest.mark.parametrize("factors", [{"A", "B"}, {"B"}, {"A"}])
def test_only_what_was_asked_for_changes(kind: str, factors: set[str]) -> None:
    slots = attach(kind, dropout=0.1)
    before = {n: p.detach().clone() for n, p in slots.model.named_parameters()}
    buffers = {n: b.clone() for n, b in slots.model.named_buffers()}
    learn(slots, rows(kind, 8), factors=frozenset(factors), weight_decay=0.1)
    changed = {n for n, p in slots.model.named_parameters() if not torch.equal(p, before[n])}
    want = set(HEADS[kind])
    for name in slots.modules:
        want |= {f"{name}.lora_{factor}.rank4.weight" for factor in factors}
    assert changed == want
    assert all(torch.equal(b, buffers[n]) for n, b in slots.model.named_buffers())
    assert all(p.grad is None for p in slots.model.parameters()), "nothing is left to accumulate"


@both
def test_dropout_and_row_order_follow_from_the_seed(kind: str) -> None:
    examples = rows(kind, 20)

    def run(seed: int, disturbance: int, dropout: float = 0.2) -> list[Tensor]:
        slots = attach(kind, dropout)
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        got, _ = learn(slots, examples, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return got

    with torch.random.fork_rng():
        first = run(seed=0, disturbance=1)
        assert equal(first, run(seed=0, disturbance=2))
        assert not equal(first, run(seed=1, disturbance=1))
        assert not equal(first, run(seed=0, disturbance=1, dropout=0.0)), "dropout was at work"


def test_a_second_client_starts_with_a_fresh_optimizer() -> None:
    examples = rows("bert", 8)
    slots = attach("bert")
    start = peft.read(slots, 4), peft.read_head(slots)
    first, _ = learn(slots, examples)
    learn(slots, rows("bert", 8, seed=1), seed=1)
    peft.write(slots, 4, start[0])
    peft.write_head(slots, start[1])
    again, _ = learn(slots, examples)
    assert equal(first, again)


@pytest.mark.parametrize("bfloat16", [False, True])
@both
def test_gradient_checkpointing_gives_the_same_bits(kind: str, bfloat16: bool) -> None:
    """Dropout included: the masks are drawn again from the same random state, by the same kernels."""
    examples = rows(kind, 8)
    plain, _ = learn(attach(kind, dropout=0.2), examples, bfloat16=bfloat16)
    slots = attach(kind, dropout=0.2, checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in slots.model.modules())
    assert equal(plain, learn(slots, examples, bfloat16=bfloat16)[0])


@pytest.mark.parametrize(
    ("tokens", "bfloat16", "fused"),
    [(8, True, False), (SHORT, True, False), (SHORT + 1, True, True), (8, False, True)],
)
def test_short_rows_in_bfloat16_leave_the_fused_kernel_of_attention(
    tokens: int, bfloat16: bool, fused: bool
) -> None:
    """In the forward and in the backward pass, and afterwards all kernels are as they were."""
    slots, seen = attach("llama"), []

    def look(*_: Any) -> None:
        seen.append(torch.backends.cuda.flash_sdp_enabled())

    slots.model.register_forward_pre_hook(look)
    peft.activate(slots, 4)[0].register_hook(look)
    examples = [Example([5] * tokens, [5] * tokens) for _ in range(4)]
    learn(slots, examples, steps=1, bfloat16=bfloat16)
    assert seen == [fused, fused]
    assert torch.backends.cuda.flash_sdp_enabled()


@both
def test_bfloat16_autocast(kind: str) -> None:
    """Products are rounded to 8 bits; parameters, and the loss, stay float32."""
    examples = rows(kind, 8)
    _, full = learn(attach(kind), examples, steps=1)
    got, narrow = learn(attach(kind), examples, steps=1, bfloat16=True)
    assert {p.dtype for p in got} == {torch.float32} and all(p.isfinite().all() for p in got)
    assert narrow.loss != full.loss
    assert narrow.loss == pytest.approx(full.loss, rel=2**-5)  # a few roundings of 2^-9 each


def test_what_is_reported() -> None:
    slots, calls = attach("bert"), []
    parameters = peft.activate(slots, 4)
    trained = train(
        slots.model,
        parameters,
        rows("bert", 5),
        TrainingConfig(batch_size=8),
        steps=3,
        rate=lambda k: 1e-9,
        objective=Texts(ClassificationTask, pad_id=0),
        autocast=nullcontext,
        seed=0,
        on_step=lambda: calls.append(None),
    )
    assert len(calls) == trained.steps == 3
    with torch.no_grad():
        losses = [
            slots.model(input_ids=torch.tensor([x.input_ids]), labels=torch.tensor([x.labels])).loss
            for x in rows("bert", 5)
        ]
    # hardly any step was taken, and every batch is all five rows
    assert trained.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert trained.seconds > 0
    assert isinstance(slots.model, nn.Module) and not slots.model.training
