"""The weightings: formulas by hand, invariances, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.reference import dense as reference
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from fedhl import WEIGHTINGS, Cohort, get_weighting
from fedhl.lora import truncate
from fedhl.seeds import generator
from fedhl.weighting import data_share, moment_bounds, relative_error

everyone = pytest.mark.parametrize("name", WEIGHTINGS)
ASKS = {"norm": "norms", "loss": "losses", "generalization_bound": "bounds"}
"""Weighting -> the field that clients must send for it."""
ROUNDING = 1e-12
"""Relative: a few hundred operations in float64."""


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Up to 6 clients and 3 layers; no layer lacks more than it holds."""
    K, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    energy = draw(st.lists(st.floats(1e-6, 1e6), min_size=L, max_size=L))
    share = st.lists(st.floats(0, 1), min_size=L, max_size=L)
    error = [[s * e for s, e in zip(draw(share), energy, strict=True)] for _ in range(K)]
    examples = draw(st.lists(st.integers(0, 1000), min_size=K, max_size=K).filter(any))
    sent = {
        field: draw(st.lists(st.floats(low, 1e3), min_size=K, max_size=K))
        for field, low in (("norms", 0), ("losses", -5), ("bounds", 0))
    }
    return Cohort(examples, error, energy, **sent)


def small(error: list[float], examples: list[float] | None = None, **sent: Any) -> Cohort:
    """One layer of energy 1, so that the errors are the relative ones."""
    return Cohort(examples or [1.0] * len(error), [[e] for e in error], [1.0], **sent)


def effective(p: Tensor) -> float:
    """`N_eff = 1/Σp²`."""
    return 1 / float(p.square().sum())


def minimum(
    objective: Callable[[Tensor], Tensor], K: int, convexity: float
) -> tuple[Tensor, float]:
    """Where on the simplex a strongly convex function is least, inside it, and how exact that is.

    Newton's method under `Σp = 1`. With g the gradient's part along the simplex, p is within
    `||g|| / convexity` of the minimum.
    """
    p = torch.full((K,), 1 / K, dtype=torch.float64)
    system = torch.ones(K + 1, K + 1, dtype=torch.float64)
    system[K, K] = 0
    for _ in range(100):
        g = jacobian(objective, p)
        assert isinstance(g, Tensor)
        system[:K, :K] = hessian(objective, p)  # type: ignore[assignment]
        step = torch.linalg.solve(system, torch.cat([-g, torch.zeros(1).double()]))[:K]
        if float(step.norm()) < 1e-15:
            break
        p = p + step * min(1.0, 0.9 / float((-step / p).max().clamp(min=1e-9)))
    g = jacobian(objective, p)
    assert isinstance(g, Tensor)
    return p, float((g - g.mean()).norm()) / convexity


# All of them


@everyone
@given(cohort=cohorts())
def test_weights_are_a_distribution(name: str, cohort: Cohort):
    p = get_weighting(name)(cohort)
    assert p.shape == (len(cohort.examples),) and p.dtype == torch.float64
    assert bool((p >= 0).all())
    # Six quotients and a sum of six.
    assert abs(float(p.sum()) - 1) <= 20 * torch.finfo(torch.float64).eps


@everyone
@given(cohort=cohorts())
def test_order_of_clients_is_order_of_weights(name: str, cohort: Cohort):
    weighting = get_weighting(name)
    columns = {
        key: torch.as_tensor(getattr(cohort, key)).flip(0)
        for key in ("examples", "error", "norms", "losses", "bounds")
    }
    turned = Cohort(energy=cohort.energy, **columns)
    assert torch.allclose(weighting(turned), weighting(cohort).flip(0), rtol=1e-12, atol=0)


@everyone
def test_the_cohort_is_not_touched(name: str):
    examples, error = torch.tensor([1.0, 2.0]), torch.tensor([[0.1], [0.2]])
    sent = {field: torch.tensor([3.0, 4.0]) for field in ASKS.values()}
    get_weighting(name)(Cohort(examples, error, [1.0], **sent))
    assert examples.tolist() == [1.0, 2.0] and error.equal(torch.tensor([[0.1], [0.2]]))
    assert all(value.tolist() == [3.0, 4.0] for value in sent.values())


@everyone
def test_a_single_client_has_all_the_weight(name: str):
    for value in (0.0, 2.0):
        sent = {field: [value] for field in ASKS.values()}
        assert get_weighting(name)(small([0.3], **sent)).tolist() == [1.0]


@everyone
def test_what_clients_must_send_for_it(name: str):
    """The module's claim: all but three weightings use what the server knows and nothing else."""
    sent = {"norms": [1.0, 2.0], "losses": [3.0, 5.0], "bounds": [7.0, 4.0]}
    all_sent = get_weighting(name)(small([0.1, 0.2], **sent))
    for field in sent:
        fewer = small([0.1, 0.2], **{key: x for key, x in sent.items() if key != field})
        if ASKS.get(name) != field:
            assert torch.equal(get_weighting(name)(fewer), all_sent)
            continue
        with pytest.raises(ValueError, match=f"^{name}: the cohort has no {field};"):
            get_weighting(name)(fewer)
        other = small([0.1, 0.2], **(sent | {field: [8.0, 1.0]}))
        assert not torch.allclose(get_weighting(name)(other), all_sent)


# One by one


def test_uniform():
    assert get_weighting("uniform")(small([0.0, 0.9, 0.1, 0.1])).tolist() == [0.25] * 4


def test_examples():
    p = get_weighting("examples")(small([0.0, 0.9, 0.1], examples=[10, 30, 60]))
    assert p.tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_examples_without_any_is_an_error():
    with pytest.raises(ValueError, match="no client has any training row"):
        get_weighting("examples")(small([0.1, 0.2], examples=[0, 0]))


def test_a_client_without_examples_has_no_weight():
    assert get_weighting("examples")(small([0.1, 0.2], examples=[0, 5])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("power", "inverse"),
    [
        (2, [1 / 0.1, 1 / (0.01 + 0.1), 1 / (0.25 + 0.1)]),  # as printed: 1/(ê² + ε)
        (1, [1 / 0.1, 1 / (0.1 + 0.1), 1 / (0.5 + 0.1)]),
        (0, [1.0, 1.0, 1.0]),
    ],
)
def test_truncation_by_hand(power: float, inverse: list[float]):
    p = get_weighting("truncation", power=power, epsilon=0.1)(small([0.0, 0.1, 0.5]))
    assert p.tolist() == pytest.approx([x / sum(inverse) for x in inverse])


def test_truncation_equals_the_reference_over_real_layers():
    g = generator(0, "layers")
    layers = [torch.randn(m, n, generator=g, dtype=torch.float64) for m, n in ((8, 6), (5, 9))]
    ranks = [1, 2, 4, 5]
    error = [[float((W - truncate(W, r).delta()).square().sum()) for W in layers] for r in ranks]
    cohort = Cohort([1] * 4, error, [float(W.square().sum()) for W in layers])
    for power, epsilon in ((2, 1e-3), (1, 0.05)):
        p = get_weighting("truncation", power=power, epsilon=epsilon)(cohort)
        assert p.tolist() == pytest.approx(
            reference.truncation_weights(layers, ranks, power, epsilon), rel=1e-10
        )


def test_the_error_is_one_number_over_all_layers():
    """`Σ_l e_il / Σ_l ||W_l||²`: a ratio of sums; the mean of the ratios would be 0.5 for client 0."""
    cohort = Cohort([1, 1], error=[[1.0, 0.0], [0.5, 49.5]], energy=[1.0, 99.0])
    assert relative_error(cohort).tolist() == pytest.approx([0.01, 0.5])


@given(cohort=cohorts(), factor=st.floats(1e-3, 1e3), power=st.sampled_from([1.0, 2.0]))
def test_truncation_does_not_depend_on_the_scale_of_W(cohort: Cohort, factor: float, power: float):
    """W -> cW multiplies errors and energies by c²: weights do not move as training proceeds."""
    error, energy = torch.as_tensor(cohort.error), torch.as_tensor(cohort.energy)
    grown = Cohort(cohort.examples, factor**2 * error, factor**2 * energy)
    weighting = get_weighting("truncation", power=power)
    assert torch.allclose(weighting(grown), weighting(cohort), rtol=1e-9, atol=0)


@given(cohort=cohorts(), epsilon=st.floats(1e-9, 10.0), power=st.sampled_from([1.0, 2.0]))
def test_epsilon_caps_the_imbalance(cohort: Cohort, epsilon: float, power: float):
    p = get_weighting("truncation", power=power, epsilon=epsilon)(cohort)
    assert float(p.max() / p.min()) <= (1 + epsilon) / epsilon * (1 + 1e-9)


def test_truncation_is_uniform_before_W_has_moved():
    cohort = Cohort([5, 1, 1], torch.zeros(3, 2), [0.0, 0.0])
    assert relative_error(cohort).tolist() == [0.0] * 3
    assert get_weighting("truncation")(cohort).tolist() == pytest.approx([1 / 3] * 3)


def test_data_shares_play_no_part_in_truncation():
    one = get_weighting("truncation")(small([0.1, 0.2], examples=[1, 1]))
    two = get_weighting("truncation")(small([0.1, 0.2], examples=[1, 99]))
    assert torch.equal(one, two)


def test_data_share():
    assert data_share(small([0.1, 0.2], examples=[1, 3])).tolist() == [0.25, 0.75]


# Truncation with a share


@given(cohort=cohorts(), low=st.floats(1e-9, 10), factor=st.floats(1, 1e6))
def test_effective_clients_grow_with_epsilon(cohort: Cohort, low: float, factor: float):
    one, two = (get_weighting("truncation", epsilon=e)(cohort) for e in (low, low * factor))
    assert effective(one) <= effective(two) * (1 + ROUNDING)


@given(cohort=cohorts(), epsilon=st.floats(1e-9, 10), share=st.floats(0.1, 0.99))
def test_a_share_takes_the_smallest_epsilon_that_keeps_it(
    cohort: Cohort, epsilon: float, share: float
):
    plain = get_weighting("truncation", epsilon=epsilon)(cohort)
    p = get_weighting("truncation", epsilon=epsilon, share=share)(cohort)
    least = share * len(p)
    if effective(plain) >= least:
        assert torch.equal(p, plain)
    else:  # N_eff grows with ε, so the smallest is where it is just reached
        assert least * (1 - ROUNDING) <= effective(p) <= least * (1 + ROUNDING)


def test_a_share_still_prefers_small_errors():
    """ê = 0, 0.1, 0.9 and ε = 1e-6: nearly all for one client; a share keeps the order."""
    cohort = small([0.0, 0.1, 0.9])
    assert effective(get_weighting("truncation", epsilon=1e-6)(cohort)) < 1.01
    p = get_weighting("truncation", epsilon=1e-6, share=0.8)(cohort)
    assert effective(p) == pytest.approx(2.4) and p[0] > p[1] > p[2]
    # They are the rule's weights at one ε: p_0/p_2 = (0.81 + ε)/ε.
    epsilon = 0.81 * float(p[2] / (p[0] - p[2]))
    assert torch.allclose(p, get_weighting("truncation", epsilon=epsilon)(cohort))


@pytest.mark.parametrize("error", [[0.0, 0.1, 0.9], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
def test_a_share_of_one_is_uniform(error: list[float]):
    """To the root of rounding: N_eff falls with the square of the weights' differences."""
    p = get_weighting("truncation", epsilon=1e-9, share=1.0)(small(error))
    assert p.tolist() == pytest.approx([1 / 3] * 3, rel=10 * math.sqrt(2.3e-16))


def test_truncation_copes_with_extreme_numbers():
    for cohort in (small([0.0, 1e-300, 1.0]), small([0.0, 1e-3, 1e300])):
        for epsilon in (5e-324, 1e-300, 1e300):
            p = get_weighting("truncation", power=1, epsilon=epsilon, share=0.9)(cohort)
            assert effective(p) >= 2.7 * (1 - ROUNDING)
            p = get_weighting("truncation", power=1, epsilon=epsilon)(cohort)
            assert float(p.sum()) == pytest.approx(1)


# Balanced


def test_balanced_by_hand():
    p = get_weighting("balanced", lam=0.1)(small([0.0, 0.5, 0.2], examples=[20, 50, 30]))
    parts = [0.2 / 0.1, 0.5 / (0.1 + 0.25), 0.3 / (0.1 + 0.06)]
    assert p.tolist() == pytest.approx([x / sum(parts) for x in parts])


@given(cohort=cohorts(), lam=st.floats(0.01, 10))
def test_balanced_minimises_drift_and_distance_from_the_data(cohort: Cohort, lam: float):
    q, error = data_share(cohort), relative_error(cohort)
    assume(bool((q > 0.01).all()))

    def objective(p: Tensor) -> Tensor:
        return (p.square() * error).sum() + lam * ((p - q).square() / q).sum()

    p = get_weighting("balanced", lam=lam)(cohort)
    best, exact = minimum(objective, len(q), convexity=2 * lam)
    assert exact < 1e-9  # or the search has failed
    assert float((p - best).norm()) <= exact + ROUNDING


def test_balanced_lies_between_the_data_shares_and_inverse_error():
    cohort = small([0.1, 0.5, 0.2], examples=[20, 50, 30])
    far = get_weighting("balanced", lam=1e13)(cohort)
    assert torch.allclose(far, data_share(cohort), rtol=ROUNDING)
    near, inverse = get_weighting("balanced", lam=1e-15)(cohort), 1 / relative_error(cohort)
    assert torch.allclose(near, inverse / inverse.sum(), rtol=ROUNDING)


def test_balanced_is_the_data_shares_before_W_has_moved():
    cohort = Cohort([5, 1, 0], torch.zeros(3, 2), [0.0, 0.0])
    assert torch.allclose(get_weighting("balanced", lam=0.01)(cohort), data_share(cohort))


@given(cohort=cohorts(), lam=st.floats(1e-6, 10))
def test_lam_caps_the_imbalance(cohort: Cohort, lam: float):
    q, p = data_share(cohort), get_weighting("balanced", lam=lam)(cohort)
    assert bool((p[q == 0] == 0).all())
    ratio = (p / q)[q > 0]
    assert float(ratio.max() / ratio.min()) <= (1 + 1 / lam) * (1 + ROUNDING)


@pytest.mark.parametrize("lam", [5e-324, 1e-300, 1e300])
def test_balanced_copes_with_extreme_numbers(lam: float):
    for share in (None, 0.5):
        p = get_weighting("balanced", lam=lam, share=share)(small([0.0, 0.5, 1e-300], [1, 2, 0]))
        assert float(p.sum()) == pytest.approx(1) and bool(p.isfinite().all())
    p = get_weighting("balanced", lam=5e-324)(small([0.9, 0.4, 0.0], [5, 2, 0]))
    assert p.tolist() == pytest.approx([4 / 13, 9 / 13, 0.0])


@given(cohort=cohorts(), lam=st.floats(1e-6, 10), share=st.floats(0.1, 1))
def test_a_share_never_makes_balanced_less_even(cohort: Cohort, lam: float, share: float):
    plain = get_weighting("balanced", lam=lam)(cohort)
    p = get_weighting("balanced", lam=lam, share=share)(cohort)
    assert effective(p) >= min(effective(plain), share * len(p)) * (1 - ROUNDING)
    if effective(plain) >= share * len(p):
        assert torch.equal(p, plain)


BY_RANK = small([0.0, 0.5, 0.5], examples=[70, 20, 10])
"""The largest data share has the best start: N_eff of balanced grows from 1 to 1/Σq² = 1.85."""
AGAINST = small([0.5, 0.5, 0.5], examples=[80, 10, 10])
"""Equal errors: N_eff falls from 3, since λ → 0 gives uniform weights, to 1.52."""
HUMP = small([0.5, 0.5, 0.001], examples=[80, 10, 10])
"""Both: N_eff is 1 near λ = 0, has a maximum between, and ends at 1.52."""


def test_a_share_that_balanced_can_reach():
    p = get_weighting("balanced", lam=1e-4, share=0.5)(BY_RANK)
    assert effective(p) == pytest.approx(1.5, rel=ROUNDING)


def test_a_share_beyond_the_data_shares_gives_the_data_shares():
    p = get_weighting("balanced", lam=1e-4, share=0.9)(BY_RANK)
    assert torch.allclose(p, data_share(BY_RANK), rtol=ROUNDING)


@pytest.mark.parametrize("lam", [1e-4, 1.0])
def test_where_a_larger_lam_is_less_even_the_given_one_serves(lam: float):
    p = get_weighting("balanced", lam=lam, share=1.0)(AGAINST)
    assert torch.equal(p, get_weighting("balanced", lam=lam)(AGAINST))
    assert effective(p) > effective(get_weighting("balanced", lam=2 * lam)(AGAINST))


def test_the_first_lam_that_reaches_the_share_and_no_later_one():
    """N_eff passes 2.4 twice, on its way up and down; on the way up the third client leads."""
    p = get_weighting("balanced", lam=1e-4, share=0.8)(HUMP)
    assert effective(p) == pytest.approx(2.4, rel=ROUNDING)
    assert int(p.argmax()) == 2
    assert effective(data_share(HUMP)) < 2.4


def test_a_share_out_of_reach_gives_the_most_even_weights():
    p = get_weighting("balanced", lam=1e-4, share=1.0)(HUMP)
    best = max(
        effective(get_weighting("balanced", lam=10 ** (k / 100 - 4))(HUMP)) for k in range(800)
    )
    # |d log N_eff / d log λ| <= 2, and every λ is within a sixteenth of an octave of one tried.
    assert effective(p) >= best * 2 ** (-2 / 16)
    assert best > 1.2 * max(1.0, effective(data_share(HUMP)))


# Norm


def test_norm_by_hand():
    p = get_weighting("norm")(small([0.1, 0.2, 0.3], examples=[1, 90, 9], norms=[2.0, 0.0, 6.0]))
    assert p.tolist() == [0.25, 0.0, 0.75]


def test_norm_is_uniform_if_nobody_has_moved():
    assert get_weighting("norm")(small([0.1] * 4, norms=[0.0] * 4)).tolist() == [0.25] * 4


def test_norm_does_not_overflow():
    assert get_weighting("norm")(small([0.1] * 2, norms=[1.5e308] * 2)).tolist() == [0.5, 0.5]


# Loss


@pytest.mark.parametrize("tilt", [-1.0, 0.5])
def test_loss_by_hand(tilt: float):
    p = get_weighting("loss", tilt=tilt)(small([0.1] * 3, [10, 30, 60], losses=[2.0, 1.0, 0.5]))
    parts = [0.1 * math.exp(2 * tilt), 0.3 * math.exp(tilt), 0.6 * math.exp(0.5 * tilt)]
    assert p.tolist() == pytest.approx([x / sum(parts) for x in parts])


@given(cohort=cohorts(), tilt=st.floats(0.01, 3), sign=st.sampled_from([-1, 1]))
def test_loss_is_the_worst_or_best_mixture_near_the_data(cohort: Cohort, tilt: float, sign: int):
    """tilt > 0: the maximiser of `Σ p f - KL(p‖q)/tilt`; tilt < 0: the minimiser, so it is never
    concave where it should be convex."""
    # Weights span e^9 at most: the search knows a weight to eps, so its logarithm to eps e^9 / 0.01.
    q, losses = data_share(cohort), torch.as_tensor(cohort.losses).clamp(-1.0, 2.0)
    assume(bool((q > 0.01).all()))

    def objective(p: Tensor) -> Tensor:
        return -sign * (p * losses).sum() + (p * (p / q).log()).sum() / tilt

    cohort = Cohort(cohort.examples, cohort.error, cohort.energy, losses=losses)
    p = get_weighting("loss", tilt=sign * tilt)(cohort)
    best, exact = minimum(objective, len(q), convexity=1 / tilt)
    assert exact < 1e-9  # or the search has failed
    assert float((p - best).norm()) <= exact + ROUNDING


@given(cohort=cohorts(), tilt=st.floats(-2, 2), shift=st.floats(-100, 100))
def test_only_differences_of_losses_matter(cohort: Cohort, tilt: float, shift: float):
    losses = torch.as_tensor(cohort.losses)
    moved = Cohort(cohort.examples, cohort.error, cohort.energy, losses=losses + shift)
    one, two = (get_weighting("loss", tilt=tilt)(c) for c in (cohort, moved))
    # Losses of up to 1100 are rounded by 1100 eps; that, times the tilt, is relative in p.
    assert torch.allclose(one, two, rtol=8 * 1100 * 2.3e-16, atol=1e-300)


@pytest.mark.parametrize("tilt", [-1.0, 1.0])
def test_loss_favours_the_side_it_says(tilt: float):
    p = get_weighting("loss", tilt=tilt)(small([0.1] * 2, losses=[0.5, 4.0]))
    assert int(p.argmax()) == (1 if tilt > 0 else 0)


def test_without_a_tilt_loss_is_fedavg():
    cohort = small([0.1] * 3, [10, 30, 60], losses=[-1.7e308, 1.7e308, 0.5])
    assert torch.equal(get_weighting("loss", tilt=0.0)(cohort), data_share(cohort))


@pytest.mark.parametrize("tilt", [-1e300, -1.0, 1.0, 1e300])
def test_absurd_losses_do_not_overflow(tilt: float):
    losses = [-1.7e308, 1.7e308, 1.0]
    p = get_weighting("loss", tilt=tilt)(small([0.1] * 3, losses=losses))
    assert p.tolist() == ([0, 1, 0] if tilt > 0 else [1, 0, 0])
    # A client without rows cannot take all the weight and give it to nobody.
    p = get_weighting("loss", tilt=tilt)(small([0.1] * 3, [0, 0, 5], losses=losses))
    assert p.tolist() == [0, 0, 1]


# Generalisation bound


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1.0, [0.1, 0.3, 0.6]),
        (-1.0, [6 / 9, 2 / 9, 1 / 9]),
        (0.0, [1 / 3] * 3),
        (2.0, [1 / 46, 9 / 46, 36 / 46]),
    ],
)
def test_generalization_bound_by_hand(power: float, expected: list[float]):
    cohort = small([0.1] * 3, examples=[1, 90, 9], bounds=[0.2, 0.6, 1.2])
    p = get_weighting("generalization_bound", power=power)(cohort)
    assert p.tolist() == pytest.approx(expected)


def test_generalization_bound_is_as_printed_unless_told_otherwise():
    cohort = small([0.1] * 2, bounds=[1.0, 3.0])
    assert get_weighting("generalization_bound")(cohort).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("power", "expected"), [(1.0, [0, 1, 0]), (-1.0, [0.5, 0, 0.5])])
def test_bounds_of_no_width(power: float, expected: list[float]):
    weighting = get_weighting("generalization_bound", power=power)
    assert weighting(small([0.1] * 3, bounds=[0.0, 2.0, 0.0])).tolist() == expected
    assert weighting(small([0.1] * 2, bounds=[0.0, 0.0])).tolist() == [0.5, 0.5]


def test_moment_bounds_by_hand():
    """f² = 1, 4, 9, 16: mean 7.5, variance 32.25."""
    low, high = moment_bounds([1.0, -2.0, 3.0, 4.0], radius=0.5)
    assert (low, high) == pytest.approx((7.5 - 16.125**0.5, 7.5 + 16.125**0.5))
    assert moment_bounds([1.0, -2.0, 3.0, 4.0], radius=0) == (7.5, 7.5)
    assert moment_bounds([3.0], radius=2.0) == (9.0, 9.0)
    assert moment_bounds([0.1, 0.1, 5.0], radius=1.0)[0] == 0.0


@given(
    pairs=st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 1)), min_size=1, max_size=8).filter(
        lambda pairs: sum(weight for _, weight in pairs) > 0.1
    )
)
def test_moment_bounds_hold_for_every_reweighting_within_the_radius(
    pairs: list[tuple[float, float]],
):
    losses, weights = torch.tensor(pairs, dtype=torch.float64).T
    weights = weights / weights.sum()
    n = len(pairs)
    distance = float((weights - 1 / n).square().sum() * n)  # chi-square from equal weights
    low, high = moment_bounds(losses.tolist(), distance)
    moment = float((weights * losses.square()).sum())
    slack = 2500 * ROUNDING  # the largest square
    assert low - slack <= moment <= high + slack


def test_moment_bounds_are_attained():
    """By the weights that move along f² itself, as long as none is negative."""
    losses = torch.tensor([1.0, 2.0, 2.5, 3.0], dtype=torch.float64)
    squares = losses.square()
    away = squares - squares.mean()
    for side, bound in zip((-1, 1), moment_bounds(losses.tolist(), 0.3), strict=True):
        weights = (1 + side * away * math.sqrt(0.3 / float(squares.var(correction=0)))) / 4
        assert bool((weights >= 0).all())
        assert float((weights - 0.25).square().sum() * 4) == pytest.approx(0.3)
        assert float((weights * squares).sum()) == pytest.approx(bound)


@pytest.mark.parametrize(
    ("losses", "radius", "match"),
    [
        ([], 1.0, "expected at least one loss"),
        ([1.0, float("nan")], 1.0, "not finite"),
        ([1.0, float("inf")], 1.0, "not finite"),
        ([1.0, 1e200], 1.0, "too large to square"),
        ([1.0], -1.0, "radius must be"),
        ([1.0], float("nan"), "radius must be"),
        ([1.0], float("inf"), "radius must be"),
    ],
)
def test_moment_bounds_refuse(losses: list[float], radius: float, match: str):
    with pytest.raises(ValueError, match=f"^moment_bounds: .*{match}"):
        moment_bounds(losses, radius)


# What is refused


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'truncaton'; did you mean 'truncation'\?.*uniform"):
        get_weighting("truncaton")
    with pytest.raises(ValueError, match=r"known: .*examples"):
        get_weighting("qqqqq")


def test_an_unknown_hyperparameter_is_named():
    with pytest.raises(ValueError, match="no hyperparameter 'eps'; it has: power, epsilon, share"):
        get_weighting("truncation", eps=1e-3)
    with pytest.raises(ValueError, match="'uniform' has no hyperparameter 'x'; it has none"):
        get_weighting("uniform", x=1)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("truncation", "epsilon", value) for value in (0.0, -1e-3, NAN, INF)),
        *(("truncation", "power", value) for value in (-1.0, NAN)),
        *((name, "share", v) for name in ("truncation", "balanced") for v in (0.0, -1.0, 1.1, NAN)),
        *(("balanced", "lam", value) for value in (0.0, -1.0, NAN, INF)),
        *(("loss", "tilt", value) for value in (NAN, INF, -INF)),
        *(("generalization_bound", "power", value) for value in (NAN, INF)),
    ],
)
def test_hyperparameters_out_of_range(name: str, field: str, value: float):
    with pytest.raises(ValueError, match=f"^{name}: {field} must be"):
        get_weighting(name, **{field: value})


GOOD: dict[str, Any] = {"examples": [1, 2], "error": [[0.1, 0.2], [0.3, 0.4]], "energy": [1, 2]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"error": [[0.1, -0.2], [0.3, 0.4]]}, "error has a negative"),
        ({"error": [[0.1, float("nan")], [0.3, 0.4]]}, "error has a negative or non-finite"),
        ({"energy": [1, float("inf")]}, "energy has a negative or non-finite"),
        ({"examples": [1, -2]}, "examples has a negative"),
        ({"losses": [1, float("nan")]}, "losses has a negative or non-finite"),
        ({"error": [[0.1, 0.2]]}, r"error must be of shape \(2, 2\), got \(1, 2\)"),
        ({"error": [0.1, 0.2]}, "error must be of shape"),
        ({"energy": [1, 2, 3]}, "error must be of shape"),
        ({"norms": [1, 2, 3]}, r"norms must be of shape \(2,\), got \(3,\)"),
        ({"losses": [1]}, "losses must be of shape"),
        ({"bounds": [[1, 2]]}, "bounds must be of shape"),
        ({"examples": [], "error": torch.zeros(0, 2)}, "expected at least one client"),
    ],
)
def test_a_wrong_cohort_is_refused(change: dict[str, Any], match: str):
    Cohort(**GOOD)
    with pytest.raises(ValueError, match=match):
        Cohort(**(GOOD | change))


def test_a_loss_may_be_negative():
    Cohort(**GOOD, losses=[-0.5, 0.5])


def test_no_start_is_further_than_nothing():
    """A random sketch may be further from W than zero: its relative error is cut at 1."""
    cohort = Cohort([1, 1], [[14.7], [0.25]], [1.0])
    assert relative_error(cohort).tolist() == [1.0, 0.25]
