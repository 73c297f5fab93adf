"""The laboratory of experiments/theory: its gradients, its optimum, and clients that train at once."""

from __future__ import annotations

from pathlib import Path

import torch
from theory.laboratory import Local, draw, play, train

import docs
from fedhl import LoRA, get_method, get_weighting
from fedhl.method import Broadcast
from fedhl.seeds import generator


def test_the_gradient_is_that_of_the_loss():
    problem = draw(0, apart=1.0, side=6, count=3, q=torch.tensor([0.5, 0.3, 0.2]).double())
    W = torch.randn(6, 6, generator=generator(0, "W"), dtype=torch.float64, requires_grad=True)
    (G,) = torch.autograd.grad(problem.loss(W), W)
    torch.testing.assert_close(problem.gradient(W.detach()), G, rtol=1e-12, atol=1e-12)


def test_the_optimum_has_no_gradient_and_the_least_loss():
    problem = draw(1, apart=1.0, side=6, count=3)
    best = problem.optimum()
    assert float(problem.gradient(best).norm()) < 1e-12
    assert torch.linalg.matrix_rank(best) == 6
    moved = best + 0.01 * torch.randn(6, 6, generator=generator(1, "W"), dtype=torch.float64)
    assert problem.loss(moved) > problem.loss(best)


def test_clients_that_train_at_once_take_the_steps_of_each_alone():
    """Against autograd on each client's own factors, in float64."""
    problem, g = draw(2, apart=1.0, side=6, count=2), generator(2, "factors")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sent = [Broadcast(LoRA(normal(r, 6), normal(6, r), s)) for r, s in ((1, 2.0), (4, 0.5))]
    bases = [None, normal(6, 6).float()]
    local = Local(rate=0.02, ratio=4.0, steps=3)
    found = train(problem, sent, bases, local, g)
    for i, (there, base) in enumerate(zip(sent, bases, strict=True)):
        A, B, s = there.lora.A, there.lora.B, there.lora.scale
        for _ in range(local.steps):
            A, B = A.requires_grad_(), B.requires_grad_()
            D = s * (B @ A) + (0 if base is None else base) - problem.optima[i]
            dA, dB = torch.autograd.grad(0.5 * (D @ problem.H[i] * D).sum(), [A, B])
            A, B = (A - 0.01 * dA).detach(), (B - 0.04 * dB).detach()
        torch.testing.assert_close(found[i].A, A)
        torch.testing.assert_close(found[i].B, B)


def test_with_full_steps_and_one_rank_that_holds_all_it_is_gradient_descent():
    problem = draw(3, apart=1.0, side=6, count=2)
    method, uniform = get_method("fedhl"), get_weighting("uniform")
    local = Local(rate=0.1, steps=1, full=True)
    W = torch.zeros(6, 6, dtype=torch.float64)
    for round in play(problem, method, uniform, local, 4, seed=3, ranks=[6, 6]):
        W = W - 0.1 * problem.gradient(W)
        torch.testing.assert_close(round.after, W, rtol=1e-4, atol=1e-5)


def test_the_tables_of_the_page_are_those_of_the_result_files():
    page = (Path(__file__).resolve().parent.parent / "docs/theory.md").read_text(encoding="utf-8")
    assert page == docs.with_theory(page), "write it anew: make docs"
