"""The contract of every aggregation method: the laws that each is put through.

A law of `LAWS` is checked both ways: a method that claims it satisfies it in every scenario, and a
method that does not claim it breaks it in at least one. The universal laws hold for all, and what a
client starts from is compared with the dense reference that the method names. Every check takes a
method, so that a method from elsewhere can be put through them too; tests/test_wrong_methods.py has
methods that each of them must refuse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl import Broadcast, LoRA, Method, Update, dense
from fedhl.lora import initial
from fedhl.method import Truncating, flatten, unflatten
from fedhl.seeds import generator
from fedhl.server.payload import carried, carried_lora
from support.reference.starts import STARTS as REFERENCES
from support.reference.starts import Start

SHAPES = ((7, 5, 3), (4, 9, 2), (6, 8, 5))
"""(m, n, top rank): all different, so that no transposition and no swap of a dimension goes unseen."""
FULL = ((6, 4, 4), (3, 5, 3))
"""The same with the top rank as high as the layer allows."""
DTYPES = (torch.float32, torch.float64)
SEED = 3


# ---------------------------------------------------------------------------------------------
# Scenarios: states reached by real rounds, and the updates of a cohort.
# ---------------------------------------------------------------------------------------------


def adapter(
    m: int, n: int, rank: int, seed: int, dtype: torch.dtype = torch.float64, *, trained: bool
) -> LoRA:
    """An initial adapter; if `trained`, one that somebody has trained before, with B != 0."""
    g = generator(SEED, "adapter", seed)
    lora = initial(m, n, rank, scale=1.5, seed=seed)
    B = torch.randn(m, rank, generator=g) if trained else lora.B
    return LoRA(lora.A.to(dtype), B.to(dtype), lora.scale)


def members(method: Method[Any], top: int) -> list[tuple[int, float, float]]:
    """(rank, scale, weight) of a cohort: mixed if the method takes that, else alike."""
    if not method.mixed_ranks:
        return [(top, 1.5, 0.5), (top, 1.5, 0.3), (top, 1.5, 0.2)]
    return [(1, 2.0, 0.4), (top, 0.5, 0.3), (max(1, top - 1), 3.0, 0.2), (1, 0.7, 0.1)]


def train(sent: Broadcast, g: torch.Generator) -> LoRA:
    """A stand-in for local training: noise on the factors that the client may train."""

    def moved(name: str, factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=g, dtype=torch.float64).to(factor)
        return factor + noise if name in sent.train else factor.clone()

    return LoRA(moved("A", sent.lora.A), moved("B", sent.lora.B), sent.lora.scale)


def play(method: Method[Any], state: Any, top: int, g: torch.Generator) -> list[Update]:
    """One round up to the aggregation: broadcasts and what the cohort makes of them."""
    updates = []
    for key, (rank, scale, weight) in enumerate(members(method, top)):
        sent = method.broadcast(state, rank, scale, key=key)
        updates.append(Update(sent, train(sent, g), weight))
    return updates


@dataclass(frozen=True, eq=False)
class Scenario:
    """A state, the updates that answer it, and the state `after`."""

    method: Method[Any]
    state: Any
    updates: list[Update]
    top: int
    dtype: torch.dtype
    start: LoRA

    @cached_property
    def after(self) -> Any:
        return self.method.aggregate(self.state, self.updates)


def scenarios(
    method: Method[Any],
    shapes: Iterable[tuple[int, int, int]] = SHAPES,
    rounds: Iterable[int] = (0, 1, 3),
) -> list[Scenario]:
    """States after 0, 1 and 3 rounds, from a fresh and from a trained adapter, in both precisions.

    Each is played once for all checks of a method, none of which edits what it is given.
    """
    every = itertools.product(shapes, (False, True), rounds, DTYPES)
    return [played(method, *each) for each in every]


@cache
def played(
    method: Method[Any],
    shape: tuple[int, int, int],
    trained: bool,
    rounds: int,
    dtype: torch.dtype,
) -> Scenario:
    m, n, top = shape
    g = generator(SEED, "scenario", m, n, rounds)
    start = adapter(m, n, top, seed=rounds, dtype=dtype, trained=trained)
    state = method.init(start, seed=SEED)
    for _ in range(rounds):
        state = method.aggregate(state, play(method, state, top, g))
    return Scenario(method, state, play(method, state, top, g), top, dtype, start)


def scenario(method: Method[Any], rounds: int = 2) -> Scenario:
    """One of them, for laws that need no search."""
    return scenarios(method, rounds=[rounds])[0]


def observed(method: Method[Any], state: Any, top: int, scale: float = 1.5) -> Tensor:
    """The global change; where there is no global model, the factors that all clients share."""
    delta = method.delta(state)
    if delta is not None:
        return dense(delta)
    sent = method.broadcast(state, top, scale)
    shared = {"A": sent.lora.A, "B": sent.lora.B.T}
    return torch.cat([factor for name, factor in shared.items() if name not in sent.keep], dim=1)


def beneath(sent: Broadcast) -> Tensor:
    """`base + ΔW(merged)`: what the adapter is added to, relative to W0."""
    base = torch.zeros(sent.lora.shape).to(sent.lora.B) if sent.base is None else sent.base
    return base if sent.merged is None else base + sent.merged.delta()


def started(sent: Broadcast) -> Tensor:
    """`base + ΔW(merged) + ΔW(lora)`: where a client starts, relative to W0."""
    return beneath(sent) + sent.lora.delta()


def change(method: Method[Any], state: Any) -> Tensor:
    """The global change, of a method that has one."""
    delta = method.delta(state)
    assert delta is not None
    return dense(delta)


def tolerance(s: Scenario, W: Tensor) -> float:
    """A bound on the rounding of one aggregation.

    A product of inner size k is wrong by at most `k eps ||B|| ||A||` (Higham, Accuracy and Stability,
    section 3.5), an SVD by a modest multiple of `eps ||W||`; both sizes are at most m + n here, and 4
    covers the handful of sums and rescalings that follow.
    """
    m, n = W.shape
    size = float(W.norm()) + sum(
        lora.scale * float(lora.A.norm() * lora.B.norm()) * u.weight
        for u in s.updates
        for lora in (u.lora, u.sent.lora)
    )
    return 4 * (m + n) * torch.finfo(s.dtype).eps * size


# ---------------------------------------------------------------------------------------------
# The laws that a method claims or not. Each yields (violation, tolerance) pairs.
# ---------------------------------------------------------------------------------------------


Gaps = Iterator[tuple[float, float]]


def exact_mean(method: Method[Any]) -> Gaps:
    for s in scenarios(method):
        before = change(method, s.state)
        mean = sum(u.weight * (u.lora.delta() - u.sent.lora.delta()) for u in s.updates)
        after = change(method, s.after)
        yield float((after - (before + mean)).norm()), tolerance(s, before)


def rounded_mean(method: Method[Any]) -> Gaps:
    """In int8; the states, of float32, are those of rounds without rounding."""
    for s in scenarios(method):
        if s.dtype == torch.float32:
            g, updates = generator(SEED, "rounded"), []
            for u in s.updates:
                sent = carried(u.sent, "int8")
                lora = carried_lora(train(sent, g), "int8", sent.train)
                updates.append(replace(u, sent=sent, lora=lora))
            rounded = replace(s, updates=updates)
            before, after = (change(method, x) for x in (s.state, rounded.after))
            mean = sum(u.weight * (u.lora.delta() - u.sent.lora.delta()) for u in updates)
            yield float((after - (before + mean)).norm()), tolerance(rounded, before)


def no_op(method: Method[Any]) -> Gaps:
    for s in scenarios(method):
        before = change(method, s.state)
        same = [replace(u, lora=u.sent.lora) for u in s.updates]
        after = change(method, method.aggregate(s.state, same))
        yield float((after - before).norm()), tolerance(s, before)


def gauge(method: Method[Any]) -> Gaps:
    for s in scenarios(method):
        g = generator(SEED, "gauge")
        turned = [replace(u, lora=change_basis(u.lora, g)) for u in s.updates]
        one = change(method, s.after)
        two = change(method, method.aggregate(s.state, turned))
        # The two cohorts are rounded separately, the second one with factors whose basis change has
        # condition number <= 4 each: 2 · 4 times the rounding of one.
        yield float((one - two).norm()), 8 * tolerance(s, one)


def change_basis(lora: LoRA, g: torch.Generator) -> LoRA:
    """`(B G, G⁻¹ A)` with a random G whose singular values are in [1/2, 2]."""
    r = lora.rank
    left, right = (
        torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0] for _ in range(2)
    )
    values = 0.5 + 1.5 * torch.rand(r, generator=g, dtype=torch.float64)
    G, inverse = left * values @ right.T, right / values @ left.T
    A, B = inverse @ lora.A.double(), lora.B.double() @ G
    return LoRA(A.to(lora.A), B.to(lora.B), lora.scale)


def one_client(method: Method[Any]) -> Gaps:
    for s in scenarios(method, FULL):
        sent = method.broadcast(s.state, s.top, 1.5)
        update = Update(sent, train(sent, generator(SEED, "one client")), 1.0)
        after = change(method, method.aggregate(s.state, [update]))
        before = change(method, s.state)
        alone = replace(s, updates=[update])
        theirs = started(replace(sent, lora=update.lora))
        yield float((after - theirs).norm()), tolerance(alone, before)


CHECKS: dict[str, Callable[[Method[Any]], Gaps]] = {
    "exact mean": exact_mean,
    "rounded mean": rounded_mean,
    "no-op": no_op,
    "gauge": gauge,
    "one client": one_client,
}


def check_law(method: Method[Any], law: str) -> None:
    """A claimed law holds in every scenario; one not claimed is broken in at least one."""
    if method.delta(scenario(method, 0).state) is None:
        assert law not in method.laws, f"{law!r} speaks of a global change, which this has not"
        return
    gaps = list(CHECKS[law](method))
    if law in method.laws:
        assert not any(math.isnan(gap) for gap, _ in gaps)
        worst, bound = max(gaps, key=lambda gap: gap[0] / gap[1])
        assert worst <= bound, f"claims {law!r}, but is off by {worst:.1e} (rounding: {bound:.0e})"
    else:
        # the steps of int8 are 2^-7 of a row's largest entry, some 100 of these bounds
        clearly = 10 if law == "rounded mean" else 1e4
        clear = [gap for gap, bound in gaps if gap > clearly * bound]
        assert clear, f"does not claim {law!r}, but satisfies it in all {len(gaps)} scenarios"


# ---------------------------------------------------------------------------------------------
# The universal laws.
# ---------------------------------------------------------------------------------------------


def tensors_of(*things: Any) -> list[Tensor]:
    """Every tensor in states and updates, in a fixed order."""
    found: list[Tensor] = []
    for thing in things:
        if isinstance(thing, Update):
            sent = thing.sent
            pairs = [x for x in (sent.past, sent.merged) if x is not None]
            factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
            more = (sent.base, sent.index, sent.magnitudes, thing.magnitudes, *factors)
            extra = [x for x in more if x is not None]
            found += [thing.lora.A, thing.lora.B, sent.lora.A, sent.lora.B, *extra]
        elif isinstance(thing, Broadcast):
            found += tensors_of(Update(thing, thing.lora, 1.0))
        else:
            found += flatten(thing).values()
    return found


def same_bits(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def check_inputs_untouched(method: Method[Any]) -> None:
    for s in scenarios(method):
        held = tensors_of(s.start, s.state, *s.updates)
        before = [x.clone() for x in held]
        method.init(s.start, SEED)
        for key, update in enumerate(s.updates):
            method.broadcast(s.state, update.sent.lora.rank, update.sent.lora.scale, key)
        method.delta(s.state)
        method.aggregate(s.state, s.updates)
        assert same_bits(held, before)


def check_state_is_its_own(method: Method[Any]) -> None:
    """The caller may go on training the adapter it gave to `init`: the state does not follow."""
    for s in scenarios(method, rounds=[0]):
        start = LoRA(s.start.A.clone(), s.start.B.clone(), s.start.scale)
        state = method.init(start, SEED)
        before = [x.clone() for x in tensors_of(state)]
        start.A.zero_()
        start.B.fill_(9.0)
        assert same_bits(tensors_of(state), before)
        for rank, scale, _ in members(method, s.top):  # nor when a client trains what it was sent
            sent = method.broadcast(state, rank, scale).lora
            sent.A.fill_(9.0)
            sent.B.fill_(9.0)
        assert same_bits(tensors_of(state), before)


def check_order_is_irrelevant(method: Method[Any]) -> None:
    for s in scenarios(method):
        one = observed(method, s.after, s.top)
        two = observed(method, method.aggregate(s.state, s.updates[::-1]), s.top)
        assert float((one - two).norm()) <= 2 * tolerance(s, one), "the order of clients matters"


def check_split(method: Method[Any]) -> None:
    """A client that comes twice, with half its weight, changes nothing."""
    for s in scenarios(method):
        first, *others = s.updates
        half = replace(first, weight=first.weight / 2)
        one = observed(method, s.after, s.top)
        two = observed(method, method.aggregate(s.state, [half, *others, half]), s.top)
        assert float((one - two).norm()) <= 2 * tolerance(s, one), "split: a client in two halves"


def check_rescale(method: Method[Any]) -> None:
    """`(B/c, A, c s)` in place of `(B, A, s)` changes nothing: for any client that trains B where scales
    may differ, from the initial adapter on where they may not."""
    factors = (0.5, 3.0, 0.7, 2.0)
    if method.mixed_ranks:
        for s in scenarios(method):
            turned = [
                replace(u, lora=rescaled(u.lora, c)) if "B" in u.sent.train else u
                for u, c in zip(s.updates, factors, strict=True)
            ]
            one = observed(method, s.after, s.top)
            two = observed(method, method.aggregate(s.state, turned), s.top)
            assert float((one - two).norm()) <= 2 * tolerance(s, one), "rescale: a client's scale"
        return
    for s, c in itertools.product(scenarios(method, rounds=[0]), factors[:2]):
        state = method.init(rescaled(s.start, c), SEED)
        one = observed(method, s.after, s.top)
        turned = []
        for key, u in enumerate(s.updates):
            sent = method.broadcast(state, s.top, c * u.lora.scale, key)
            assert float((started(sent) - started(u.sent)).norm()) <= 2 * tolerance(s, one)
            turned.append(replace(u, sent=sent, lora=rescaled(u.lora, c)))
        two = observed(method, method.aggregate(state, turned), s.top, c * s.start.scale)
        assert float((one - two).norm()) <= 2 * tolerance(s, one), "rescale: the scale of all"


def rescaled(lora: LoRA, c: float) -> LoRA:
    """The same product, with c times the scale."""
    return LoRA(lora.A, lora.B / c, c * lora.scale)


def check_start_scale(method: Method[Any]) -> None:
    """What a client starts from does not depend on its scale (a method that refuses all scales but
    one is put to it by `check_rescale`)."""
    if not method.mixed_ranks:
        return
    for s in scenarios(method):
        for rank in served(method, s.top):
            one, two = (started(method.broadcast(s.state, rank, c)) for c in (0.7, 3.0))
            off = float((one - two).norm())
            assert off <= 2 * tolerance(s, one), f"start scale: rank {rank} is off by {off:.1e}"


def check_per_client(method: Method[Any]) -> None:
    """The key of a client matters if `per_client` says so, and only then."""
    differ = False
    for s in scenarios(method):
        for rank in served(method, s.top):
            first, *others = (tensors_of(method.broadcast(s.state, rank, 1.5, k)) for k in range(4))
            differ = differ or not all(same_bits(first, other) for other in others)
    said = f"per_client is {method.per_client}"
    assert differ == method.per_client, f"{said}, but the key {'matters' if differ else 'does not'}"


def check_lost(method: Method[Any]) -> None:
    """`lost`, of a method that has it, is `||delta - base - ΔW(sent)||_F²`."""
    if not isinstance(method, Truncating):
        return
    for s in scenarios(method):
        W = change(method, s.state)
        for rank in served(method, s.top):
            gap = float((W - started(method.broadcast(s.state, rank, 1.5))).double().norm())
            off = tolerance(s, W)
            assert abs(method.lost(s.state, rank) - gap**2) <= 2 * gap * off + off**2, "lost"


def served(method: Method[Any], top: int) -> Iterable[int]:
    """The ranks that a method serves."""
    return range(1, top + 1) if method.mixed_ranks else [top]


def check_ranks(method: Method[Any]) -> None:
    """A client gets the rank it asked for, with factors of the layer's shape and its own scale."""
    for s in scenarios(method):
        for rank in served(method, s.top):
            sent = method.broadcast(s.state, rank, 1.5).lora
            assert (sent.rank, sent.shape, sent.scale) == (rank, s.start.shape, 1.5)


def check_no_dead_component(method: Method[Any]) -> None:
    """At a random loss every component has a gradient, also where the rank exceeds that of W."""
    for m, n, top in (*SHAPES, *FULL):
        for trained, dtype in itertools.product((False, True), DTYPES):
            start = adapter(m, n, top, 1, dtype, trained=trained)
            state = method.init(start, SEED)
            check_gradients(method, state, top)
            # A cohort whose every update lies in one component makes W of rank one (or leaves the
            # rank of a trained start), below that of the clients.
            updates = []
            for update in play(method, state, top, generator(SEED, "low rank", m)):
                sent = update.sent.lora
                B = torch.zeros_like(sent.B)
                B[:, 0] = update.lora.B[:, 0] if "B" in update.sent.train else sent.B[:, 0]
                updates.append(replace(update, lora=LoRA(sent.A.clone(), B, sent.scale)))
            check_gradients(method, method.aggregate(state, updates), top)


def check_gradients(method: Method[Any], state: Any, top: int) -> None:
    """Over two rounds, since a method may train one factor after the other."""
    for rank in served(method, top):
        first = method.broadcast(state, rank, 1.5)
        squares = squared_gradients(first)
        after = method.aggregate(state, [Update(first, first.lora, 1.0)])
        second = squared_gradients(method.broadcast(after, rank, 1.5))
        width = min(len(squares), len(second))
        squares = squares[:width] + second[:width]
        size = squares.sqrt()
        # A gradient that is rounding noise beside the others is as dead as zero.
        assert size.min() > 1e-3 * size.max() > 0, f"dead component at rank {rank}: {size.tolist()}"


def squared_gradients(sent: Broadcast) -> Tensor:
    """Of a random loss, by component, over the factors that are trained."""
    A, B = (x.detach().clone().requires_grad_() for x in (sent.lora.A, sent.lora.B))
    slope = torch.randn(B.shape[0], A.shape[1], generator=generator(SEED, "loss")).to(A)
    (slope * (sent.lora.scale * B @ A)).sum().backward()
    grads = {"A": A.grad, "B": B.grad.T if B.grad is not None else None}
    return torch.stack(
        [x.square().sum(dim=1) for k, x in grads.items() if k in sent.train and x is not None]
    ).sum(dim=0)


def check_deterministic(method: Method[Any]) -> None:
    """The same state and key give the same bits, so the server can recompute what it sent; nothing
    reads or moves the global random state."""
    before = torch.get_rng_state()
    for s in scenarios(method):
        for key, (rank, scale, _) in enumerate(members(method, s.top)):
            one, two = (method.broadcast(s.state, rank, scale, key) for _ in range(2))
            assert same_bits(tensors_of(one.lora), tensors_of(two.lora))
            assert torch.equal(started(one), started(two))
        again = method.aggregate(s.state, s.updates)
        assert same_bits(tensors_of(s.after), tensors_of(again))
        again = method.init(s.start, SEED), method.init(s.start, SEED)
        assert same_bits(tensors_of(again[0]), tensors_of(again[1]))
    assert torch.equal(before, torch.get_rng_state())


def check_round_trip(method: Method[Any], folder: Path) -> None:
    """A state read back from a checkpoint is the same to the bit, and so is all that follows."""
    for s in scenarios(method, [*SHAPES, (40, 24, 8)]):
        save_file(flatten(s.state), folder / "state.safetensors")
        loaded = unflatten(method.init(s.start, SEED), load_file(folder / "state.safetensors"))
        assert type(loaded) is type(s.state)
        assert same_bits(tensors_of(s.state), tensors_of(loaded))

        updates = []
        for key, update in enumerate(s.updates):
            lora = update.sent.lora
            sent = method.broadcast(loaded, lora.rank, lora.scale, key)
            assert same_bits(tensors_of(lora), tensors_of(sent.lora))
            assert torch.equal(started(update.sent), started(sent))
            updates.append(replace(update, sent=sent))
        assert same_bits(tensors_of(s.after), tensors_of(method.aggregate(loaded, updates)))


def check_zero_weight(method: Method[Any]) -> None:
    for s in scenarios(method):
        for k in range(2):  # the second is of the top rank
            silent = replace(s.updates[k], weight=0.0)
            rest = [*s.updates[:k], *s.updates[k + 1 :]]
            total = sum(u.weight for u in rest)
            rest = [replace(u, weight=u.weight / total) for u in rest]
            one = observed(method, method.aggregate(s.state, [silent, *rest]), s.top)
            two = observed(method, method.aggregate(s.state, rest), s.top)
            assert float((one - two).norm()) <= 2 * tolerance(s, one)


class Lazy:
    """Updates that exist only while they are looked at, as when read from disk; any number of times."""

    def __init__(self, updates: list[Update]) -> None:
        self.updates = updates

    def __iter__(self) -> Iterator[Update]:
        for u in self.updates:
            yield replace(u, lora=LoRA(u.lora.A.clone(), u.lora.B.clone(), u.lora.scale))


def check_lazy_updates(method: Method[Any]) -> None:
    for s in scenarios(method):
        two = method.aggregate(s.state, Lazy(s.updates))
        assert same_bits(tensors_of(s.after), tensors_of(two))


def check_errors(method: Method[Any]) -> None:
    s = scenario(method)
    first, others = s.updates[0], s.updates[1:]
    for nothing in ([], Lazy([])):
        with pytest.raises(ValueError, match="empty"):
            method.aggregate(s.state, nothing)
    for rank in (-1, 0, s.top + 1):
        with pytest.raises(ValueError, match="rank"):
            method.broadcast(s.state, rank, 1.5)
    for scale in (0.0, -1.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale"):
            method.broadcast(s.state, s.top, scale)

    A, B, scale = first.lora.A, first.lora.B, first.lora.scale
    wider, taller = torch.cat([A, A[:, :1]], dim=1), torch.cat([B, B[:1]])
    for wrong in (LoRA(wider, B, scale), LoRA(A, taller, scale), LoRA(B.T, A.T, scale)):
        with pytest.raises(ValueError, match="shape"):
            method.aggregate(s.state, [*others, replace(first, lora=wrong)])
    for factor, value in itertools.product("AB", (math.nan, math.inf, -math.inf)):
        bad = LoRA(A.clone(), B.clone(), scale)
        (bad.A if factor == "A" else bad.B)[-1, -1] = value
        with pytest.raises(ValueError, match="finite"):
            method.aggregate(s.state, [*others, replace(first, lora=bad)])
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight"):
            method.aggregate(s.state, [*others, replace(first, weight=weight)])
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            method.aggregate(s.state, [*others, replace(first, lora=LoRA(A, B, scale))])


def check_mixed_ranks(method: Method[Any]) -> None:
    """A method either serves every rank up to the top with any scale, or refuses, both ways."""
    s = scenario(method)
    if method.mixed_ranks:
        for rank in range(1, s.top + 1):
            assert method.broadcast(s.state, rank, 0.3 * rank).lora.scale == 0.3 * rank
        return
    for rank, scale in ((s.top - 1, 1.5), (s.top, 3.0)):
        with pytest.raises(ValueError, match=f"rank {rank} and scale {scale:g}"):
            method.broadcast(s.state, rank, scale)
        first, lora = s.updates[0], s.updates[0].lora
        other = LoRA(lora.A[:rank], lora.B[:, :rank], scale)
        with pytest.raises(ValueError, match=f"rank {rank} and scale {scale:g}"):
            method.aggregate(s.state, [*s.updates[1:], replace(first, lora=other)])


def check_traffic(method: Method[Any]) -> None:
    """What `traffic` says is what the client returns, counted, on the mean of two rounds; nobody can
    be sent less than it lacks."""
    for one, two in zip(scenarios(method, rounds=[1]), scenarios(method, rounds=[2]), strict=True):
        m, n = one.start.shape
        cohort = [rank for rank, _, _ in members(method, one.top)]
        for u, v in zip(one.updates, two.updates, strict=True):
            said = method.traffic(m, n, u.sent.lora.rank, cohort)
            assert said.up == (returned(u) + returned(v)) / 2
            plain = u.sent.drawn is None and u.sent.train == {"A", "B"} and not u.sent.keep
            assert said.down > 0
            if plain and v.sent.train == u.sent.train:
                assert said.down >= u.sent.lora.A.numel() + u.sent.lora.B.numel()


def returned(update: Update) -> int:
    """Numbers in the factors that leave the client."""
    sizes = {"A": update.lora.A.numel(), "B": update.lora.B.numel()}
    return sum(sizes[k] for k in update.sent.train - update.sent.keep)


UNIVERSAL: list[Callable[[Method[Any]], None]] = [
    check_inputs_untouched,
    check_state_is_its_own,
    check_order_is_irrelevant,
    check_split,
    check_rescale,
    check_start_scale,
    check_per_client,
    check_lost,
    check_ranks,
    check_no_dead_component,
    check_deterministic,
    check_zero_weight,
    check_lazy_updates,
    check_errors,
    check_mixed_ranks,
    check_traffic,
]
# ---------------------------------------------------------------------------------------------
# What a client starts from.
# ---------------------------------------------------------------------------------------------


DRAWS = 100
"""The keys over which a start that is right on average is averaged."""


def check_start(method: Method[Any], reference: Start | None = None) -> None:
    """What a client starts from is what its dense reference says: that of `starts`, or the one given."""
    reference = reference or REFERENCES.get(method.starts)
    assert reference is not None, f"starts is {method.starts!r}: give `check_start` a reference"
    for s in scenarios(method):
        for rank in served(method, s.top):
            want = reference(method, s.state, rank)
            keys = range(DRAWS if method.starts == "mean" else 3 if method.per_client else 1)
            starts = torch.stack(
                [started(method.broadcast(s.state, rank, 1.5, k)).double() for k in keys]
            )
            off, bound = float((starts.mean(dim=0) - want).norm()), tolerance(s, want)
            if method.starts == "mean":  # four standard errors
                bound += 4 * float(starts.var(dim=0).sum() / DRAWS) ** 0.5
            assert off <= bound, f"start: rank {rank} is off by {off:.1e} (rounding: {bound:.0e})"
